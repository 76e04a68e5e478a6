"""The leaderboard's rows as a table in markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
NAMES = {
    "one-shot": "**one-shot (ours)**",
    "nvit": "NViT's rule",
    "savit": "SAViT",
    "prune-and-merge-content": "Prune and Merge, by content",
    "prune-and-merge-content-refitted": "Prune and Merge, by content, refitted",
    "tome": "ToMe",
    "snapvit": "SnapViT",
    "magnitude": "magnitude",
    "random": "random",
}
OURS = ("one-shot", "nvit", "savit", "prune-and-merge-content", "prune-and-merge-content-refitted")  # drawn solid
MARKERS = "osD^vP*X<>hp"


class Line(NamedTuple):
    """What one line shows: a method after a stage. extent: minutes or epochs of it, 0 for right after."""

    method: str
    stage: str
    extent: float

    @property
    def title(self) -> str:
        peer, mode = self.method.partition("torch-pruning-")[1:]
        name = NAMES.get(self.method, ("Torch-Pruning: " if peer else "") + (mode or self.method).replace("-", " "))
        epochs = f"{self.extent:g} epoch{'s' * (self.extent != 1)} of finetuning"
        endings = dict(recovered=f" + {self.extent:g} min of recovery", finetuned=f" + {epochs}")
        return name + endings.get(self.stage, "")


def lines_of(rows: Rows) -> dict[Line, Rows]:
    """Rows by the line that they belong to, of each target and seed the newest; void ones right after."""
    lines: dict[Line, dict[tuple, dict[str, Any]]] = {}
    for row in rows:
        extents = dict(recovered=row["recover_minutes"], finetuned=row["epochs"])
        for stage in row.get("top1", ["right after"]):
            line = lines.setdefault(Line(row["method"], stage, extents.get(stage, 0)), {})
            line[row["target"], row["seed"]] = row
    return {line: list(newest.values()) for line, newest in lines.items()}


def losses(line: Line, rows: Rows, dense: float) -> list[float]:
    """Points of top-1 lost by every row that is not void."""
    return [dense - row["top1"][line.stage] for row in rows if "void" not in row]


def cell(line: Line, rows: Rows, dense: float) -> str:
    """Mean loss of the seeds, its lowest and highest, and the mean latency: `0.31 (0.22 to 0.40; 3 seeds) at 0.499`."""
    lost, void = losses(line, rows, dense), [row for row in rows if "void" in row]
    voids = f"void ({void[0]['void']})" if void else ""
    if not lost:
        return voids or "-"
    spread = f" ({min(lost):.2f} to {max(lost):.2f}; {len(lost)} seeds)" if len(lost) > 1 else ""
    latency = statistics.mean(row["latency"] for row in rows if "void" not in row)
    ending = f", {len(void)} void" if void else ""
    return f"{statistics.mean(lost):.2f}{spread} at {latency:.3f}{ending}"


def markdown(rows: Rows, dense: dict[str, float]) -> str:
    """For every base a table of points lost at measured latencies, the method that loses least at the top."""
    tables = []
    for base in dict.fromkeys(row["base"] for row in rows):
        mine = [row for row in rows if row["base"] == base]
        targets = sorted({row["target"] for row in mine}, reverse=True)
        lines = {
            line: {target: [row for row in own if row["target"] == target] for target in targets}
            for line, own in lines_of(mine).items()
        }

        def rank(line: Line, lines: dict = lines, base: str = base) -> tuple[int, float]:
            lost = [losses(line, at, dense[base]) for at in lines[line].values()]
            return sum(not each for each in lost), statistics.mean([value for each in lost for value in each] or [0])

        titles = [f"{base}, points lost of {dense[base]:.2f}", *(f"at {target:g}" for target in targets)]
        body = [
            [line.title, *(cell(line, at, dense[base]) for at in lines[line].values())]
            for line in sorted(lines, key=rank)
        ]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *body]))
        loads = [row["load"] for row in mine if "load" in row]
        if loads:
            tables.append(f"Load average of the machine while measuring: {min(loads):.1f} to {max(loads):.1f}.")
    return "\n\n".join(tables)


def plot(rows: Rows, dense: dict[str, float], path: Path) -> None:
    """Top-1 over measured latency right after compression, the mean over seeds; a panel for every base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure, panels = plt.subplots(1, len(bases), figsize=(5.4 * len(bases) + 2.6, 4.8), squeeze=False)
    for panel, base in zip(panels.flat, bases, strict=True):
        panel.axhline(dense[base], color="grey", linewidth=0.8)
        lines = lines_of([row for row in rows if row["base"] == base and "void" not in row])
        shown = {line: points_of(line, own) for line, own in lines.items() if line.stage == "right after"}
        for k, line in enumerate(sorted(shown, key=lambda line, shown=shown: -shown[line][-1][1])):
            panel.plot(
                *zip(*shown[line], strict=True),
                marker=MARKERS[k % len(MARKERS)],
                markersize=5,
                linewidth=2.5 if line.method == "one-shot" else 1.2,
                linestyle="-" if line.method in OURS else "--",
                color="black" if line.method == "one-shot" else plt.cm.tab10(k % 10),
                label=line.title.replace("*", ""),
            )
        panel.set(xlabel="measured latency, share of the dense model's", title=f"{base}, dense {dense[base]:.2f} %")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    panels[0, 0].set_ylabel("top-1 (%) right after compression")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def points_of(line: Line, rows: Rows) -> list[tuple[float, float]]:
    """(latency, top-1) of every target, the mean over the seeds, by latency."""
    by_target = [[row for row in rows if row["target"] == target] for target in {row["target"] for row in rows}]
    return sorted(
        (statistics.mean(row["latency"] for row in at), statistics.mean(row["top1"][line.stage] for row in at))
        for at in by_target
    )
