"""What a finished run reports: one object per stage, with latency measured against the dense model."""
from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import checkpoint
from latency.measure import device_name, interleaved, ratio
from latency.table import LatencyTable
from models import ViTDims, build_vit, macs, params, skeleton
from training import FullModel
from utils import warn

BUILDS = 5  # fresh pairs of models per measurement


@dataclass(frozen=True)
class Conditions:
    """What a latency is measured under: the table's, so that prediction and measurement speak of the same thing."""

    batch: int
    dtype: str = "fp32"
    compiled: bool = False

    @classmethod
    def of(cls, table: LatencyTable, device: torch.device, batch: int) -> Conditions:
        """A table's; `batch` where it does not say. Warns when it was measured on another device."""
        meta, here = table.meta, device_name(device)
        if meta.get("device", here) != here:
            warn(f"the table was measured on {meta['device']}, this is {here}: the prediction is for the former")
        return cls(int(meta.get("batch", batch)), meta.get("dtype", "fp32"), bool(meta.get("compile")))


def measured_ratio(full: FullModel, dims: ViTDims, conditions: Conditions, device: torch.device) -> float:
    """Measured latency of the compact model relative to the dense one: interleaved, the median of paired ratios.

    Latency does not depend on weights, so both are freshly built; on a CPU it does depend, by a few per cent, on where
    in memory they lie, so they are built several times and the median is taken.
    """
    stem = skeleton(full.arch, **full.kwargs).patch_embed
    state = checkpoint.rng_state()
    images = torch.randn(conditions.batch, stem.proj.in_channels, *stem.img_size, device=device)
    kept, ratios = [], []
    for _ in range(BUILDS):
        models = dict(dense=build_vit(full.arch, **full.kwargs), compact=build_vit(full.arch, dims, **full.kwargs))
        models = {name: model.to(device) for name, model in models.items()}
        timings = interleaved(models, images, dtype=conditions.dtype, compiled=conditions.compiled)
        ratios.append(ratio(timings["compact"], timings["dense"]).median)
        kept.append(models)  # the next ones must lie elsewhere
    checkpoint.set_rng_state(state)
    return round(statistics.median(ratios), 5)


def stage(full: FullModel, dims: ViTDims, top1: float, *, predicted: float | None, measured: float | None,
          conditions: Conditions, device: torch.device) -> dict[str, Any]:  # fmt: skip
    """One object of summary.json: top-1 in percent, counts of one image, latencies as ratios to the dense model."""
    return dict(
        top1=round(top1, 3), params=params(full.arch, dims, **full.kwargs), macs=macs(full.arch, dims, **full.kwargs),
        latency_predicted=predicted, latency_measured=measured, device=device_name(device), batch=conditions.batch,
        dtype=conditions.dtype, compiled=conditions.compiled, dims=dims.to_dict(),
    )  # fmt: skip


def result_line(path: Path, result: dict[str, Any]) -> str:
    """The line a finished run ends with."""
    return (f"{path}: top-1 {result['top1']:.2f}, {result['params']:,} parameters, {result['macs'] / 1e6:,.1f} M MACs, "
            f"measured latency {result['latency_measured']:.3f} of dense")  # fmt: skip


def log_line(stats: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    """Training and test figures of an epoch, under the names that log.txt has for them."""
    return {f"train_{k}": v for k, v in stats.items()} | {f"test_{k}": v for k, v in test.items()}
