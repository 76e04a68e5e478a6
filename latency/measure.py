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

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
SETTLING_BYTES = 31 << 20  # just under the 32 MiB up to which glibc's allocator adapts
WARM_UP = dict(cpu=3, cuda=50)  # passes of a model


@dataclass(frozen=True)
class Timing:
    """Seconds per batch: median, quartiles and minimum over n samples, and the samples in the order of the rounds."""

    median: float
    q1: float
    q3: float
    min: float
    n: int
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        q1, median, q3 = map(float, np.quantile(samples, (0.25, 0.5, 0.75)))
        return cls(median, q1, q3, float(min(samples)), len(samples), tuple(map(float, samples)))


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
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3 / repeats
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
    `min_seconds`. Raises ValueError for another dtype, fewer than one round, or a model on another device.
    """
    if dtype not in DTYPES or rounds < 1:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} and rounds at least 1, not {dtype!r} and {rounds}")
    device, images = images.device, images.to(DTYPES[dtype])
    for name, model in models.items():
        if any(p.device != device for p in model.parameters()):
            raise ValueError(f"model {name} is not on the images' device, {device}")
    settle_allocator()
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), ExitStack() as stack:
        if compiled:  # every model is one more compilation of the same forward
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=8 + 2 * len(models)))
        ready = {name: stack.enter_context(_ready(model, dtype)) for name, model in models.items()}
        passes = {name: caller(model, images, compiled) for name, model in ready.items()}
        calls = WARM_UP[device.type]
        repeats = {name: math.ceil(min_seconds / warm_up(call, device, calls)) for name, call in passes.items()}
        for _ in range(rounds):
            for name, call in passes.items():
                samples[name].append(stopwatch(call, repeats[name], device))
    return {name: Timing.of(s) for name, s in samples.items()}
