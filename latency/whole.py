"""Whole models against their dense one: built afresh several times, interleaved, the median of paired ratios.

Latency does not depend on weights, so models are freshly built; on a CPU it does depend, by a few per cent, on where in
memory they lie, so every one is built several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from latency.disturbance import MOSTLY, describe, fewer_threads, thread_count
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


class Measured(NamedTuple):
    """ratios: latencies over the dense model's; dense_seconds: its own, per batch; threads: with which they were
    measured, of those `wanted`; disturbed: share of rounds that other processes disturbed."""

    ratios: np.ndarray
    dense_seconds: float
    threads: int
    wanted: int
    disturbed: float

    @property
    def note(self) -> str:
        """What to say beside the figures: how others disturbed them; "" where they did not."""
        return describe(self.threads, self.wanted, self.disturbed)


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
    threads: int = 0,
    progress: Callable = iter,
) -> Measured:
    """Latency of every architecture of `chosen` over the dense model's.

    Where builds disagree by more than `AGREE`, the architecture is measured in up to as many more. Where others use the
    machine, so that most rounds are disturbed, all is measured with half of the threads, and so on down to one.
    threads: to begin with, 0 for what torch uses. `progress` wraps the groups that are measured one after another.
    """
    wanted = threads or torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for count in fewer_threads(wanted) if device.type == "cpu" else [wanted]:
            session = _Session(arch, chosen, batch, device, dtype, compiled, rounds)
            with thread_count(count):
                if session.measure(builds, progress, give_up=count > 1 and device.type == "cpu"):
                    break
    return Measured(*session.medians(), count, wanted, float(np.mean(session.disturbed)))


class _Session:
    """Measurements of some architectures under one thread count."""

    def __init__(
        self,
        arch: Arch,
        chosen: Sequence[Dims],
        batch: int,
        device: torch.device,
        dtype: str,
        compiled: bool,
        rounds: int,
    ) -> None:
        self.arch, self.chosen, self.device = arch, chosen, device
        self.dtype, self.compiled, self.rounds = dtype, compiled, rounds
        self.images = random_images(arch, batch, device)
        self.ratios: list[list[float]] = [[] for _ in chosen]
        self.dense_seconds: list[float] = []
        self.disturbed: list[float] = []
        self._kept: tuple | None = None

    def measure(self, builds: int, progress: Callable, give_up: bool) -> bool:
        """Measure all in turn; False, as soon as it is seen, where most of it is disturbed and give_up is set."""
        for members in progress(builds * _groups(range(len(self.chosen)))):
            self._measure(members)
            if give_up and np.mean(self.disturbed) > MOSTLY:
                return False
        for _ in range(builds):
            apart = [i for i, values in enumerate(self.ratios) if max(values) > (1 + AGREE) * min(values)]
            for members in _groups(apart):
                self._measure(members)
        return not (give_up and np.mean(self.disturbed) > MOSTLY)

    def _measure(self, members: Sequence[int]) -> None:
        models = {str(i): build_random(self.arch, self.chosen[i], self.device) for i in members}
        models["dense"] = build_random(self.arch.plain, None, self.device)
        self._kept = (models, self._kept and self._kept[0])  # while the last ones are held, the next lie elsewhere
        timings = interleaved(models, self.images, self.rounds, dtype=self.dtype, compiled=self.compiled)
        for i in members:
            self.ratios[i].append(ratio(timings[str(i)], timings["dense"]).median)
        self.dense_seconds.append(timings["dense"].median)
        self.disturbed.append(timings["dense"].disturbed)

    def medians(self) -> tuple[np.ndarray, float]:
        """Ratios to dense, and seconds of the dense model."""
        return np.array([np.median(values) for values in self.ratios]), float(np.median(self.dense_seconds))


def _groups(indices: Sequence[int]) -> list[Sequence[int]]:
    return [indices[i : i + TOGETHER] for i in range(0, len(indices), TOGETHER)]
