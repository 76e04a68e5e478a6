"""Which widths a table is measured at, and random architectures to check one with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from latency.table import STAGE
from models.dims import BLOCK_AXES, BlockDims, ViTDims
from models.swin_dims import Dims, SwinDims

GROUPS = dict(embed=16, heads=2, qk=8, v=8, mlp=16)  # units pruned together; at most an eighth


def group_of(axis: str, full: int) -> int:
    """Units that are pruned together on an axis of `full` units."""
    return min(GROUPS[axis], max(1, full // 8))


def grid_of(counts: dict[str, int], dims: Dims, left_alone: Collection[str] = ()) -> dict[str, Any]:
    """Points of every axis: multiples of the pruning group, from one group to the full width, `counts` at most.

    An axis that is never pruned has its full width alone. Of a Swin Transformer the points of every stage, by its name.
    """
    if isinstance(dims, SwinDims):
        return {f"{STAGE}{i}": grid_of(counts, stage, left_alone) for i, stage in enumerate(dims.stages)}
    grid = {}
    for axis, count in counts.items():
        full = dims.embed if axis == "embed" else max(getattr(b, axis) for b in dims.blocks)
        group = full if axis in left_alone else group_of(axis, full)
        spread = np.linspace(group, full, count)
        grid[axis] = sorted({min(full, max(1, round(p / group)) * group) for p in spread} | {full})
    return grid


def random_dims(dims: Dims, rng: random.Random, left_alone: Collection[str] = ()) -> Dims:
    """An architecture of uniformly random widths: every stage an embedding, every block its heads, QK, V and MLP.

    Widths are multiples of the pruning groups, from one group to that of `dims`; an axis that is left alone has that.
    """

    def width(axis: str, full: int) -> int:
        group = full if axis in left_alone else group_of(axis, full)
        return min(full, rng.randint(1, -(-full // group)) * group)

    def draw(stage: ViTDims) -> ViTDims:
        blocks = [replace(b, **{axis: width(axis, getattr(b, axis)) for axis in BLOCK_AXES}) for b in stage.blocks]
        return ViTDims(width("embed", stage.embed), tuple(blocks))

    return dims.with_stages([draw(stage) for stage in dims.stages])


def branches(grid: dict[str, list[int]], tokens: int) -> Iterator[tuple[tuple[str, ...], int, BlockDims]]:
    """(key, embed, widths) of every branch to be measured; a grid of several token counts has them in the keys.

    ("attention", "EMB_96", "QK_3_32", "V_32") or ("mlp", "N_66", "EMB_96", "MLP_384"), and for merging the model's
    `tokens` into fewer and putting them back, ("tokens", "N_40", "EMB_96").
    """
    counts = grid.get("tokens", [tokens])
    if len(counts) > 1:
        for n, e in product(sorted({*counts[:-1], tokens - 1}), grid["embed"]):
            yield ("tokens", f"N_{n}", f"EMB_{e}"), e, BlockDims(0, 0, 0, 0, n)
    for n, e in product(counts, grid["embed"]):
        level = (f"N_{n}", f"EMB_{e}") if len(counts) > 1 else (f"EMB_{e}",)
        for m in grid["mlp"]:
            yield ("mlp", *level, f"MLP_{m}"), e, BlockDims(0, 0, 0, m, n)
        for h, q, v in product(grid["heads"], grid["qk"], grid["v"]):
            yield ("attention", *level, f"QK_{h}_{q}", f"V_{v}"), e, BlockDims(h, q, v, 0, n)
