"""NViT's global pruning: every axis in one ranking by saliency - lambda x latency, until a latency target is met.

arXiv 2110.04869, section 3.3 and Eq. 7. Deviations from the published code: only live units are ranked, each event
removes the number of groups it was asked for, differences of latency are monotone (noise in a table never rewards
keeping), widths are fresh in the stop test, and the last group is chosen so that the result lands as close below the
target as the lowest-ranked groups allow.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from latency.table import LatencyTable
from models.dims import ViTDims
from models.masks import Masks

COLUMNS = ("embed", "heads", "qk", "v", "mlp")  # of LatencyTable.blocks_seconds
LAST_CANDIDATES = 32  # lowest-ranked axes that the last group of a run may come from


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


def narrowed(dims: ViTDims, axis: str, units: int) -> ViTDims:
    """`dims` with `units` fewer on one axis."""
    if axis == "embed":
        return replace(dims, embed=dims.embed - units)
    _, block, kind = axis.split(".")
    blocks = list(dims.blocks)
    blocks[int(block)] = replace(blocks[int(block)], **{kind: getattr(blocks[int(block)], kind) - units})
    return replace(dims, blocks=tuple(blocks))


def _widths(dims: ViTDims) -> np.ndarray:
    return np.array([(dims.embed, b.heads, b.qk, b.v, b.mlp) for b in dims.blocks], dtype=float)


def latency_per_unit(table: LatencyTable, dims: ViTDims, group_sizes: dict[str, int]) -> dict[str, float]:
    """Seconds of model latency that one unit of each axis costs at `dims`, never negative.

    The finite difference over the group that would go next, per unit (published: over one unit; on a grid no finer than
    the groups the two are equal, on a finer one this sees the steps of the device).
    """
    base = _widths(dims)
    depth = len(base)
    names = [[kind if kind == "embed" else f"blocks.{i}.{kind}" for kind in COLUMNS] for i in range(depth)]
    sizes = np.array([[group_sizes[name] for name in row] for row in names])
    removed = np.minimum(sizes, np.maximum(base - sizes, 0))  # blocks x columns; at the floor of one group, nothing
    queries = [base] + [base - removed * (np.arange(len(COLUMNS)) == column) for column in range(len(COLUMNS))]
    seconds = table.blocks_seconds(np.concatenate(queries), monotone=True).reshape(len(queries), depth)
    saved = np.maximum(seconds[0] - seconds[1:], 0).T  # blocks x columns
    per_unit = np.divide(saved, removed, out=np.zeros_like(saved), where=removed > 0)
    costs = dict(zip(sum(names, []), per_unit.flatten().tolist(), strict=True))
    costs["embed"] = per_unit[:, 0].sum()
    if units := int(removed[0, 0]):
        outside = table.overhead_seconds(dims.embed) - table.overhead_seconds(dims.embed - units)
        costs["embed"] += max(outside, 0.0) / units
    return costs


class GlobalPruner:
    """Chooses what to remove at each event, and removes it from the masks.

    table, dense: predict the latency ratio; group_sizes: units per group and the floor of each axis (one group stays);
    regularization: lambda, in squared loss per second; target: ratio to stop at, None for never; per_event: groups
    removed by one event; cap: most units removed in all.
    """

    def __init__(self, masks: Masks, table: LatencyTable, group_sizes: dict[str, int], *, regularization: float,
                 target: float | None, per_event: int, cap: int | None = None) -> None:  # fmt: skip
        self.masks, self.table, self.dense = masks, table, masks.full
        self.group_sizes, self.regularization = group_sizes, regularization
        self.target, self.per_event, self.cap = target, per_event, cap

    @property
    def ratio(self) -> float:
        """Predicted latency of what is left, relative to the dense model."""
        return self.table.ratio(self.masks.dims, self.dense)

    @property
    def reached(self) -> bool:
        """Whether the target is met."""
        return self.target is not None and self.ratio <= self.target

    def floor(self) -> ViTDims:
        """The smallest architecture that pruning may reach: one group of every axis."""
        blocks = [
            replace(b, **{a: min(getattr(b, a), self.group_sizes[f"blocks.{i}.{a}"]) for a in COLUMNS[1:]})
            for i, b in enumerate(self.dense.blocks)
        ]
        return ViTDims(self.group_sizes["embed"], tuple(blocks))

    @property
    def removed(self) -> int:
        return sum(n - self.masks.alive(axis) for axis, n in self.dense.sizes().items())

    def ranking(self, scores: dict[str, Tensor]) -> list[Group]:
        """Groups that may go, lowest adjusted score first; within an axis always its lowest units first.

        scores: float64 per axis, over all its units. Surviving widths stay multiples of the group size: where an axis
        is none, its first group is the remainder.
        """
        cost = latency_per_unit(self.table, self.masks.dims, self.group_sizes)
        ranked: list[tuple[float, Group]] = []
        for axis, size in self.group_sizes.items():
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
        """Remove the lowest groups. The event in which the target is met removes no group past it."""
        ranked, gone = self.ranking(scores), []
        for group in ranked[: self.per_event]:
            if self.cap is not None and self.removed + len(group.units) > self.cap:
                break
            if self.target is not None and self._ratio_without(group) <= self.target:
                last = self._closest_below(ranked[len(gone) :])
                self.masks.remove(last.axis, last.units.to(self.masks.keep[last.axis].device))
                return Event([*gone, last], self.ratio, True)
            self.masks.remove(group.axis, group.units.to(self.masks.keep[group.axis].device))
            gone.append(group)
        return Event(gone, self.ratio, False)

    def _ratio_without(self, group: Group) -> float:
        return self.table.ratio(narrowed(self.masks.dims, group.axis, len(group.units)), self.dense)

    def _closest_below(self, ranked: list[Group]) -> Group:
        """Of the lowest-ranked axes' next groups, the one that lands closest at or below the target."""
        first: dict[str, Group] = {}
        for group in ranked:
            first.setdefault(group.axis, group)
        candidates = list(first.values())[:LAST_CANDIDATES]
        return max(
            (g for g in candidates if self._ratio_without(g) <= self.target), key=self._ratio_without
        )  # not empty: the group whose removal crossed the target is the first of its axis
