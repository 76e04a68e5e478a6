"""Measure a latency table on this device: python -m latency.build_table --model NAME --batch-size N --output FILE

Measured are the parts a block is made of, through the modules that the compact model uses: the attention branch
(norm, attention, residual) over embed x heads x qk x v, the MLP branch over embed x mlp, and what is outside the blocks
over embed. A few whole models, dense and compact, then set the scale of each part.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.optimize import lsq_linear
from tqdm import tqdm

from latency.measure import DTYPES, Bench, device_name, interleaved, ratio
from latency.table import LatencyTable, write_json
from models import BlockDims, ViTDims, build_vit, skeleton
from models.pretrained import read_initial
from utils import key_values

GROUPS = dict(embed=16, heads=2, qk=8, v=8, mlp=16)  # units pruned together; at most an eighth
POINTS = dict(heads=4, qk=5, v=5, mlp=9)  # and of embed every group on narrow models, else 5
POINTS_CUDA = POINTS | dict(qk=8, v=8)  # kernels step with the head width
POINTS_COMPILED = dict(embed=3, heads=3, qk=3, v=3, mlp=4)  # every point is compiled: seconds each
MAX_POINTS = 200_000
NOISY = 0.2  # relative spread between rounds above which a point is measured again
QUIET = 1.25  # times the quick reference: slower moments are those when others use the machine
FIT_MODELS, FIT_ROUNDS = 9, 9
MOST_CONSTANT = 0.1  # of the dense model's time


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("latency table", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="timm model, the upper end of the table (default: that of the checkpoint)")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="timm's, e.g. img_size=16 embed_dim=96")
    add("--initial-checkpoint", metavar="FILE", help="take model and arguments from a checkpoint (arch, kwargs, model)")
    add("--input-size", type=int, metavar="PIXELS", help="image size (default: the model's)")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    add("--batch-size", type=int, default=64, metavar="N", help="deployment batch (default: 64)")
    add("--dtype", default="fp32", help=f"{', '.join(DTYPES)}; weights and images (default: fp32)")
    available = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=available, help="cpu or cuda (default: cuda where there is one)")
    add("--compile", action="store_true", help="measure under torch.compile, on fewer points")
    add("--rounds", type=int, default=3, metavar="N", help="measurements of each point, at least 2 (default: 3)")
    add("--points", nargs="*", default=[], metavar="AXIS=N", help="points per axis, e.g. embed=5 heads=4 qk=5 v=5")
    add("--output", required=True, metavar="FILE", help="the table to write (JSON)")
    return parser


def parent_of(args: argparse.Namespace) -> tuple[str, dict[str, Any], ViTDims]:
    """The timm name, arguments and widths of the model. Raises ValueError (ModelError for an unknown model)."""
    arch, kwargs = args.model, {}
    if args.initial_checkpoint:
        stored, kwargs, _ = read_initial(args.initial_checkpoint)
        arch = arch or stored
    if not arch:
        raise ValueError("--model or --initial-checkpoint is needed")
    kwargs |= key_values(args.model_kwargs, "--model-kwargs")
    kwargs |= {k: v for k, v in dict(img_size=args.input_size, num_classes=args.num_classes).items() if v is not None}
    return arch, kwargs, ViTDims.of(skeleton(arch, **kwargs))


def points_of(args: argparse.Namespace) -> dict[str, int]:
    """How many points every axis gets at most. Raises ValueError."""
    given = key_values(args.points, "--points")
    counts = (POINTS_COMPILED if args.compile else POINTS_CUDA if args.device == "cuda" else POINTS) | given
    if odd := [f"{axis}={n}" for axis, n in given.items() if axis not in GROUPS or type(n) is not int or n < 2]:
        raise ValueError(f"--points: {' '.join(odd)}: expected whole numbers above 1 for {', '.join(GROUPS)}")
    if (total := math.prod((dict(embed=8) | counts).values())) > MAX_POINTS:
        raise ValueError(f"--points: {total:,} combinations, of at most {MAX_POINTS:,}")
    return counts


def group_of(axis: str, full: int) -> int:
    """Units that are pruned together on an axis of `full` units."""
    return min(GROUPS[axis], max(1, full // 8))


def grid_of(counts: dict[str, int], dims: ViTDims) -> dict[str, list[int]]:
    """Points of every axis: multiples of the pruning group, from one group to the full width."""
    grid, narrow = {}, dims.embed <= 8 * group_of("embed", dims.embed)
    for axis, count in (dict(embed=8 if narrow else 5) | counts).items():
        full = dims.embed if axis == "embed" else max(getattr(b, axis) for b in dims.blocks)
        group = group_of(axis, full)
        spread = np.linspace(group, full, count)
        grid[axis] = sorted({min(full, round(p / group) * group) for p in spread} | {full})
    return grid


def problems(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the arguments, one line each."""
    found = []
    for axis, minimum in dict(batch_size=1, rounds=2, input_size=1, num_classes=0).items():
        if (value := getattr(args, axis)) is not None and value < minimum:
            found.append(f"--{axis.replace('_', '-')} must be at least {minimum}, not {value}")
    if args.dtype not in DTYPES:
        found.append(f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype}")
    if args.device not in ("cpu", "cuda"):
        found.append(f"--device must be cpu or cuda, not {args.device}")
    elif args.device == "cuda" and not torch.cuda.is_available():
        found.append("--device cuda: torch finds no CUDA device here; use --device cpu")
    folder = Path(args.output).resolve().parent
    if not os.access(folder, os.W_OK) or Path(args.output).is_dir():
        missing = "" if folder.is_dir() else f": there is no folder {folder}"
        found.append(f"--output: cannot write {args.output}{missing}")
    for check in (parent_of, points_of):
        try:
            check(args)
        except ValueError as error:
            found.append(str(error))
    return found


