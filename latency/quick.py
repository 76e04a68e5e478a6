"""A latency table without a command or a file: coarse, in seconds to a minute."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from latency.assemble import assemble
from latency.fit import choose_models
from latency.points import grid_of
from latency.samples import Progress
from latency.swin_bench import make_bench
from latency.table import LatencyTable
from latency.whole import Measured, measure_ratios
from models.arch import Arch
from models.swin_dims import Dims, SwinDims
from runtime.device import device_name

POINTS = dict(embed=4, heads=3, qk=3, v=3, mlp=5)
POINTS_MORE = dict(embed=3, heads=3, qk=2, v=2, mlp=4)  # where there are stages, or several token counts
TOKEN_SHARES = (0.125, 0.5)  # of the patches, beside all of them
ROUNDS, BUILDS, MODELS = 3, 2, 5


def describe(arch: Arch, grid: dict[str, Any], batch_size: int, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """The `_meta` of a table that is measured in torch: what its measurements depend on. device: its name."""
    dims = arch.dims
    tokens = [stage.blocks[0].tokens for stage in dims.stages]
    return dict(
        model=arch.name,
        model_kwargs=arch.kwargs,
        batch=batch_size,
        img_size=list(arch.skeleton.patch_embed.img_size),
        tokens=tokens if isinstance(dims, SwinDims) else tokens[0],
        dtype=dtype,
        device=device,
        runtime="torch",
        threads=torch.get_num_threads(),
        compile=None,
        torch=torch.__version__,
        timm=timm.__version__,
        rounds=rounds,
        grid=grid,
        unit="seconds per block",
    )


def choose_grid(arch: Arch, by_tokens: bool = False) -> dict[str, Any]:
    """The coarse points of every axis, of a Swin Transformer by stage. by_tokens: at several token counts, too."""
    dims = arch.dims
    by_stage = isinstance(dims, SwinDims)
    grid = grid_of(POINTS_MORE if by_stage or by_tokens else POINTS, dims, arch.left_alone)
    if by_stage or not by_tokens:
        return grid
    own, prefix = dims.blocks[0].tokens, arch.prefix
    return grid | dict(tokens=sorted({*(prefix + max(1, round(s * (own - prefix))) for s in TOKEN_SHARES), own}))


def describe_coarse(arch: Arch, batch_size: int, device: str, dtype: str, by_tokens: bool = False) -> dict[str, Any]:
    """What the measurements of `measure_table` depend on: the beginning of its `_meta`."""
    return describe(arch, choose_grid(arch, by_tokens), batch_size, dtype, device_name(device), ROUNDS)


def measure_table(
    arch: Arch,
    batch_size: int,
    device: str = "cpu",
    dtype: str = "fp32",
    by_tokens: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    wanted: int = 0,
) -> LatencyTable:
    """A table of a model's blocks, measured now in torch: as `latency.build_table`, of fewer points and rounds.

    progress: called with a line where others disturb it. wanted: threads that were asked for, where they are more than
    those of torch.
    """
    meta = describe_coarse(arch, batch_size, device, dtype, by_tokens)

    def measure(chosen: Sequence[Dims]) -> Measured:
        return measure_ratios(arch, chosen, batch_size, torch.device(device), dtype, rounds=5, builds=BUILDS)

    bench = make_bench(arch, meta["grid"], batch_size, device, dtype, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        return assemble(
            bench,
            Progress(str(Path(folder) / "table.json"), meta),
            ROUNDS,
            arch.dims,
            choose_models(arch.dims, arch.left_alone, count=MODELS),
            measure,
            meta=meta,
            wanted=wanted or torch.get_num_threads(),
            say=progress,
            until=math.inf,
        )
