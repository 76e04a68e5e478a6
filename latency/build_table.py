"""Measure a latency table on this device: python -m latency.build_table --model NAME --batch-size N --output FILE

Measured are the parts a block is made of, through the modules that the compact model uses: the attention branch
(norm, attention, residual) over embed x heads x qk x v, the MLP branch over embed x mlp, and what is outside the blocks
over embed. A few whole models, dense and compact, then set the scale of each part.
"""
from __future__ import annotations

import argparse
import ast
import datetime
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from tqdm import tqdm

from latency.measure import DTYPES, device_name, interleaved, settle_allocator, stopwatch, warm_up
from latency.table import LatencyTable, write_json
from models import BlockDims, ModelError, ViTDims, build_vit, skeleton

GROUPS = dict(embed=16, heads=2, qk=8, v=8, mlp=16)  # units that pruning removes together; at most an eighth of the axis
POINTS = dict(embed=5, heads=4, qk=6, v=6, mlp=9)
POINTS_COMPILED = dict(embed=3, heads=3, qk=3, v=3, mlp=4)  # every point is compiled: seconds each
MAX_POINTS = 200_000
CHAIN = 2  # distinct branches one after another on the residual stream, so that weights are not always in cache
SAMPLE_SECONDS = dict(cpu=0.004, cuda=0.02)
CLOCK_EVERY = 0.25  # seconds between two measurements of the reference, which follow the machine's drift
NOISY = 0.2  # relative spread between rounds
FIT_MODELS = 5

