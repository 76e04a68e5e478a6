"""NViT's global pruning: every axis in one ranking by saliency - lambda x latency, until a latency target is met.

arXiv 2110.04869, section 3.3 and Eq. 7. Deviations from the published code: only live units are ranked, each event
removes the number of groups it was asked for, differences of latency are monotone (noise in a table never rewards
keeping), widths are fresh in the stop test, and the last group is chosen so that the result lands as close below the
target as the lowest-ranked groups allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latency.stage import StageTable, block_rows
from latency.table import LatencyTable
from models.axes import Axis
from models.dims import ViTDims
from models.masks import Masks
from models.swin_dims import Dims
from pruning.targets import Target, latency_share

COLUMNS = ("embed", "heads", "qk", "v", "mlp", "tokens")  # of LatencyTable.blocks_seconds
BRANCHES = ("heads", "mlp")
LAST_CANDIDATES = 32  # lowest-ranked axes that the last group of a run may come from
CLOSE = 0.002  # relative distance below a target at which a run may end while there is a choice


@dataclass(frozen=True)
class Group:
    """Units of one axis that go together; score is the sum of theirs, latency-adjusted."""

    axis: str
    units: Tensor
    score: float


@dataclass(frozen=True)
class Event:
    """What one pruning event removed, and the predicted latency ratio to the dense model after it."""

    groups: list[Group]
    ratio: float
    reached: bool


def narrow(dims: Dims, axis: str, units: int) -> Dims:
    """`dims` with `units` fewer on one axis."""
    return dims.resized({axis: dims.width(axis) - units})


def latency_per_unit(table: LatencyTable, dims: Dims, group_sizes: dict[str, int]) -> dict[str, float]:
    """Seconds of model latency that one unit of each axis costs at `dims`, never negative.

    The finite difference over the group that would go next, per unit (published: over one unit; on a grid no finer than
    the groups the two are equal, on a finer one this sees the steps of the device). For a block with all its tokens it
    is the mean over half of them: the first that goes has to be merged and put back, which costs more than it saves.
    An embedding also costs what is outside the blocks, and the downsampling on both sides of its stage.
    """
    costs = {}
    for prefix, part, stage in zip(dims.prefixes, table.stages, dims.stages, strict=True):
        sizes = {axis.removeprefix(prefix): n for axis, n in group_sizes.items() if axis.startswith(prefix)}
        costs |= {prefix + axis: cost for axis, cost in _per_unit_of_stage(part, stage, sizes).items()}
        embed = f"{prefix}embed"
        if (units := min(sizes["embed"], stage.embed - sizes["embed"])) > 0:
            outside = part.overhead_seconds(stage.embed) - part.overhead_seconds(stage.embed - units)
            between = table.merging_seconds(dims) - table.merging_seconds(narrow(dims, embed, units))
            costs[embed] += (max(outside, 0.0) + max(between, 0.0)) / units
    return costs


def _per_unit_of_stage(table: StageTable, dims: ViTDims, group_sizes: dict[str, int]) -> dict[str, float]:
    """As `latency_per_unit`, of the blocks of one stage."""
    rows = block_rows(dims.embed, dims.blocks)
    base, width = rows[:, : len(COLUMNS)], len(COLUMNS)
    names = [[str(Axis(kind, None if kind == "embed" else i)) for kind in COLUMNS] for i in range(len(base))]
    sizes = np.array([[group_sizes.get(name, 0) for name in row] for row in names]).reshape(-1, width)
    tokens = base[:, -1]
    sizes[:, -1] = np.where((tokens == table.tokens) & (sizes[:, -1] > 0), tokens // 2, sizes[:, -1])
    removed = np.minimum(sizes, np.maximum(base - sizes, 0))  # blocks x columns; at the floor of one group, nothing
    points = np.tile(rows, (1 + width, 1, 1))
    for column in range(width):
        points[1 + column, :, column] -= removed[:, column]
    seconds = table.blocks_seconds(points, monotone=True)
    saved = np.maximum(seconds[0] - seconds[1:], 0).T  # blocks x columns
    per_unit = np.divide(saved, removed, out=np.zeros_like(saved), where=removed > 0)
    costs = dict(zip(sum(names, []), per_unit.flatten().tolist(), strict=True))
    return {name: cost for name, cost in costs.items() if name in group_sizes} | dict(embed=per_unit[:, 0].sum())


class GlobalPruner:
    """Chooses what to remove at each event, and removes it from the masks.

    table, dense: predict the latency ratio; group_sizes: units per group and the floor of each axis (one group stays);
    regularization: lambda, in squared loss per second; target: ratio to stop at, None for none; targets: further
    budgets, all of which must be met; dense: what ratios are to, where the model that is pruned is a narrower one;
    per_event: groups removed by one event; cap: most units removed in all.
    """

    def __init__(
        self,
        masks: Masks,
        table: LatencyTable,
        group_sizes: dict[str, int],
        *,
        regularization: float,
        target: float | None,
        per_event: int,
        cap: int | None = None,
        targets: Sequence[Target] = (),
        dense: Dims | None = None,
    ) -> None:
        self.masks, self.table, self.dense = masks, table, dense or masks.full.with_queries(None)
        self.group_sizes, self.regularization = group_sizes, regularization
        self.per_event, self.cap = per_event, cap
        self._predicted = partial(table.ratio, dense=self.dense)
        self.targets = [*targets] if target is None else [latency_share(self._predicted, target), *targets]

    @property
    def ratio(self) -> float:
        """Predicted latency of what is left, relative to the dense model."""
        return self._predicted(self.masks.dims)

    @property
    def reached(self) -> bool:
        """Whether every target is met; False where there is none."""
        return bool(self.targets) and self.excess(self.masks.dims) <= 1

    def excess(self, dims: Dims) -> float:
        """The largest of the targets' values over their limits: at most 1 where all are met. 0 without targets."""
        return max((target.measure(dims) / target.limit for target in self.targets), default=0.0)

    def progress(self) -> str:
        """Every target that is not met, beside where it stands."""
        now = self.masks.dims
        return ", ".join(
            f"{t.flag} {t.limit:g} not reached, now {t.show(t.measure(now))}"
            for t in self.targets
            if t.measure(now) > t.limit
        )

    def floor(self) -> Dims:
        """The smallest architecture that pruning may reach: one group of every axis."""
        sizes = {axis: min(n, self.group_sizes[axis]) for axis, n in self.masks.full.sizes().items()}
        tokens = {a: self.masks.prefix + n for a, n in self.group_sizes.items() if Axis.parse(a).kind == "tokens"}
        return self.masks.full.resized(sizes | tokens)

    @property
    def removed(self) -> int:
        return sum(n - self.masks.alive(axis) for axis, n in self.masks.sizes().items())

    def _is_used(self, axis: str) -> bool:
        """Whether the branch of an axis is left; tokens are used by both branches."""
        block, _, kind = axis.rpartition(".")
        branches = dict(mlp=["mlp"], embed=[], tokens=BRANCHES).get(kind, ["heads"])
        return not branches or any(self.masks.alive(f"{block}.{branch}") for branch in branches)

    def ranking(self, scores: dict[str, Tensor]) -> list[Group]:
        """Groups that may go, lowest adjusted score first; within an axis always its lowest units first.

        scores: float64 per axis, over all its units. Surviving widths stay multiples of the group size: where an axis
        is none, its first group is the remainder.
        """
        cost = latency_per_unit(self.table, self.masks.dims, self.group_sizes)
        ranked: list[tuple[float, Group]] = []
        for axis, size in ((a, n) for a, n in self.group_sizes.items() if self._is_used(a)):
            alive = self.masks.keep[axis].cpu().nonzero().flatten()
            adjusted = scores[axis][alive] - self.regularization * cost[axis]
            if not torch.isfinite(adjusted).all():
                raise ValueError(f"saliency of {axis} is not finite")
            order = adjusted.argsort(stable=True)[: len(alive) - size]
            remainder = len(alive) % size
            rank = -float("inf")
            pieces = [order[:remainder], *order[remainder:].split(size)] if len(order) else []
            for piece in (p for p in pieces if len(p)):
                score = float(adjusted[piece].sum())
                rank = max(rank, score)  # a group never goes before the one below it in its axis
                ranked.append((rank, Group(axis, alive[piece], score)))
        return [group for _, group in sorted(ranked, key=lambda pair: pair[0])]

    def event(self, scores: dict[str, Tensor]) -> Event:
        """Remove the lowest groups. The event in which the targets are met removes no group past them.

        A group that would land further below than `CLOSE` waits while narrower ones can still go.
        """
        left, gone = self.ranking(scores), []
        while left and len(gone) < self.per_event:
            first: dict[str, Group] = {}
            for g in left:
                first.setdefault(g.axis, g)
            group, reached = self._next(list(first.values()))
            if self.cap is not None and self.removed + len(group.units) > self.cap:
                break
            self.masks.remove(group.axis, group.units.to(self.masks.keep[group.axis].device))
            gone.append(group)
            left = [g for g in left if g is not group]
            if reached:
                return Event(gone, self.ratio, True)
        return Event(gone, self.ratio, False)

    def _next(self, ranked: list[Group]) -> tuple[Group, bool]:
        """What goes next, of the next group of every axis, lowest first; and whether the targets are met without it."""
        if not self.targets or self._excess_without(ranked[0]) > 1:
            return ranked[0], False
        excess = [self._excess_without(group) for group in ranked]
        meeting = [i for i in range(len(ranked)) if excess[i] <= 1]
        closest = max(meeting[:LAST_CANDIDATES], key=lambda i: excess[i])
        if excess[closest] < 1 - CLOSE and len(meeting) < len(ranked):
            return next(group for group, e in zip(ranked, excess, strict=True) if e > 1), False
        return ranked[closest], True

    def _excess_without(self, group: Group) -> float:
        return self.excess(narrow(self.masks.dims, group.axis, len(group.units)))
