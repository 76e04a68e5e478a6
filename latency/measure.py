"""Wall time of models and of their branches: in eval and inference mode, interleaved, devices synchronised.

Legend: B batch, N tokens, E embed, H heads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from latency.disturbance import LOST, Sample, Watch, seconds_on_gpu

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
SETTLING_BYTES = 31 << 20  # just under the 32 MiB up to which glibc's allocator adapts
WARM_UP = dict(cpu=3, cuda=50)  # passes of a model
PATIENCE = 3  # times what the rounds would take undisturbed, for which disturbed ones are replaced
HOPELESS = 0.2  # share of undisturbed rounds below which replacing ends after as many more as were asked for
LEAST_SECONDS = 1.0  # and at least so long


@dataclass(frozen=True)
class Timing:
    """Seconds per batch: median, quartiles and minimum over n samples, and the samples in the order of the rounds.

    disturbed: share of the rounds in which other processes took part of the time; see `latency.disturbance`.
    """

    median: float
    q1: float
    q3: float
    min: float
    n: int
    samples: tuple[float, ...]
    disturbed: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[float], disturbed: float = 0.0) -> Timing:
        q1, median, q3 = map(float, np.quantile(samples, (0.25, 0.5, 0.75)))
        return cls(median, q1, q3, float(min(samples)), len(samples), tuple(map(float, samples)), disturbed)


class Ratio(NamedTuple):
    """Median and quartiles over rounds of the ratio of two timings."""

    median: float
    q1: float
    q3: float


def ratio(a: Timing, b: Timing) -> Ratio:
    """Time of `a` over time of `b`, paired by round so that drift of the machine cancels.

    Raises ValueError when they were not measured in the same number of rounds.
    """
    if a.n != b.n:
        raise ValueError(f"timings of {a.n} and {b.n} rounds are not paired; measure both in one call of interleaved")
    q1, median, q3 = np.quantile(np.divide(a.samples, b.samples), (0.25, 0.5, 0.75))
    return Ratio(float(median), float(q1), float(q3))


def settle_allocator() -> None:
    """Bring the C allocator to its steady state.

    glibc returns freed memory to the system until a large block has been freed once; before that, the same model can
    take up to twice as long, depending on what the process did earlier.
    """
    torch.empty(SETTLING_BYTES, dtype=torch.uint8)


def stopwatch(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call over `repeats` calls in a row; on a GPU between two events, the queue empty before and after."""
    if device.type == "cuda":
        return seconds_on_gpu(call, repeats, device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def warm_up(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of the quickest of some warm-up calls; on a GPU they stop after a second."""
    quickest, begin = math.inf, time.perf_counter()
    while calls > 0 and (device.type == "cpu" or time.perf_counter() - begin < 1):
        quickest = min(quickest, stopwatch(call, 1, device))
        calls -= 1
    return quickest


@contextmanager
def _ready(model: nn.Module, dtype: str):
    """The model in eval mode and in `dtype`: itself where it is so already, else a copy. Its own mode is restored."""
    if any(p.is_floating_point() and p.dtype != DTYPES[dtype] for p in model.parameters()):
        yield copy.deepcopy(model).to(DTYPES[dtype]).eval()
        return
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


def compile_mode(device: torch.device | str) -> str:
    """torch.compile's mode in all measurements: with CUDA graphs where there is CUDA."""
    return "reduce-overhead" if torch.device(device).type == "cuda" else "default"


def caller(module: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    call = torch.compile(module, mode=compile_mode(x.device)) if compiled else module
    return lambda: call(x)


def interleaved(
    models: dict[str, nn.Module],
    images: Tensor,
    rounds: int = 15,
    min_seconds: float = 0.02,
    dtype: str = "fp32",
    compiled: bool = False,
) -> dict[str, Timing]:
    """Seconds per batch of every model on `images` (B, 3, H, W), measured in turn A B A B ... on the images' device.

    dtype: fp32, or bf16 / fp16, for which weights and images are cast (no autocast: this is how a model is deployed);
    the caller's models keep their own type. compiled: under torch.compile. One sample is as many passes as last
    `min_seconds`. Rounds that other processes disturb are replaced for a while, and on a machine that is never quiet
    there may be fewer. Raises ValueError for another dtype, fewer than one round, or a model on another device.
    """
    if dtype not in DTYPES or rounds < 1:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} and rounds at least 1, not {dtype!r} and {rounds}")
    device, images = images.device, images.to(DTYPES[dtype])
    for name, model in models.items():
        if any(p.device != device for p in model.parameters()):
            raise ValueError(f"model {name} is not on the images' device, {device}")
    settle_allocator()
    with torch.inference_mode(), ExitStack() as stack:
        if compiled:  # every model is one more compilation of the same forward
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=8 + 2 * len(models)))
        ready = {name: stack.enter_context(_ready(model, dtype)) for name, model in models.items()}
        passes = {name: caller(model, images, compiled) for name, model in ready.items()}
        calls = WARM_UP[device.type]
        quickest = {name: warm_up(call, device, calls) for name, call in passes.items()}
        repeats = {name: math.ceil(min_seconds / seconds) for name, seconds in quickest.items()}
        limit = LEAST_SECONDS + PATIENCE * rounds * sum(repeats[name] * quickest[name] for name in passes)
        with Watch(device) as watch:

            def take() -> dict[str, Sample]:
                return {name: watch.time(call, repeats[name]) for name, call in passes.items()}

            kept = _clean_rounds(take, rounds, limit)
    disturbed = sum(map(_is_disturbed, kept)) / len(kept)
    return {name: Timing.of([taken[name].seconds for taken in kept], disturbed) for name in models}


def _is_disturbed(taken: dict[str, Sample]) -> bool:
    return any(sample.is_disturbed for sample in taken.values())


def _clean_rounds(take: Callable[[], dict[str, Sample]], rounds: int, limit: float) -> list[dict[str, Sample]]:
    """Rounds in the order in which they were taken: undisturbed ones, and where too few of them come within `limit`
    seconds, the least disturbed of the others; fewer than asked for where each takes very long."""
    begin, taken, clean = time.perf_counter(), [], 0
    while clean < rounds and (time.perf_counter() - begin < limit or not taken):
        if len(taken) >= 2 * rounds and clean < HOPELESS * len(taken):
            break
        taken.append(take())
        clean += not _is_disturbed(taken[-1])
    lost = [max(sample.lost for sample in samples.values()) for samples in taken]
    best = sorted(range(len(taken)), key=lambda i: (lost[i] > LOST) * lost[i])[:rounds]
    return [taken[i] for i in sorted(best)]
