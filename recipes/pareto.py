"""Several sizes of one model beside each other: a table, and accuracy over measured latency as a picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from files.schema import read_json
from runtime.console import say, say_next, say_result, table
from runtime.folders import write_json

COLUMNS = ("target", "predicted", "measured", "top-1 %", "lost", "params", "divergence")


def write(folder: Path, top1_dense: float, sizes: Sequence[tuple[float, Path, float]]) -> None:
    """pareto.png and sizes.json in `folder`, from (target, its folder with summary.json, divergence) of every size."""
    rows, points = [], []
    for target, path, divergence in sizes:
        stage = read_json(path / "summary.json")["pruned"]
        points.append(
            dict(target=target, folder=path.name, divergence=divergence)
            | {name: stage[name] for name in ("top1", "params", "macs", "latency_predicted", "latency_measured")}
        )
        rows.append(
            [
                f"{target:g}",
                f"{stage['latency_predicted']:.3f}",
                f"{stage['latency_measured']:.3f}",
                f"{stage['top1']:.2f}",
                f"{top1_dense - stage['top1']:.2f}",
                f"{stage['params']:,}",
                f"{divergence:.1e}",
            ]
        )
    write_json(folder / "sizes.json", dict(top1_dense=top1_dense, sizes=points))
    draw(folder / "pareto.png", top1_dense, points)
    say(table(list(COLUMNS), rows))
    runs = " ".join(shlex.quote(str(path)) for _, path, _ in sizes)
    say_next(f"-m tools.report {runs} --output {shlex.quote(str(folder))}")
    say_result(f"{len(sizes)} sizes of a model of {top1_dense:.2f} % top-1: {folder / 'pareto.png'}")


def draw(path: Path, top1_dense: float, points: Sequence[dict]) -> None:
    """Top-1 over measured latency, the dense model at 1."""
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: point["latency_measured"])
    x = [*(point["latency_measured"] for point in ordered), 1.0]
    y = [*(point["top1"] for point in ordered), top1_dense]
    axes.plot(x, y, marker="o", color="#1f5fa8")
    for point in ordered:
        place, label = (point["latency_measured"], point["top1"]), f"{1 / point['latency_measured']:.2f}×"
        axes.annotate(label, place, (4, -12), textcoords="offset points", fontsize=9)
    axes.annotate("dense", (1.0, top1_dense), (-4, -12), textcoords="offset points", fontsize=9, ha="right")
    axes.set(xlabel="measured latency, share of the dense model's", ylabel="top-1, %", xlim=(0, 1.05))
    axes.margins(y=0.15)  # room for the labels below the points
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