def settings_of(args: argparse.Namespace, arch: str, kwargs: dict[str, Any], grid: dict) -> dict[str, Any]:
    """What the measurements depend on: the table's `_meta`, and what an interrupted run must share to be continued."""
    parent = skeleton(arch, **kwargs)
    return dict(
        model=arch, model_kwargs=kwargs, batch=args.batch_size, img_size=list(parent.patch_embed.img_size),
        tokens=ViTDims.of(parent).blocks[0].tokens, dtype=args.dtype, device=device_name(args.device),
        threads=torch.get_num_threads(), compile="default" if args.compile else None, torch=torch.__version__,
        timm=timm.__version__, rounds=args.rounds, grid=grid, unit="seconds per block",
    )  # fmt: skip


class Progress:
    """Samples of every key, kept in `<output>.part` so that an interrupted run can be continued."""

    def __init__(self, output: str, settings: dict[str, Any]) -> None:
        self.path, self.meta = Path(f"{output}.part"), json.loads(json.dumps(settings | {"complete": False}))
        self.samples: dict[str, list[list[float]]] = {}
        self.clock: list[float] = []
        if not self.path.exists():
            return
        try:
            stored = json.loads(self.path.read_text())
            if stored["_meta"] == self.meta:
                self.samples, self.clock = stored["_samples"], stored["_clock"]
        except (ValueError, KeyError, TypeError):
            pass  # not a file of ours
        found = f"continuing with {sum(map(len, self.samples.values()))} samples of"
        print(found if self.samples else "starting afresh, of other settings is", self.path, file=sys.stderr)

    def save(self) -> None:
        write_json({"_meta": self.meta, "_samples": self.samples, "_clock": self.clock}, self.path)

    def quiet(self, key: str) -> list[float]:
        """Times of a key over the reference's around them, of undisturbed moments; ascending."""
        limit = QUIET * np.quantile(self.clock, 0.1)
        around = [(s, self.clock[max(0, i - 1) : i + 2]) for s, i in self.samples[key]]
        return sorted(s / float(np.median(near)) for s, near in around if max(near) <= limit)

    def relative(self, key: str) -> float:
        """Time of a key over the reference's: the lower median of undisturbed moments, or the quickest of all."""
        if quiet := self.quiet(key):
            return quiet[(len(quiet) - 1) // 2]
        return min(s / self.clock[i] for s, i in self.samples[key])

    def spread(self, key: str) -> float:
        """Relative interquartile range of a key's time; infinite before it was measured twice undisturbed."""
        quiet = self.quiet(key)
        return float(np.subtract(*np.quantile(quiet, (0.75, 0.25))) / np.median(quiet)) if len(quiet) > 1 else math.inf


def sample_all(bench: Bench, progress: Progress, rounds: int) -> None:
    """Measure every key once a round, in random order; then the unsettled ones, for half as long at most."""
    bench.clock = progress.clock
    visits, per_visit = (1, rounds) if bench.compiled else (rounds, 1)
    keys = {"/".join(key): key for key in bench.keys}

    def visit(names: list[str], title: str, until: float = math.inf) -> None:
        random.shuffle(names)
        for name in tqdm(names, desc=title, unit="point", leave=False, mininterval=0.5, disable=None):
            if time.perf_counter() < until:
                progress.samples.setdefault(name, []).extend(bench.samples(keys[name], per_visit))
        bench.tick()

    begin = time.perf_counter()
    try:
        for i in range(visits):
            visit([k for k in keys if len(progress.samples.get(k, ())) <= i], f"round {i + 1}/{visits}")
            progress.save()
        until = time.perf_counter() + (time.perf_counter() - begin) / 2
        while time.perf_counter() < until and (unsettled := [k for k in keys if progress.spread(k) > NOISY]):
            visit(unsettled, "again, undisturbed", until)
    finally:
        progress.save()


def random_dims(dims: ViTDims, embed: float, rng: random.Random) -> ViTDims:
    """An architecture with about this share of the embedding, and random widths in every block."""

    def width(axis: str, full: int, share: float) -> int:
        group = group_of(axis, full)
        return min(full, max(1, round(share * full / group)) * group)

    blocks = [BlockDims(*(width(a, getattr(b, a), rng.random()) for a in POINTS), b.tokens) for b in dims.blocks]
    return ViTDims(width("embed", dims.embed, embed), tuple(blocks))


def fit(table: LatencyTable, bench: Bench, args: argparse.Namespace) -> tuple[float, float]:
    """A factor of the parts, and seconds outside the blocks, so that whole models come out as measured.

    Least squares of the relative errors of the dense and a few random models. The seconds are what layers of unequal
    widths cost beyond their sum: without them, small models come out too fast.
    """
    rng = random.Random(0)
    chosen = [bench.dims, *(random_dims(bench.dims, share, rng) for share in np.linspace(0.25, 1, FIT_MODELS))]
    models = {str(i): build_vit(bench.arch, d, **bench.kwargs).to(bench.device) for i, d in enumerate(chosen)}
    timings = list(interleaved(models, bench.images, FIT_ROUNDS, dtype=args.dtype, compiled=args.compile).values())
    measured = np.array([ratio(t, timings[0]).median * timings[0].median for t in timings])
    parts = np.array([table.model_seconds(d) for d in chosen])
    common, most = np.median(measured / parts), MOST_CONSTANT * measured[0]
    rows = np.stack([parts / measured, most / measured], axis=1)
    factor, share = lsq_linear(rows, np.ones(len(chosen)), ([common / 2, 0], [common * 2, 1])).x
    return float(factor), float(share * most)


def build(args: argparse.Namespace) -> tuple[LatencyTable, int]:
    """The measured table, saved, and the number of points measured. Continues an interrupted run."""
    arch, kwargs, dims = parent_of(args)
    grid = grid_of(points_of(args), dims)
    progress = Progress(args.output, settings := settings_of(args, arch, kwargs, grid))
    bench = Bench(arch, kwargs, grid, args.batch_size, args.device, args.dtype, args.compile)
    sample_all(bench, progress, args.rounds)
    spreads = {key: progress.spread(key) for key in progress.samples}
    if noisy := sorted((k for k in spreads if spreads[k] > NOISY), key=lambda k: -spreads[k]):
        worst = ", ".join(f"{key} ({spreads[key]:.0%})" for key in noisy[:3])
        print(f"warning: {len(noisy)} of {len(spreads)} points vary by more than {NOISY:.0%} between rounds, "
              f"worst {worst}; is the machine in use by others?", file=sys.stderr)  # fmt: skip
    reference = float(np.quantile(progress.clock, 0.1))
    seconds = {key: progress.relative(key) * reference for key in progress.samples}
    factor, constant = fit(LatencyTable.of_parts(seconds, {}), bench, args)
    fitted = {key: factor * s + constant * key.startswith("overhead") for key, s in seconds.items()}
    table = LatencyTable.of_parts(fitted, settings | dict(
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"), complete=True,
        noise=float(np.median([s for s in spreads.values() if s < math.inf] or [1])),
        fit=dict(factor=factor, constant=constant),
    ))  # fmt: skip
    table.save(args.output)
    progress.path.unlink()
    return table, len(seconds)


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main(args: argparse.Namespace) -> int:
    if found := problems(args):
        print(*(f"error: {problem}" for problem in found), sep="\n", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    try:
        table, points = build(args)
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {args.output}.part", file=sys.stderr)
        return 130
    except (torch.OutOfMemoryError, OSError) as error:
        print(f"{error}".partition("\n")[0], file=sys.stderr)
        return 1
    dense, taken = table.model_seconds(parent_of(args)[2]) * 1e3, time.perf_counter() - begin
    print(f"{args.output}: {points} points in {taken:.0f} s; dense model {dense:.2f} ms per batch of {args.batch_size}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(get_args_parser().parse_args()))
