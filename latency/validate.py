"""Check a latency table against whole models: python -m latency.validate TABLE [DIMS.json ...] [--random K] [--fit]

Measures random architectures, and any that are given, against the dense model on this device; prints predicted and
measured latency as ratios to it, the mean and the worst error, and draws them. --fit first measures a few other models,
corrects the table's scale and what it misses outside the blocks, and writes it back with a note in `_meta`.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import options
from latency.fit import choose_models, correct, fit
from latency.measure import DTYPES
from latency.points import random_dims
from latency.table import LatencyTable
from latency.whole import BUILDS, ROUNDS, Measured, measure_ratios
from models import Arch
from models.pretrained import read_dims
from models.swin_dims import Dims
from options.parser import key_values
from runtime.console import say, table, warn
from runtime.device import device_name
from runtime.errors import Problems, RunFailed
from runtime.script import run_script

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__, "example: python -m latency.validate table.json runs/pruned_run/dims.json", "latency.validate"
    )
    parser.add_argument("table", metavar="TABLE", help="a latency table")
    add = parser.add_argument_group("architectures").add_argument
    add("dims", metavar="DIMS", nargs="*", help="architectures to measure: dims.json files")
    add("--random", type=int, default=10, metavar="K", help="random architectures to measure (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random architectures (default: %(default)s)")
    add = parser.add_argument_group("measurement").add_argument
    add("--fit", action="store_true", help="first correct the table's bias from other models, and write it back")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measurements of each build (default: {ROUNDS})")
    add("--builds", type=int, default=BUILDS, metavar="N", help=f"fresh builds of each model (default: {BUILDS})")
    add("--plot", metavar="FILE", help="the scatter plot (default: beside the table, with .png)")
    add = parser.add_argument_group("what a table does not say").add_argument
    add("--model", metavar="NAME", help="timm model of a table that does not say (default: the table's)")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="timm's arguments (default: the table's)")
    add("--batch-size", type=int, metavar="N", help="batch of a table that does not say (default: the table's)")
    add("--device", default="", help="cpu or cuda (default: cuda where the table was measured on this GPU, else cpu)")
    return parser


def device_for(name: str, lut: LatencyTable) -> torch.device:
    """Raises ValueError for a device that is not there."""
    cuda = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if cuda and lut.device == device_name("cuda") else "cpu"))
    if device.type == "cuda" and not cuda:
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return device


class Check:
    """What is checked: a table, its model, and the conditions it is measured under. Raises ValueError."""

    def __init__(self, args: argparse.Namespace, lut: LatencyTable) -> None:
        meta = lut.meta
        self.lut, name = lut, args.model or meta.get("model")
        if not name:
            raise ValueError(f"{lut.name} does not name its model: give --model, and --batch-size")
        if meta.get("runtime", "torch") != "torch":
            raise ValueError(f"{lut.name} was measured by {meta['runtime']}; models are measured here with torch")
        kwargs = (meta.get("model_kwargs") or {}) | key_values(args.model_kwargs, "--model-kwargs")
        self.arch = Arch.of(name, **kwargs)
        self.dense, self.fixed = self.arch.dims, self.arch.left_alone
        lut.check_covers(self.dense)
        self.batch, self.dtype = args.batch_size or meta.get("batch"), meta.get("dtype", "fp32")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"{lut.name} does not say its batch: give --batch-size")
        if self.dtype not in DTYPES:
            raise ValueError(f"{lut.name}: _meta: dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        self.device, self.compiled = device_for(args.device, lut), bool(meta.get("compile"))
        self.rounds, self.builds = args.rounds, args.builds

    def measure(self, chosen: list[Dims]) -> Measured:
        """Measured ratios to dense; a line says where others disturbed them."""
        measured = measure_ratios(
            self.arch,
            chosen,
            self.batch,
            self.device,
            self.dtype,
            self.compiled,
            rounds=self.rounds,
            builds=self.builds,
            progress=partial(tqdm, desc="models", unit="group", leave=False, disable=None),
        )
        if measured.note:
            warn(measured.note)
        return measured

    def fit(self) -> LatencyTable:
        """The corrected table; `_meta` says by how much, and when."""
        chosen = choose_models(self.dense, self.fixed, seed=1)
        factor, constant, _ = fit(self.lut, self.dense, chosen, self.measure)
        say(f"fit to {1 + len(chosen)} models: x {factor:.4f}, + {1e3 * constant:.3f} ms outside the blocks")
        note = dict(factor=factor, constant=constant, models=1 + len(chosen), date=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        return correct(self.lut, factor, constant, refit=note)


def draw(predicted: np.ndarray, measured: np.ndarray, title: str, path: str | Path) -> None:
    """Predicted against measured ratios."""
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    top = 1.05 * max(predicted.max(), measured.max())
    axes.plot([0, top], [0, top], color="grey", linewidth=1)
    axes.scatter(measured, predicted, s=16)
    axes.set(xlabel="measured latency, ratio to dense", ylabel="predicted", xlim=(0, top), ylim=(0, top))
    axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_args(args: argparse.Namespace) -> tuple[Check, list[Dims]]:
    """Everything wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    for name in ("random", "rounds", "builds"):
        if getattr(args, name) < (0 if name == "random" else 1):
            problems.add(f"--{name} must be at least {0 if name == 'random' else 1}, not {getattr(args, name)}")
    if not args.random and not args.dims and not args.fit:
        problems.add("nothing to check: give dims.json files, --random K or --fit")
    lut = problems.attempt(LatencyTable.load, args.table)
    check = problems.attempt(Check, args, lut) if lut else None
    given = [problems.attempt(read_dims, path) for path in args.dims]
    for dims in given if check else ():
        if dims and len(dims.blocks) != len(check.dense.blocks):
            problems.add(f"a dims.json has {len(dims.blocks)} blocks, {check.arch.name} has {len(check.dense.blocks)}")
        elif dims:
            problems.attempt(lut.check_covers, dims)
    problems.raise_if_any()
    return check, given


