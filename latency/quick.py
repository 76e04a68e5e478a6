"""A latency table without a command or a file: coarse, in seconds to a minute."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch

from latency.bench import Bench
from latency.fit import choose_models, correct, fit
from latency.points import grid_of
from latency.samples import Progress, sample_all
from latency.table import LatencyTable
from latency.whole import measure_ratios
from models.arch import Arch
from models.swin_dims import Dims
from runtime.device import device_name

POINTS = dict(embed=4, heads=3, qk=3, v=3, mlp=5)
ROUNDS, BUILDS, MODELS = 3, 2, 5


def measure_table(
    arch: Arch,
    batch_size: int,
    device: str = "cpu",
    dtype: str = "fp32",
    tokens: Sequence[int] = (),
    points: dict[str, int] | None = None,
) -> LatencyTable:
    """A table of a plain ViT's blocks, measured now in torch. tokens: further token counts of blocks.

    points: how many of each axis, instead of POINTS. As `latency.build_table`, with fewer points and rounds.
    """
    dims = arch.dims
    grid = grid_of(POINTS | (points or {}), dims, arch.left_alone)
    if tokens:
        grid["tokens"] = sorted({*tokens, dims.blocks[0].tokens})
    meta = dict(
        model=arch.name,
        model_kwargs=arch.kwargs,
        batch=batch_size,
        img_size=list(arch.skeleton.patch_embed.img_size),
        tokens=dims.blocks[0].tokens,
        dtype=dtype,
        device=device_name(device),
        runtime="torch",
        threads=torch.get_num_threads(),
        compile=None,
        torch=torch.__version__,
        timm=timm.__version__,
        rounds=ROUNDS,
        grid=grid,
        unit="seconds per block",
    )

    def measure(chosen: Sequence[Dims]) -> tuple[np.ndarray, float]:
        return measure_ratios(arch, chosen, batch_size, torch.device(device), dtype, rounds=5, builds=BUILDS)

    with tempfile.TemporaryDirectory() as folder:
        progress = Progress(str(Path(folder) / "table.json"), meta)
        sample_all(Bench(arch, grid, batch_size, device, dtype, compiled=False), progress, ROUNDS)
        table = LatencyTable.of_parts(progress.seconds(), meta)
    factor, constant = fit(table, dims, choose_models(dims, arch.left_alone, count=MODELS), measure)
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return correct(table, factor, constant, date=when, complete=True, fit=dict(factor=factor, constant=constant))
