"""Whole models against their dense one: built afresh several times, interleaved, the median of paired ratios.

Latency does not depend on weights, so models are freshly built; on a CPU it does depend, by a few per cent, on where in
memory they lie, so every one is built several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from latency.measure import interleaved, ratio
from models.arch import Arch, Model, build_empty
from models.swin_dims import Dims
from models.tokens import layers

BUILDS, ROUNDS = 3, 7
TOGETHER = 4  # models measured in turn with one dense model
AGREE = 0.06  # relative difference between builds up to which they agree


@torch.no_grad()
def build_random(arch: Arch, dims: Dims | None, device: torch.device) -> Model:
    """A model with small random weights."""
    model = build_empty(arch, dims, device)
    for parameter in model.parameters():
        parameter.uniform_(-0.04, 0.04)
    for _, tokens in layers(model):
        tokens.reset()
    return model.eval()


def random_images(arch: Arch, batch: int, device: torch.device) -> torch.Tensor:
    """Random images (B, channels, H, W) of the model's size."""
    stem = arch.skeleton.patch_embed
    return torch.randn(batch, stem.proj.in_channels, *stem.img_size, device=device)


def measure_ratios(
    arch: Arch,
    chosen: Sequence[Dims],
    batch: int,
    device: torch.device,
    dtype: str = "fp32",
    compiled: bool = False,
    *,
    rounds: int = ROUNDS,
    builds: int = BUILDS,
    progress: Callable = iter,
) -> tuple[np.ndarray, float]:
    """(latency of every architecture of `chosen` over the dense model's, seconds per batch of the dense model).

    Where builds disagree by more than `AGREE`, the architecture is measured in up to as many more. `progress` wraps the
    groups that are measured one after another.
    """
    images = random_images(arch, batch, device)
    ratios: list[list[float]] = [[] for _ in chosen]
    dense_seconds, kept = [], None

    def measure(members: Sequence[int]) -> None:
        nonlocal kept
        models = {str(i): build_random(arch, chosen[i], device) for i in members}
        models["dense"] = build_random(arch.plain, None, device)
        kept = (models, kept and kept[0])  # while the last ones are held, the next lie elsewhere
        timings = interleaved(models, images, rounds, dtype=dtype, compiled=compiled)
        for i in members:
            ratios[i].append(ratio(timings[str(i)], timings["dense"]).median)
        dense_seconds.append(timings["dense"].median)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for members in progress(builds * _groups(range(len(chosen)))):
            measure(members)
        for _ in range(builds):
            for members in _groups([i for i, values in enumerate(ratios) if max(values) > (1 + AGREE) * min(values)]):
                measure(members)
    return np.array([np.median(values) for values in ratios]), float(np.median(dense_seconds))


def _groups(indices: Sequence[int]) -> list[Sequence[int]]:
    return [indices[i : i + TOGETHER] for i in range(0, len(indices), TOGETHER)]