def report(check: Check, names: list[str], chosen: list[Dims], plot: str | Path) -> None:
    """Print the table of predicted and measured ratios, their mean and worst error; draw them."""
    measured, dense_seconds, *_ = check.measure(chosen)
    predicted = np.array([check.lut.ratio(dims, check.dense) for dims in chosen])
    errors = predicted / measured - 1
    rows: list[list[Any]] = [
        [name, "/".join(str(stage.embed) for stage in dims.stages), f"{p:.4f}", f"{m:.4f}", f"{e:+.1%}"]
        for name, dims, p, m, e in zip(names, chosen, predicted, measured, errors, strict=True)
    ]
    say(table(["architecture", "embed", "predicted", "measured", "error"], rows))
    conditions = f"{device_name(check.device)}, batch {check.batch}, {check.dtype}{', compiled' * check.compiled}"
    say(
        f"{len(chosen)} models: mean error {abs(errors).mean():.1%}, worst {abs(errors).max():.1%}, bias "
        f"{errors.mean():+.1%}; dense model predicted {1e3 * check.lut.model_seconds(check.dense):.2f} ms, measured "
        f"{1e3 * dense_seconds:.2f} ms; {conditions}"
    )
    draw(predicted, measured, f"{check.arch.name}\n{conditions}", plot)
    say(f"plot: {plot}")


def main(args: argparse.Namespace) -> None:
    check, given = check_args(args)
    here, theirs = device_name(check.device), check.lut.device
    if theirs and theirs != here:
        warn(f"the table was measured on {theirs}, this is {here}: the errors are those of using it here")
    torch.manual_seed(args.seed)
    plot = args.plot or Path(args.table).with_suffix(".png")
    try:
        if args.fit:
            check.lut = check.fit()
            check.lut.save(args.table)
            say(f"corrected and written: {args.table}")
        rng = random.Random(args.seed)
        chosen = [random_dims(check.dense, rng, check.fixed) for _ in range(args.random)] + given
        names = [f"random {i}" for i in range(args.random)] + args.dims
        if chosen:
            report(check, names, chosen, plot)
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"out of memory at batch {check.batch}: {error}") from None


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
