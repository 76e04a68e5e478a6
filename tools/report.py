"""One table and one picture of a finished run: dense, pruned and finetuned side by side, and the widths that are left.

    python -m tools.report RUN [--output DIR]

RUN is a finetuning or pruning folder with summary.json. Writes widths.png and a copy of summary.json to --output.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from models import DimsError, ViTDims
from utils import BadArguments, make_folder, run_script, say, table, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

AXES = dict(heads="heads", qk="QK width of a head", v="V width of a head", mlp="MLP width")
STAGES = ("dense", "pruned", "finetuned")
COLUMNS = ["", "top-1 %", "params", "M MACs", "table latency", "measured latency", "speed-up"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--output", type=Path, default=None, help="where to write (default: the run's folder)")
    return parser


def read_run(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages of a finished run. Raises BadArguments for a folder that is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        stages = {name: summary[name] for name in STAGES if name in summary}
        for stage in stages.values():
            ViTDims.from_dict(stage["dims"])
        return stages or {}["dense"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, DimsError) as error:
        raise BadArguments([f"{folder} is not the folder of a finished run: {error}"]) from None


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def row(name: str, stage: dict[str, Any]) -> list[str]:
    """One line of the table; latencies are ratios to the dense model, the speed-up is the measured one."""
    measured = stage["latency_measured"]
    return [
        name, f"{stage['top1']:.2f}", f"{stage['params']:,}", f"{stage['macs'] / 1e6:,.1f}",
        _ratio(stage["latency_predicted"]), _ratio(measured), "-" if not measured else f"{1 / measured:.2f}x",
    ]  # fmt: skip


def plot_widths(dims: ViTDims, dense: ViTDims | None, path: Path) -> None:
    """What is left of every width per block, over the dense model's (light)."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(3.2 * len(AXES), 3.2), constrained_layout=True)
    blocks = range(1, len(dims.blocks) + 1)
    for panel, (axis, title) in zip(axes, AXES.items(), strict=True):
        if dense is not None:
            panel.bar(blocks, [getattr(b, axis) for b in dense.blocks], color="#dbe3ee", label="dense")
        widths = [getattr(b, axis) for b in dims.blocks]
        bars = panel.bar(blocks, widths, color="#2f6db3", width=0.6, label="left")
        panel.bar_label(bars, fontsize=7)
        panel.set(title=title, xlabel="block", xticks=list(blocks))
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    full = f" of {dense.embed}" if dense is not None else ""
    figure.suptitle(f"embedding {dims.embed}{full}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    stages = read_run(args.run)
    output = make_folder(args.output or args.run, lock=False)
    widths = {name: ViTDims.from_dict(stage["dims"]) for name, stage in stages.items()}
    last = list(stages)[-1]
    plot_widths(widths[last], widths.get("dense"), output / "widths.png")
    write_json(output / "summary.json", stages)
    say(table(COLUMNS, [row(name, stage) for name, stage in stages.items()]))
    say("latency relative to the dense model on {device}, batch {batch}, {dtype}".format(**stages[last]))
    say(f"written: {output / 'summary.json'}, {output / 'widths.png'}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
