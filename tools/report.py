"""Finished runs as a page: python -m tools.report RUN [RUN …] [--output DIR]

Writes report.html, one file that needs no network: dense, pruned and finetuned side by side, the widths that are left,
how pruning went, and the commands that made it; with several runs, their accuracy against latency. RUN is a finetuning
or pruning folder with summary.json. Of a single run also widths.png and a copy of summary.json.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import options
from runtime.console import say, say_next, say_result, table, warn
from runtime.errors import Problems
from runtime.folders import make_folder, write_json, write_text
from runtime.script import run_script
from tools.figures import plot_widths
from tools.page import page
from tools.run_data import Run, incomparable, read_run

COLUMNS = ["", "top-1 %", "params", "M MACs", "table latency", "measured latency", "speed-up"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "examples: python -m tools.report runs/pruned_run/ft_dense_…\n"
        "          python -m tools.report runs/a runs/b --output report",
        "tools.report",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=None, help="where to write (default: the first run's folder)"
    )
    return parser


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def row(name: str, stage: dict[str, Any]) -> list[str]:
    """One line of the table; latencies are ratios to the dense model, the speed-up is the measured one."""
    measured = stage["latency_measured"]
    return [
        name,
        f"{stage['top1']:.2f}",
        f"{stage['params']:,}",
        f"{stage['macs'] / 1e6:,.1f}",
        _ratio(stage["latency_predicted"]),
        _ratio(measured),
        "-" if not measured else f"{1 / measured:.2f}x",
    ]


def check_args(args: argparse.Namespace) -> tuple[list[Run], Path]:
    """The runs and the folder to write to. Everything wrong is reported at once; raises BadArguments."""
    problems = Problems()
    runs = [problems.attempt(read_run, folder) for folder in args.runs]
    if len({folder.resolve() for folder in args.runs}) < len(args.runs):
        problems.add("the same run is named twice")
    problems.raise_if_any()
    output = problems.attempt(make_folder, args.output or args.runs[0], lock=False)
    problems.raise_if_any()
    return runs, output


def main(args: argparse.Namespace) -> None:
    runs, output = check_args(args)
    labels = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(runs))]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        prefix = f"{label} " if len(runs) > 1 else ""
        new = run is runs[0] or run.stages.get("dense") != runs[0].stages.get("dense")
        rows += [row(prefix + name, stage) for name, stage in run.stages.items() if new or name != "dense"]
    for note in incomparable(runs):
        warn(note)
    conditions = "latency relative to the dense model on {device}, batch {batch}, {dtype}".format(**runs[0].result)
    write_text(output / "report.html", page(runs, labels, COLUMNS, rows, conditions))
    written = [output / "report.html"]
    if len(runs) == 1:
        plot_widths(runs[0], output / "widths.png")
        write_json(output / "summary.json", runs[0].stages)
        written += [output / "summary.json", output / "widths.png"]
    say(table(COLUMNS, rows))
    say(conditions)
    say(
        f"written: {', '.join(map(str, written[1:]))}"
        if len(runs) == 1
        else "\n".join(f"{label}: {run.folder}" for run, label in zip(runs, labels, strict=True))
    )
    for run in runs:
        if (checkpoint := run.folder / "ft_checkpoint.pth").exists():
            say_next(f"-m tools.export {shlex.quote(str(checkpoint))} --format onnx")
    say_result(f"report: {written[0].resolve().as_uri()}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
