"""Wall time of models and of their branches: in eval and inference mode, interleaved, devices synchronised.

Legend: B batch, N tokens, E embed, H heads.
"""
from __future__ import annotations

import copy
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from latency.points import branches
from models.dims import BlockDims, ViTDims
from models.vit import build_vit, skeleton

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
SETTLING_BYTES = 31 << 20  # just under the 32 MiB up to which glibc's allocator adapts
PASS_SECONDS = dict(cpu=0.0, cuda=0.006)  # what a pass of a branch lasts at least: one call on a CPU
WARM_UP = dict(cpu=3, cuda=50)  # passes of a model
PASSES = 2  # of which the quickest counts
LONG_SECONDS = 0.02  # a pass as long as this is the only one
OTHER = dict(attention="mlp", mlp="attention")


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
    """The model in eval mode and in `dtype`: itself for fp32, else a copy. Its own mode is restored."""
    if dtype != "fp32":
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


def _caller(module: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    call = torch.compile(module, mode=compile_mode(x.device)) if compiled else module
    return lambda: call(x)


def interleaved(models: dict[str, nn.Module], images: Tensor, rounds: int = 15, min_seconds: float = 0.02,
                dtype: str = "fp32", compiled: bool = False) -> dict[str, Timing]:  # fmt: skip
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
        passes = {name: _caller(model, images, compiled) for name, model in ready.items()}
        calls = WARM_UP[device.type]
        repeats = {name: math.ceil(min_seconds / warm_up(call, device, calls)) for name, call in passes.items()}
        for _ in range(rounds):
            for name, call in passes.items():
                samples[name].append(stopwatch(call, repeats[name], device))
    return {name: Timing.of(s) for name, s in samples.items()}


def device_name(device: torch.device | str) -> str:
    """GPU name, or CPU model and the number of threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads"


class _Pool:
    """Random weights, twice as many as the dense model's blocks have, that every measured branch takes its own from.

    That costs no memory per branch, and leaves the caches about as a whole model would.
    """

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.values = 0.1 * torch.randn(size, device=device).to(dtype)
        self.next = 0

    def fill(self, module: nn.Module) -> nn.Module:
        """Give a module without storage its weights."""
        state = {}
        for name, parameter in module.named_parameters():
            if self.next + parameter.numel() > len(self.values):
                self.next = 0
            state[name] = self.values[self.next :][: parameter.numel()].view(parameter.shape)
            self.next += -(-parameter.numel() // 64) * 64  # aligned as the allocator would
        module.load_state_dict(state, assign=True)
        return module


class Bench:
    """The branches of one architecture at a grid of widths, measured through the modules that the compact model uses.

    Keys are those of `points.branches` and ("overhead", "EMB_96"): what is outside the blocks. The full-width block is
    the reference, measured again and again in between: it tells the machine's drift, and when others use it.

    grid: points of embed, heads, qk, v, mlp and maybe tokens; kwargs: timm's, of the model `arch`.
    """

    def __init__(self, arch: str, kwargs: dict[str, Any], grid: dict[str, list[int]], batch: int, device: str,
                 dtype: str, compiled: bool) -> None:  # fmt: skip
        parent = skeleton(arch, **kwargs)
        self._begin(parent, batch, device, dtype, compiled)
        self.arch, self.kwargs, self.dims = arch, kwargs, (dims := ViTDims.of(parent))
        tokens = dims.blocks[0].tokens
        counts = grid.get("tokens", [tokens])
        streams = {(e, n): self._random(batch, n, e) for e in grid["embed"] for n in counts}  # B N E
        pool = _Pool(2 * sum(p.numel() + 64 for p in parent.blocks.parameters()), self.device, self.dtype)
        planned = list(branches(grid, tokens))
        for embed in grid["embed"]:
            chosen = [(key, d) for key, e, d in planned if e == embed and key[0] != "tokens"]
            modules = _without_storage(arch, kwargs, embed, [replace(d, tokens=tokens) for _, d in chosen])
            kinds: dict[tuple[str, int], list[nn.Module]] = {}
            for (key, d), module in zip(chosen, modules, strict=True):
                kinds.setdefault((key[0], d.tokens), []).append(pool.fill(module))
                others = kinds.setdefault((OTHER[key[0]], d.tokens), [])
                self._points[key] = module, streams[embed, d.tokens], others, streams[embed, d.tokens]
            others, stream = kinds["mlp", tokens], streams[embed, tokens]
            for key, d in ((key, d) for key, e, d in planned if e == embed and key[0] == "tokens"):
                merging = build_vit(arch, ViTDims(embed, (d,)), **kwargs).blocks[0].to(self.device, self.dtype).eval()
                self._points[key] = merging, stream, others, stream
            outside = build_vit(arch, ViTDims(embed, ()), **kwargs).to(self.device, self.dtype).eval()
            key = "overhead", f"EMB_{embed}"
            self._points[key] = outside, self.images, others, stream
        block = _without_storage(arch, kwargs, dims.embed, dims.blocks[:1])
        self._reference = _caller(pool.fill(block), self._random(batch, tokens, dims.embed), compiled=False)
        with torch.inference_mode():
            warm_up(self._reference, self.device, WARM_UP[device])

    def _begin(self, parent: nn.Module, batch: int, device: str, dtype: str, compiled: bool) -> None:
        """What does not depend on the grid: conditions, clock and images."""
        self.device, self.dtype, self.at_once = torch.device(device), DTYPES[dtype], compiled
        self.clock: list[float] = []  # seconds of the reference
        self._due = -math.inf
        settle_allocator()
        stem = parent.patch_embed
        self.images = self._random(batch, stem.proj.in_channels, *stem.img_size)
        self._points: dict[tuple[str, ...], tuple[nn.Module, Tensor, list[nn.Module], Tensor]] = {}

    @property
    def keys(self) -> list[tuple[str, ...]]:
        return list(self._points)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @torch.inference_mode()
    def tick(self) -> None:
        """Measure the reference: the quickest of a few passes."""
        begin = time.perf_counter()
        self.clock.append(min(stopwatch(self._reference, 1, self.device) for _ in range(PASSES)))
        self._due = time.perf_counter() + max(0.2, 8 * (time.perf_counter() - begin))  # an eighth of all time

    @torch.inference_mode()
    def samples(self, key: tuple[str, ...], count: int = 1) -> list[tuple[float, int]]:
        """(seconds of one branch, index in `clock` of the reference measured last before it), `count` times.

        Before every pass another branch runs, of the other kind and of random width, so that caches and allocator are
        as inside a model: right after itself, a branch can be a tenth quicker.
        """
        module, x, others, stream = self._points[key]
        if self.at_once:
            torch.compiler.reset()  # else dynamo soon gives up on the many widths of one forward
        call = _caller(module, x, self.at_once)
        quickest = warm_up(call, self.device, calls=1 + self.at_once)
        repeats = max(1, math.ceil(PASS_SECONDS[self.device.type] / quickest))

        passes = PASSES if quickest < LONG_SECONDS else 1

        def timed() -> float:
            random.choice(others)(stream)
            return stopwatch(call, repeats, self.device)

        found = []
        for _ in range(count):
            if time.perf_counter() >= self._due:
                self.tick()
            found.append((min(timed() for _ in range(passes)), len(self.clock) - 1))
        return found


def _without_storage(arch: str, kwargs: dict[str, Any], embed: int, blocks: Iterable[BlockDims]) -> nn.Sequential:
    with torch.device("meta"):
        return build_vit(arch, ViTDims(embed, tuple(blocks)), **kwargs).blocks.eval()
