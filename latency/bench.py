"""The branches of one architecture at a grid of widths, measured through the compact model's own modules."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from latency.disturbance import Sample, Watch
from latency.measure import DTYPES, WARM_UP, caller, settle_allocator, warm_up
from latency.points import branches
from models.arch import Arch
from models.content import OnGroups
from models.dims import BlockDims, ViTDims

PASS_SECONDS = dict(cpu=0.0, cuda=0.006)  # what a pass of a branch lasts at least: one call on a CPU
PASSES = 2  # of which the quickest counts
RETRIES = 6  # passes more, where others took part of each
LONG_SECONDS = 0.02  # a pass as long as this is the only one
OTHER = dict(attention="mlp", mlp="attention")


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


def as_merged(arch: Arch, branch: str, block: nn.Module, batch: int, tokens: int, total: int) -> nn.Module:
    """A block as it is timed on `tokens` of `total`: attention on groups by content knows how large they are."""
    biased = branch == "attention" and arch.merge == "content" and tokens < total
    return OnGroups(block, batch, tokens, total) if biased else block


class Bench:
    """The branches of one architecture at a grid of widths, measured through the modules that the compact model uses.

    Keys are those of `points.branches` and ("overhead", "EMB_96"): what is outside the blocks. The full-width block is
    the reference, measured again and again in between: it tells the machine's drift, and when others use it.

    grid: points of embed, heads, qk, v, mlp and maybe tokens.
    """

    def __init__(
        self,
        arch: Arch,
        grid: dict[str, list[int]],
        batch: int,
        device: str,
        dtype: str,
        compiled: bool,
    ) -> None:
        parent = arch.skeleton
        self._begin(parent, batch, device, dtype, compiled)
        self.arch, self.dims = arch, (dims := arch.dims)
        tokens = dims.blocks[0].tokens
        counts = grid.get("tokens", [tokens])
        streams = {(e, n): self._random(batch, n, e) for e in grid["embed"] for n in counts}  # B N E
        pool = _Pool(2 * sum(p.numel() + 64 for p in parent.blocks.parameters()), self.device, self.dtype)
        planned = list(branches(grid, tokens))
        for embed in grid["embed"]:
            chosen = [(key, d) for key, e, d in planned if e == embed and key[0] != "tokens"]
            modules = _without_storage(arch, embed, [replace(d, tokens=tokens) for _, d in chosen])
            kinds: dict[tuple[str, int], list[nn.Module]] = {}
            for (key, d), module in zip(chosen, modules, strict=True):
                module = as_merged(arch, key[0], pool.fill(module), batch, d.tokens, tokens)
                kinds.setdefault((key[0], d.tokens), []).append(module.to(self.device, self.dtype))
                others = kinds.setdefault((OTHER[key[0]], d.tokens), [])
                self._points[key] = module, streams[embed, d.tokens], others, streams[embed, d.tokens]
            others, stream = kinds["mlp", tokens], streams[embed, tokens]
            for key, d in ((key, d) for key, e, d in planned if e == embed and key[0] == "tokens"):
                merging = arch.build(ViTDims(embed, (d,))).blocks[0].to(self.device, self.dtype).eval()
                self._points[key] = merging, stream, others, stream
            outside = arch.build(ViTDims(embed, ())).to(self.device, self.dtype).eval()
            key = "overhead", f"EMB_{embed}"
            self._points[key] = outside, self.images, others, stream
        block = _without_storage(arch, dims.embed, dims.blocks[:1])
        self._reference = caller(pool.fill(block), self._random(batch, tokens, dims.embed), compiled=False)
        with torch.inference_mode():
            warm_up(self._reference, self.device, WARM_UP[device])

    def _begin(self, parent: nn.Module, batch: int, device: str, dtype: str, compiled: bool) -> None:
        """What does not depend on the grid: conditions, clock and images."""
        self.device, self.dtype, self.at_once = torch.device(device), DTYPES[dtype], compiled
        self.clock: list[float] = []  # seconds of the reference
        self.taken = self.disturbed = 0  # samples, and those of them of which others took part
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
        with Watch(self.device) as watch:
            self.clock.append(self._quickest(lambda: watch.time(self._reference), PASSES))
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
        call = caller(module, x, self.at_once)
        quickest = warm_up(call, self.device, calls=1 + self.at_once)
        repeats = max(1, math.ceil(PASS_SECONDS[self.device.type] / quickest))

        passes = PASSES if quickest < LONG_SECONDS else 1

        samples = []
        with Watch(self.device) as watch:

            def take() -> Sample:
                random.choice(others)(stream)
                return watch.time(call, repeats)

            for _ in range(count):
                if time.perf_counter() >= self._due:
                    self.tick()
                samples.append((self._quickest(take, passes), len(self.clock) - 1))
        return samples

    def _quickest(self, take: Callable[[], Sample], passes: int) -> float:
        """Seconds of the quickest undisturbed of some passes; where each is disturbed, of the least of a few more."""
        taken = [take() for _ in range(passes)]
        while len(taken) < passes + RETRIES and all(sample.is_disturbed for sample in taken):
            taken.append(take())
        clean = [sample for sample in taken if not sample.is_disturbed]
        self.taken += 1
        self.disturbed += not clean
        return min(clean).seconds if clean else min(taken, key=lambda sample: sample.lost).seconds


def _without_storage(arch: Arch, embed: int, blocks: Iterable[BlockDims]) -> nn.Sequential:
    with torch.device("meta"):
        return arch.build(ViTDims(embed, tuple(blocks))).blocks.eval()