Key = tuple[str, ...]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("latency table", description=__doc__.splitlines()[0], add_help=True)
    parser.add_argument("--model", help="timm model, the upper end of the table (default: that of the checkpoint)")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE",
                        help="timm arguments of the model, e.g. img_size=16 embed_dim=96")  # fmt: skip
    parser.add_argument("--initial-checkpoint", metavar="FILE", help="take model and arguments from a checkpoint")
    parser.add_argument("--input-size", type=int, metavar="PIXELS", help="image size (default: the model's)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="deployment batch (default: 64)")
    parser.add_argument("--dtype", default="fp32", help=f"{', '.join(DTYPES)}; weights and images (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda (default: cuda where there is one)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile; by default on fewer points")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each point (default: 3)")
    parser.add_argument("--points", nargs="*", default=[], metavar="AXIS=N",
                        help="points per axis, e.g. embed=5 heads=4 qk=6 v=6 mlp=9 (the default)")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE", help="the table to write (JSON)")
    return parser


def _pairs(items: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE arguments; values are Python literals where they read as such."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag}: {item!r} is not of the form KEY=VALUE")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


def parent_of(args: argparse.Namespace) -> tuple[str, dict[str, Any], ViTDims]:
    """The timm name, arguments and widths of the model. Raises ValueError (ModelError for an unknown model)."""
    arch, kwargs = args.model, {}
    if args.initial_checkpoint:
        try:
            stored = torch.load(args.initial_checkpoint, map_location="cpu", weights_only=True)
            arch, kwargs = arch or stored["arch"], dict(stored["kwargs"])
        except Exception as error:  # torch.load has no common type for its failures
            reason = str(error).splitlines()[0]
            raise ValueError(f"--initial-checkpoint {args.initial_checkpoint}: {type(error).__name__}: {reason}") from None
    if not arch:
        raise ValueError("--model or --initial-checkpoint is needed")
    kwargs |= _pairs(args.model_kwargs, "--model-kwargs")
    kwargs |= {k: v for k, v in dict(img_size=args.input_size, num_classes=args.num_classes).items() if v is not None}
    return arch, kwargs, ViTDims.of(skeleton(arch, **kwargs))


def grid_of(args: argparse.Namespace, dims: ViTDims) -> dict[str, list[int]]:
    """Points of every axis: multiples of the pruning group, from one group to the full width. Raises ValueError."""
    counts = POINTS_COMPILED if args.compile else POINTS
    given = _pairs(args.points, "--points")
    if odd := [f"{k}={n}" for k, n in given.items() if k not in POINTS or not isinstance(n, int) or n < 1]:
        raise ValueError(f"--points: {' '.join(odd)}: expected whole numbers above 0 for {', '.join(POINTS)}")
    grid = {}
    for axis, count in (counts | given).items():
        full = dims.embed if axis == "embed" else max(getattr(b, axis) for b in dims.blocks)
        group = min(GROUPS[axis], max(1, full // 8))
        spread = np.linspace(group, full, count) if count > 1 else [full]
        grid[axis] = sorted({min(full, round(p / group) * group) for p in spread} | {full})
    if (total := math.prod(map(len, grid.values()))) > MAX_POINTS:
        raise ValueError(f"--points: {total:,} combinations; at most {MAX_POINTS:,}")
    return grid


def problems(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the arguments, one line each."""
    found = []
    for axis, minimum in dict(batch_size=1, rounds=1, input_size=1, num_classes=0).items():
        if (value := getattr(args, axis)) is not None and value < minimum:
            found.append(f"--{axis.replace('_', '-')} must be at least {minimum}, not {value}")
    if args.dtype not in DTYPES:
        found.append(f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype}")
    if args.device not in ("cpu", "cuda"):
        found.append(f"--device must be cpu or cuda, not {args.device}")
    elif args.device == "cuda" and not torch.cuda.is_available():
        found.append("--device cuda: torch finds no CUDA device here; use --device cpu")
    folder = Path(args.output).resolve().parent
    if not folder.is_dir():
        found.append(f"--output: there is no folder {folder}")
    elif not os.access(folder, os.W_OK) or Path(args.output).is_dir():
        found.append(f"--output: cannot write {args.output}")
    try:
        grid_of(args, parent_of(args)[2])
    except ValueError as error:
        found.append(str(error))
    return found


def branches(arch: str, kwargs: dict[str, Any], grid: dict[str, list[int]], tokens: int) -> Iterator[tuple]:
    """(key, embed, chain of modules without storage) of every branch that is measured."""
    for embed in grid["embed"]:
        dims = {("mlp", f"EMB_{embed}", f"MLP_{m}"): BlockDims(0, 0, 0, m, tokens) for m in grid["mlp"]}
        for h, qk, v in product(grid["heads"], grid["qk"], grid["v"]):
            dims["attention", f"EMB_{embed}", f"QK_{h}_{qk}", f"V_{v}"] = BlockDims(h, qk, v, 0, tokens)
        with torch.device("meta"):
            blocks = build_vit(arch, ViTDims(embed, tuple(d for d in dims.values() for _ in range(CHAIN))), **kwargs).blocks
        for i, key in enumerate(dims):
            yield key, embed, blocks[i * CHAIN : (i + 1) * CHAIN].eval()


class Pool:
    """Random weights, as many as the dense model's blocks have, that every measured branch takes its own from.

    Taking them in turn costs no memory per branch and leaves the caches as a whole model would.
    """

    def __init__(self, size: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.values = (0.1 * torch.randn(size, generator=generator, device=device)).to(dtype)
        self.next = 0

    def fill(self, module: nn.Module) -> nn.Module:
        state = {}
        for name, parameter in module.named_parameters():
            if self.next + parameter.numel() > len(self.values):
                self.next = 0
            state[name] = self.values[self.next :][: parameter.numel()].view(parameter.shape)
            self.next += -(-parameter.numel() // 64) * 64  # aligned as the allocator would
        module.load_state_dict(state, assign=True)
        return module


class Bench:
    """Measures branches and models of one architecture, each relative to a reference that follows the machine's speed."""

    def __init__(self, args: argparse.Namespace, arch: str, kwargs: dict[str, Any], dims: ViTDims,
                 grid: dict[str, list[int]]) -> None:  # fmt: skip
        self.args, self.arch, self.kwargs, self.dims = args, arch, kwargs, dims
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        self.least = SAMPLE_SECONDS[args.device]
        parent = skeleton(arch, **kwargs)
        tokens = parent.patch_embed.num_patches + parent.num_prefix_tokens
        self.images = self._random(args.batch_size, parent.patch_embed.proj.in_channels, *parent.patch_embed.img_size)
        pool = Pool(2 * sum(p.numel() + 64 for p in parent.blocks.parameters()), args.device, self.dtype)
        streams = {e: self._random(args.batch_size, tokens, e) for e in grid["embed"]}
        self.points = {k: (pool.fill(m), streams[e], CHAIN) for k, e, m in branches(arch, kwargs, grid, tokens)}
        for e in grid["embed"]:
            outside = build_vit(arch, ViTDims(e, ()), **kwargs).to(self.device, self.dtype).eval()
            self.points["overhead", f"EMB_{e}"] = (outside, self.images, 1)
        with torch.device("meta"):
            block = build_vit(arch, ViTDims(dims.embed, (dims.blocks[0],)), **kwargs).blocks.eval()
        self._reference = self._call(pool.fill(block), streams[dims.embed], compiled=False)
        self._clock, self._last = [], -math.inf

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _call(self, module: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
        call = torch.compile(module) if compiled else module
        return lambda: call(x)

    def reference(self) -> float:
        """Seconds of the full-width block, lately: the quickest of three, the middle of the last three times."""
        if time.perf_counter() - self._last > CLOCK_EVERY:
            self._clock.append(min(stopwatch(self._reference, 1, self.device) for _ in range(3)))
            self._last = time.perf_counter()
        return float(np.median(self._clock[-3:]))

    def samples(self, key: Key, count: int) -> list[float]:
        """Time of one branch over that of the reference, `count` times."""
        module, x, length = self.points[key]
        if self.args.compile:
            torch.compiler.reset()
        call = self._call(module, x, self.args.compile)
        repeats = math.ceil(self.least / warm_up(call, self.device, calls=2))
        return [stopwatch(call, repeats, self.device) / length / self.reference() for _ in range(count)]

    def seconds(self) -> float:
        """Typical seconds of the reference."""
        return float(np.median(self._clock))

    def models(self, seed: int = 0) -> tuple[list[ViTDims], list[float]]:
        """The dense model and a few random compact ones, and their seconds per batch."""
        rng = random.Random(seed)

        def width(full: int, axis: str) -> int:
            group = min(GROUPS[axis], max(1, full // 8))
            return rng.randint(max(1, full // group // 4), full // group) * group

        chosen = [self.dims]
        for _ in range(FIT_MODELS):
            blocks = [
                BlockDims(width(b.heads, "heads"), width(b.qk, "qk"), width(b.v, "v"), width(b.mlp, "mlp"), b.tokens)
                for b in self.dims.blocks
            ]
            chosen.append(ViTDims(width(self.dims.embed, "embed"), tuple(blocks)))
        built = {}
        for i, dims in enumerate(chosen):
            model = build_vit(self.arch, dims, **self.kwargs).to(self.device, self.dtype).eval()
            built[str(i)] = torch.compile(model) if self.args.compile else model
        if self.args.compile:
            torch.compiler.reset()
        timings = interleaved(built, self.images, rounds=9)
        return chosen, [t.median for t in timings.values()]
