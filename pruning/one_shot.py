"""One-shot pruning as values: one analysis of a model, and from it any size.

What is priced, the aligned weights and the calibration images do not depend on the target. A further target costs an
allocation (seconds) and a refit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from latency.table import LatencyTable
from models.compact import compact
from models.dims import ViTDims
from models.masks import Masks
from pruning.allocation import allocate
from pruning.objective import PREDICTIONS, Objective
from pruning.pricing import price
from pruning.probe import Prices, measure_prices
from pruning.refit import refit_
from pruning.targets import CLOSE, next_aim

PRICING: dict[str, Callable[..., Prices]] = dict(gradient=price, measured=measure_prices)
ROUNDS = 6  # of aiming at a measured ratio


class NotReached(ValueError):
    """No widths meet the target; one line says by how much it is missed."""


class Choice(NamedTuple):
    """Widths, and the divergence predicted for them, in the objective's unit."""

    dims: ViTDims
    predicted: float


class Pruned(NamedTuple):
    """A compact refitted model, its masks over the dense one, and its divergence on images that no fit has seen."""

    model: VisionTransformer
    masks: Masks
    divergence: float


@dataclass(frozen=True)
class Analysis:
    """What one-shot pruning knows before it is given a target.

    dense: aligned (`pruning.align`), full-size, in eval mode, without gradients; images: this process's calibration
    images (n, 3, H, W), read `batch` at a time; groups: units per group, by axis; grid: rows and columns of patches
    where token counts are pruned too.
    """

    dense: VisionTransformer
    images: Tensor
    groups: dict[str, int]
    prices: Prices
    batch: int
    objective: Objective = PREDICTIONS
    grid: tuple[int, int] | None = None

    def choose(self, table: LatencyTable, target: float) -> Choice:
        """The best widths at a predicted ratio of at most `target` to the dense latency. Raises NotReached."""
        choices = allocate(table, self.dense.dims, self.groups, *self.prices, target)
        if not choices:
            raise NotReached(f"target {target:.4g} not reached: by the table, no widths are as quick")
        return Choice(*choices[0])

    def choose_measured(
        self,
        table: LatencyTable,
        target: float,
        measure: Callable[[ViTDims], float],
        progress: Callable[[str], None] = lambda line: None,
    ) -> Choice:
        """Widths whose measured ratio is at most `target`, and within CLOSE of it if a few rounds of aiming get there.

        measure: the measured ratio of widths to the dense model. The next aim is where `next_aim` has it. Raises
        NotReached.
        """
        tried: dict[ViTDims, tuple[float, Choice]] = {}
        points: list[tuple[float, float]] = []
        aim = target
        for _ in range(ROUNDS):
            try:
                choice = self.choose(table, aim)
            except NotReached:
                if not tried:
                    raise
                break
            if choice.dims in tried:
                break
            ratio = measure(choice.dims)
            tried[choice.dims] = ratio, choice
            points.append((table.ratio(choice.dims, self.dense.dims), ratio))
            progress(f"aimed at {aim:.4f}: measured {ratio:.4f}")
            if target - CLOSE <= ratio <= target:
                return choice
            aim = next_aim(points, target - CLOSE / 2)
        met = [pair for pair in tried.values() if pair[0] <= target]
        if not met:
            least = min(ratio for ratio, _ in tried.values())
            raise NotReached(
                f"target {target:.4g} not reached as measured: {least:.4f} is the lowest ratio in {len(tried)} aims"
            )
        ratio, choice = max(met, key=lambda pair: pair[0])
        progress(f"{ratio:.4f} is the closest below {target:.4g} that was measured")
        return choice

    def cut(self, dims: ViTDims) -> Pruned:
        """The model at these widths, refitted. The analysis stays as it is."""
        masks = Masks.first(self.dense.dims, dims, next(self.dense.parameters()).device, self.grid)
        small = compact(self.dense, masks)
        divergence = refit_(self.dense, small, masks, self.images, self.batch, self.objective)
        return Pruned(small, masks, divergence)


def analyse(
    dense: VisionTransformer,
    images: Tensor,
    groups: dict[str, int],
    batch: int,
    objective: Objective = PREDICTIONS,
    pricing: str = "gradient",
    grid: tuple[int, int] | None = None,
) -> Analysis:
    """Price every width of an aligned model: `Analysis`."""
    with torch.no_grad():
        prices = PRICING[pricing](dense, images, groups, batch, objective)
    return Analysis(dense, images, groups, prices, batch, objective, grid)
