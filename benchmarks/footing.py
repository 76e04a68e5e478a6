"""What all methods of the leaderboard share: data, dense model, calibration images, and latency as it is measured.

Data, stopwatch and recipe of finetuning come from `equal_footing.py` of a folder that is named.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latency.cache import find_or_measure
from latency.measure import settle_allocator
from latency.table import LatencyTable
from models import Arch, BlockDims, ViTDims, build_vit
from models.pretrained import load_initial_, read_initial

BATCH, LATENCY_BATCH = 64, 64
CLOSE, VOID = 0.01, 0.015  # from the target: near enough to stop at, and too far to be compared
ENDS, NARROW = ((0.0, 0.0), (1.0, 1.0)), 0.02  # aims and latencies, and a distance between aims
LEAP = 0.6  # of the lowest aim seen, how low the next may be
TRIALS, SEARCHING, FINAL = 9, 5, 15  # models per target; rounds of interleaved measurement of each, and of the last


class Pruner:
    """A method's models of any speed from a bench and a seed; what does not depend on the speed is done once."""

    def __init__(self) -> None:
        self.seen = [*ENDS]  # aims and the latencies that they gave

    def __call__(self, aim: float) -> nn.Module:
        """A model of final widths, the quicker the lower `aim`, in (0, 1]. Raises ValueError where none is so quick."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> nn.Module:
        """`model` after what leaves its widths alone."""
        return model


class Met(NamedTuple):
    """A model, its measured latency relative to the dense one, and the machine's load average while measuring."""

    model: nn.Module
    latency: float
    load: float


def dims_of(model: nn.Module) -> ViTDims:
    """Widths, of peers' models too."""
    if hasattr(model, "dims"):
        return model.dims
    tokens = model.pos_embed.shape[1]
    blocks = (
        BlockDims(b.attn.num_heads, b.attn.head_dim, b.attn.head_dim, len(b.mlp.fc1.weight), tokens)
        for b in model.blocks
    )
    return ViTDims(model.patch_embed.proj.out_channels, tuple(blocks))


def next_aim(seen: list[tuple[float, float]], target: float) -> float:
    """Where a line through the nearest aims around the target meets it, not too near to either, and no leap downwards:
    far below what a method can do, Torch-Pruning leaves layers whole that it would empty, and is slow again.

    Aims that come too near to one another without meeting it were measured wrongly: they are forgotten, in `seen` too.
    """
    low = max(point for point in seen if point[1] <= target)
    high = min(point for point in seen if point[1] > target and point[0] > low[0])
    if high[0] - low[0] < NARROW and len(seen) > 2:
        seen[:] = [point for point in seen if point not in (low, high) or point in ENDS]
        return next_aim(seen, target)
    share = (target - low[1]) / (high[1] - low[1])
    aim = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
    return max(aim, LEAP * high[0]) if low == ENDS[0] else aim


class Bench:
    """Data, dense model and latency.

    base: checkpoint of the dense model; folder: where equal_footing.py lies; table: latency table that methods choose
    by, None for one that is measured and kept; calib: calibration images; per_class: training images of each class;
    every: of the validation images, each so many-th counts.
    """

    def __init__(
        self,
        base: str,
        folder: Path,
        table: str | None = None,
        calib: int = 1024,
        per_class: int | None = None,
        every: int = 1,
    ) -> None:
        sys.path.insert(0, str(folder))
        import equal_footing

        self.ef, self.path, self.calib, self.per_class = equal_footing, base, calib, per_class
        self.arch, self.kwargs, self.state = read_initial(base)
        self.base = equal_footing.load_base(base)
        self.train = equal_footing.load_split("train")
        self.val = tuple(part[::every] for part in equal_footing.load_split("val"))
        if table:
            self.table = LatencyTable.load(table)
        else:
            self.table = find_or_measure(Arch.of(self.arch, **self.kwargs), LATENCY_BATCH, progress=print)
        settle_allocator()

    @functools.cached_property
    def recovery(self) -> tuple[Tensor, Tensor]:
        """Images and labels of finetuning."""
        return self.ef.load_split("train", self.per_class)

    def model(self, **kwargs: Any) -> nn.Module:
        """The dense model as one of this project's, with further arguments."""
        model = build_vit(self.arch, **self.kwargs, **kwargs)
        load_initial_(model, self.state, self.path)
        return model.eval()

    def calibration(self, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 images and labels, as the seed chooses."""
        pick = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))[: self.calib]
        return self.train[0][pick], self.train[1][pick]

    def images(self, seed: int) -> Tensor:
        """Calibration images as the model takes them."""
        return self.ef.normalise(self.calibration(seed)[0])

    def top1(self, model: nn.Module) -> float:
        """Percent."""
        return self.ef.top1(model, *self.val)

    def latency(self, model: nn.Module, rounds: int) -> float:
        """Relative to the dense model, the two interleaved."""
        return self.ef.latency_ratio(self.base, model, batch=LATENCY_BATCH, rounds=rounds, repeats=1)[0]

    def meet(self, make: Pruner, target: float) -> Met:
        """The model whose measured latency is nearest to the target, of a few, by false position over the aim.

        An aim at which a method fails counts as too low. Raises ValueError where it failed at all of them.
        """
        best, failure = None, ""
        for _ in range(TRIALS):
            aim = next_aim(make.seen, target)
            try:
                model = make(aim)
            except Exception as error:  # noqa: BLE001  methods fail at some aims in ways of their own
                failure = f"{type(error).__name__}: {error}"
                make.seen.append((aim, 0.0))
                continue
            latency = self.latency(model, SEARCHING)
            if near := abs(latency - target) <= CLOSE:
                latency = self.latency(model, FINAL)
            make.seen.append((aim, latency))
            if best is None or abs(latency - target) < abs(best.latency - target):
                best = Met(model, latency, os.getloadavg()[0])
            if near and abs(latency - target) <= VOID:
                break
        if best is None:
            raise ValueError(failure)
        return best
