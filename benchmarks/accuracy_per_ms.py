"""Top-1 at equal latency: the published rule, each idea alone, all together, Torch-Pruning's modes, and random.

    python -m benchmarks.accuracy_per_ms --initial-checkpoint cifar10_deit.pth --bench FOLDER --table T --rows FILE
    python -m benchmarks.accuracy_per_ms … --epochs 3 --methods published one-shot torch-pruning-l2 random

Every row is one method at one latency ratio with one seed, which chooses the calibration images. Nothing trains before
the recovery recipe of the folder --bench (equal_footing.py, torch_pruning_baseline.py), of --epochs epochs. Rows that
--rows holds already are not repeated. Ratios are the table's, or with --measured those of equal_footing.py, which need
an idle machine. There --check measures the widths of the rows that --rows holds, beside what the table says of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.pruners import METHODS, ONE_SHOT, PEERS, Bench, dims_of, maker, merging_of
from benchmarks.rows import append, read, spread
from models import ViTDims, build_vit
from runtime.console import table


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-checkpoint", required=True, help="the dense CIFAR-10 model")
    parser.add_argument("--bench", type=Path, default=Path("../shared/bench"), help="folder of equal_footing.py")
    parser.add_argument("--table", required=True, help="latency table of the model")
    parser.add_argument("--measured", action="store_true", help="meet measured ratios, not the table's")
    parser.add_argument("--rows", type=Path, default=Path("runs/accuracy_rows.jsonl"), help="results, one row a line")
    usual = [method for method in METHODS if "tokens" not in method]
    parser.add_argument(
        "--methods",
        nargs="+",
        default=usual,
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all but those of tokens, which need a table of them)",
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[0.7, 0.5, 0.3], help="latency ratios")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="rows of each method")
    parser.add_argument("--calib", type=int, default=1024, help="calibration images")
    parser.add_argument("--epochs", type=int, default=0, help="of recovery")
    parser.add_argument("--per-class", type=int, default=1000, help="training images a class for recovery")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after so many")
    parser.add_argument("--check", action="store_true", help="make no row, measure the latency of those that are there")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of top-1 over latency")
    return parser


def measure(bench: Bench, method: str, seed: int, target: float, make: Callable[[float], nn.Module]) -> dict[str, Any]:
    """One row."""
    args, begin = bench.args, time.monotonic()
    row = dict(method=method, target=target, seed=seed, epochs=args.epochs, measured=args.measured)
    try:
        model = make(target) if method in PEERS else bench.meet(make, target)
    except ValueError as error:
        return row | dict(failed=str(error))
    row |= dict(latency=round(bench.ratio(model), 4), oneshot=bench.ef.top1(model, *bench.val))
    row |= dict(dims=dims_of(model).to_dict())
    if args.epochs:
        bench.ef.finetune(model, bench.base, *bench.recovery, args.epochs, seed=seed)
        row |= dict(per_class=args.per_class, finetuned=bench.ef.top1(model, *bench.val))
    return row | dict(seconds=round(time.monotonic() - begin, 1))


def _key(row: dict[str, Any]) -> tuple:
    return row["method"], row["target"], row["seed"], row["epochs"], row["measured"]


def report(rows: list[dict[str, Any]], dense: float) -> str:
    """Mean loss in points of top-1 over the seeds, with its spread, of every method at every target."""
    key = "finetuned" if any("finetuned" in row for row in rows) else "oneshot"
    targets = sorted({row["target"] for row in rows}, reverse=True)
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for target in targets:
            losses = [dense - r[key] for r in rows if (r["method"], r["target"]) == (method, target) and key in r]
            spread = f" ({min(losses):.2f} to {max(losses):.2f}; {len(losses)})" if losses else ""
            cells.append(f"{statistics.mean(losses):.2f}{spread}" if losses else "-")
        lines.append(cells)
    return table([f"points lost of {dense:.2f}", *(f"at {target:g}" for target in targets)], lines)


def check(bench: Bench, rows: list[dict[str, Any]]) -> str:
    """Ratios by the table and as measured, each method's mean over the seeds with the spread of the measured ones."""
    pairs_of: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in (row for row in rows if "dims" in row):
        kwargs = bench.kwargs | merging_of(**ONE_SHOT.get(row["method"], {}))
        model = build_vit(bench.arch, ViTDims.from_dict(row["dims"]), **kwargs)
        pair = row["latency"], bench.ef.latency_ratio(bench.base, model)[0]
        pairs_of.setdefault((row["method"], row["target"]), []).append(pair)
    lines = []
    for (method, target), pairs in pairs_of.items():
        predicted, measured = zip(*pairs, strict=True)
        lines.append([method, f"{target:g}", f"{statistics.mean(predicted):.3f}", spread(measured, 3)])
    return table(["", "target", "by the table", "measured"], lines)


def plot(rows: list[dict[str, Any]], dense: float, path: Path) -> None:
    """Top-1 over latency, the mean over seeds: right after pruning, and after recovery where there was one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = dict(oneshot="right after pruning", finetuned="after recovery")
    shown = {key: title for key, title in titles.items() if any(key in row for row in rows)}
    figure, panels = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.2), sharey=True, squeeze=False)
    for panel, (key, title) in zip(panels.flat, shown.items(), strict=True):
        panel.axhline(dense, color="grey", linewidth=0.8)
        for k, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = [row for row in rows if row["method"] == method and key in row]
            targets = sorted({row["target"] for row in mine})
            points = [[row for row in mine if row["target"] == target] for target in targets]
            x, y = ([statistics.mean(row[name] for row in point) for point in points] for name in ("latency", key))
            panel.plot(
                x,
                y,
                marker="o",
                markersize=4,
                linestyle="--" if method in PEERS else "-",
                color=plt.cm.tab20(2 * k % 20 + k // 10 % 2),
                label=method,
            )
        panel.set(xlabel="latency, share of the dense model's", title=title)
        panel.grid(alpha=0.25)
    panels[0, 0].set_ylabel(f"top-1 (%), dense {dense:.2f}")
    panels[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    begin, rows = time.monotonic(), read(args.rows)
    done, bench = {_key(row) for row in rows}, Bench(args)
    if args.check:
        print(check(bench, [row for row in rows if row["epochs"] == args.epochs and row["method"] in args.methods]))
        return
    for seed in args.seeds:
        for method in args.methods:
            left = [t for t in args.targets if (method, t, seed, args.epochs, args.measured) not in done]
            if not left or time.monotonic() - begin > 60 * args.minutes:
                continue
            make = maker(bench, method, seed)
            for target in left:
                if time.monotonic() - begin > 60 * args.minutes:
                    break
                rows.append(measure(bench, method, seed, target, make))
                print(json.dumps(rows[-1]), flush=True)
                append(args.rows, rows[-1])
    dense = bench.ef.top1(bench.base, *bench.val)
    shown = [row for row in rows if _key(row)[3:] == (args.epochs, args.measured) and row["method"] in args.methods]
    print(report(shown, dense))
    if args.plot:
        plot(shown, dense, args.plot)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
