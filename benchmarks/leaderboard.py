"""Top-1 at equal measured latency: our methods and their peers, on one table and one picture.

    OMP_NUM_THREADS=1 python -m benchmarks.leaderboard --base FILE --bench FOLDER --targets 0.7 0.5 0.3 0.2
    OMP_NUM_THREADS=1 python -m benchmarks.leaderboard … --epochs 3 --recover_minutes 1 --plot leaderboard.png

Every row is one method at one target with one seed, which chooses the calibration images: a model whose widths or
tokens are really gone, cut until its latency, interleaved with the dense one in this process, is within 0.015 of the
target. A row that is not is void, and stays in the table as such. --bench is the folder of equal_footing.py (data,
stopwatch, recipe of finetuning) and torch_pruning_baseline.py, which needs torch-pruning installed. Rows that --rows
holds already are not repeated; an interrupted benchmark continues where it stopped. `--report` makes no rows and shows
those of all bases.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import footing
from benchmarks.board_figures import markdown, plot
from benchmarks.footing import Bench, Pruner, dims_of
from benchmarks.peers import TOKENS, TORCH_PRUNING, PruneAndMerge, ToMe, TorchPruning
from benchmarks.pruners import GRADIENT, ONE_SHOT, Gradient, OneShot, SAViT
from benchmarks.rows import append, read
from benchmarks.snapvit import SnapViT
from runtime.device import device_name

METHODS = (*ONE_SHOT, *GRADIENT, "savit", *TOKENS, "tome", *TORCH_PRUNING)
USUAL = ["one-shot", "nvit", "savit", "prune-and-merge-content", "tome", *TORCH_PRUNING, "magnitude", "random"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, metavar="FILE", help="the dense model, with its arch and kwargs inside")
    add("--bench", type=Path, default=Path("../shared/bench"), help="folder of equal_footing.py (default: %(default)s)")
    add("--snapvit", type=Path, metavar="FOLDER", help="SnapViT's own code, which adds it (default: none)")
    add("--table", metavar="FILE", help="latency table to choose widths by (default: measured once and kept)")
    add("--rows", type=Path, default=Path("runs/leaderboard.jsonl"), help="rows, one a line (default: %(default)s)")
    add(
        "--methods",
        nargs="+",
        default=USUAL,
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: {' '.join(USUAL)})",
    )
    add(
        "--targets",
        nargs="+",
        type=float,
        default=[0.7, 0.5, 0.3, 0.2],
        help="of dense latency (default: 0.7 0.5 0.3 0.2)",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="rows of each method (default: 0 1 2)")
    add("--calib", type=int, default=1024, help="calibration images (default: %(default)s)")
    add("--recover_minutes", type=float, default=0.0, help="unlabelled recovery of one-shot rows (default: none)")
    add("--epochs", type=int, default=0, help="of finetuning (default: none)")
    add("--per_class", type=int, default=1000, help="training images a class of both (default: %(default)s)")
    add("--every", type=int, default=1, metavar="N", help="evaluate on every N-th validation image (default: 1)")
    add("--minutes", type=float, default=600.0, help="start no row after so many (default: %(default)s)")
    add("--report", action="store_true", help="make no row (default: make those that are missing)")
    add("--plot", type=Path, metavar="FILE", help="PNG of top-1 over latency (default: none)")
    return parser


def pruner(args: argparse.Namespace, bench: Bench, method: str, seed: int) -> Pruner:
    """A method, scored on the calibration images of the seed."""
    if method == "snapvit":
        return SnapViT(bench, seed, args.snapvit)
    plain = dict(savit=SAViT, tome=ToMe)
    if method in plain:
        return plain[method](bench, seed)
    for kind, variants in ((Gradient, GRADIENT), (OneShot, ONE_SHOT), (PruneAndMerge, TOKENS)):
        if method in variants:
            return kind(bench, seed, **variants[method])
    return TorchPruning(bench, seed, **TORCH_PRUNING[method])


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as a row says it."""
    names = ("calib", "every", "per_class", "recover_minutes", "epochs")
    return dict(base=Path(args.base).stem) | {name: getattr(args, name) for name in names}


def serves(row: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a row need not be made again: stages that were not asked for do no harm."""
    wanted = ["base", "calib", "every", *(name for name in ("recover_minutes", "epochs") if asked[name])]
    return all(row[name] == asked[name] for name in [*wanted, *(["per_class"] if len(wanted) > 3 else [])])


def measure(args: argparse.Namespace, bench: Bench, make: Pruner, method: str, target: float, seed: int) -> dict:
    """One row: `top1` after every stage, or `void` with what was met instead."""
    begin, row = time.monotonic(), dict(method=method, target=target, seed=seed) | conditions(args)
    row |= dict(device=device_name("cpu"), threads=torch.get_num_threads())
    try:
        met = bench.meet(make, target)
    except ValueError as error:
        return row | dict(void=str(error))
    row |= dict(latency=round(met.latency, 4), load=round(met.load, 2))
    if abs(met.latency - target) > footing.VOID:
        return row | dict(void=f"nearest is {met.latency:.3f}")
    model = make.finish(met.model)
    row |= dict(dims=dims_of(model).to_dict()) if method != "tome" else {}
    row |= dict(seconds=round(time.monotonic() - begin, 1))  # until the model is there
    top1 = {"right after": bench.top1(model)}
    if args.recover_minutes and isinstance(make, OneShot):
        images = bench.ef.normalise(bench.recovery[0])
        top1["recovered"] = bench.top1(make.recover(copy.deepcopy(model), images, args.recover_minutes))
    if args.epochs:
        bench.ef.finetune(model.requires_grad_(True), bench.base, *bench.recovery, args.epochs, seed=seed)
        top1["finetuned"] = bench.top1(model)
    return row | dict(top1={name: round(value, 2) for name, value in top1.items()})


def make_rows(args: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Append what is missing to the rows and to their file."""
    begin, asked = time.monotonic(), conditions(args)
    done = {(row["method"], row["target"], row["seed"]) for row in rows if "target" in row and serves(row, asked)}
    for seed in args.seeds:
        for method in [*args.methods, *(["snapvit"] if args.snapvit else [])]:
            left = [target for target in args.targets if (method, target, seed) not in done]
            make = None
            for target in left:
                if time.monotonic() - begin > 60 * args.minutes:
                    return
                make = make or pruner(args, bench, method, seed)
                rows.append(measure(args, bench, make, method, target, seed))
                append(args.rows, rows[-1])
                print(json.dumps({name: value for name, value in rows[-1].items() if name != "dims"}), flush=True)


def main(args: argparse.Namespace) -> None:
    rows, name = read(args.rows), Path(args.base).stem
    dense = {r["base"]: r["top1"]["right after"] for r in rows if r["method"] == "dense" and r["every"] == args.every}
    if not args.report:
        bench = Bench(args.base, args.bench, args.table, args.calib, args.per_class, args.every)
        if name not in dense:
            dense[name] = round(bench.top1(bench.base), 2)
            rows.append(dict(method="dense", base=name, every=args.every, top1={"right after": dense[name]}))
            append(args.rows, rows[-1])
        make_rows(args, bench, rows)
    shown = [row for row in rows if row.get("target") in args.targets and row["every"] == args.every]
    print(markdown(shown, dense))
    if args.plot:
        plot(shown, dense, args.plot)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
