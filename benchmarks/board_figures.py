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
COLOURS = {"one-shot": "black", "nvit": "tab:blue", "savit": "tab:green", "prune-and-merge-content": "tab:red"}


class Line(NamedTuple):
    """What one line shows: a method after a stage. extent: minutes or epochs of it, 0 for right after."""

    method: str
    stage: str
    extent: float

    @property
    def title(self) -> str:
        name = NAMES.get(self.method, self.method.replace("torch-pruning-", "Torch-Pruning, ").replace("-", " "))
        endings = dict(recovered=f" + {self.extent:g} min of recovery", finetuned=f" + {self.extent:g} epochs")
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
    """Top-1 over measured latency, the mean over seeds; a panel for every base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure, panels = plt.subplots(1, len(bases), figsize=(6.2 * len(bases), 4.8), squeeze=False)
    for panel, base in zip(panels.flat, bases, strict=True):
        panel.axhline(dense[base], color="grey", linewidth=0.8)
        lines = lines_of([row for row in rows if row["base"] == base and "void" not in row])
        for k, (line, own) in enumerate((line, own) for line, own in lines.items() if line.stage == "right after"):
            by_target = [[row for row in own if row["target"] == target] for target in {row["target"] for row in own}]
            points = sorted(
                (statistics.mean(row["latency"] for row in at), statistics.mean(row["top1"][line.stage] for row in at))
                for at in by_target
            )
            panel.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                linewidth=2.5 if line.method == "one-shot" else 1.2,
                linestyle="-" if line.method in COLOURS else "--",
                color=COLOURS.get(line.method, plt.cm.tab20(k)),
                label=line.title.replace("*", ""),
            )
        panel.set(xlabel="measured latency, share of the dense model's", title=f"{base}: dense {dense[base]:.2f} %")
        panel.grid(alpha=0.25)
    panels[0, 0].set_ylabel("top-1 (%) right after compression")
    panels[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
