"""Selection by value: what costs the least saliency per second of latency goes first, whole branches included.

No lambda weighs saliency against latency, so nothing has to be tuned to the scale of either. The event in which the
latency target is met is then solved exactly, over everything that was left when it began (`pruning.allocation`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from latency.stage import block_rows
from models.axes import Axis
from models.dims import ViTDims
from pruning.allocation import allocate
from pruning.global_latency import BRANCHES, COLUMNS, Event, GlobalPruner, Group
from pruning.probe import Curve


class ValuePruner(GlobalPruner):
    """As `GlobalPruner`, but for the ranking, which is by saliency over seconds saved; for whole branches, which may
    go; and for the last event, which is exact where latency is the only target.

    Costs are looked up again after every group. An axis may offer several groups at once: as many as make the best
    ratio, so that a step of the device is crossed where a single group saves nothing.
    """

    def floor(self) -> ViTDims:
        """The smallest architecture that pruning may reach: no blocks, one group of the embedding."""
        return replace(super().floor(), blocks=tuple(replace(b, heads=0, mlp=0) for b in self.masks.full.blocks))

    def _orders(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per axis that is left, its surviving units, lowest score first. Raises ValueError for scores not finite."""
        orders = {}
        for axis in self.group_sizes:
            alive = self.masks.keep[axis].cpu().nonzero().flatten()
            if not torch.isfinite(values := scores[axis][alive]).all():
                raise ValueError(f"saliency of {axis} is not finite")
            if self._is_used(axis):
                orders[axis] = alive[values.argsort(stable=True)]
        return orders

    def _widths(self, axis: str, alive: int) -> np.ndarray:
        """What an axis may be cut to, widest first: multiples of its group, and nothing where that ends a branch."""
        size = self.group_sizes[axis]
        least = 0 if Axis.parse(axis).kind in BRANCHES else size
        return np.arange((alive - 1) // size * size, least - 1, -size)

    def _seconds_saved(self, axis: str, alive: int, widths: np.ndarray) -> np.ndarray:
        """Seconds of the model that an axis saves at each of the widths, never negative."""
        dims = self.masks.dims
        rows = block_rows(dims.embed, dims.blocks)
        kind, block, _ = Axis.parse(axis)
        if block is not None:
            rows = rows[[block]]
        rows = np.tile(rows, (1 + len(widths), 1, 1))  # widths x blocks x columns
        rows[1:, :, COLUMNS.index(kind)] = (widths + (self.masks.prefix if kind == "tokens" else 0))[:, None]
        seconds = self.table.blocks_seconds(rows, monotone=True).sum(1)
        if axis == "embed":
            seconds += [self.table.overhead_seconds(int(width)) for width in (alive, *widths)]
        return np.maximum(seconds[0] - seconds[1:], 0)

    def ranking(self, scores: dict[str, Tensor]) -> list[Group]:
        """The best cut of every axis, the least saliency per second first. scores: as for `GlobalPruner`."""
        ranked = []
        for axis, order in self._orders(scores).items():
            alive = len(order)
            if not len(widths := self._widths(axis, alive)):
                continue
            lost = scores[axis][order].cumsum(0).numpy()[alive - widths - 1]
            saved = self._seconds_saved(axis, alive, widths)
            value = np.divide(lost, saved, out=np.full(len(widths), math.inf), where=saved > 0)
            best = int(value.argmin())
            group = Group(axis, order[: alive - widths[best]], float(lost[best]))
            ranked.append((float(value[best]), group.score, group))
        return [group for *_, group in sorted(ranked, key=lambda item: item[:2])]

    def event(self, scores: dict[str, Tensor]) -> Event:
        """Remove what has the least value per second; where that meets the targets, the best that does."""
        before = {axis: keep.clone() for axis, keep in self.masks.state_dict().items()}
        gone, budget = [], self.per_event
        while budget > 0 and (ranked := self.ranking(scores)):
            group, reached = self._next(ranked)
            if self.cap is not None and self.removed + len(group.units) > self.cap:
                break
            self._remove(group)
            gone.append(group)
            budget -= math.ceil(len(group.units) / self.group_sizes[group.axis])
            if reached:
                return Event(self._solve(scores, before) or gone, self.ratio, True)
        return Event(gone, self.ratio, False)

    def _remove(self, group: Group) -> None:
        self.masks.remove(group.axis, group.units.to(self.masks.keep[group.axis].device))

    def _solve(self, scores: dict[str, Tensor], before: dict[str, Tensor]) -> list[Group] | None:
        """Replace what an event removed by the least saliency that meets the latency target; None: no such widths.

        before: the masks at the beginning of the event.
        """
        if len(self.targets) > 1 or self.cap is not None or self.targets[0].flag != "--latency_target":
            return None
        greedy = {axis: keep.clone() for axis, keep in self.masks.state_dict().items()}
        self.masks.load_state_dict(before)
        orders = self._orders(scores)
        kept = self._allocate(scores, orders, self.masks.dims)
        cut = {axis: order[: len(order) - kept[axis]] for axis, order in orders.items() if kept}
        groups = [Group(axis, units, float(scores[axis][units].sum())) for axis, units in cut.items() if len(units)]
        for group in groups:
            self._remove(group)
        if not groups or self.excess(self.masks.dims) > 1:
            self.masks.load_state_dict(greedy)
            return None
        return groups

    def _allocate(self, scores: dict[str, Tensor], orders: dict[str, Tensor], now: ViTDims) -> dict[str, int]:
        """Units to keep of every axis that is left; empty where no widths are quick enough."""
        total = sum(float(scores[axis][order].sum()) for axis, order in orders.items())

        def curve(axis: str) -> Curve:
            if axis not in orders:
                return {}
            alive = len(order := orders[axis])
            lost = np.concatenate([[0.0], scores[axis][order].cumsum(0).numpy()]) / max(total, np.finfo(float).tiny)
            offset = self.masks.prefix if Axis.parse(axis).kind == "tokens" else 0
            return {offset + alive: 0.0} | {offset + int(w): float(lost[alive - w]) for w in self._widths(axis, alive)}

        curves = [{kind: curve(str(Axis(kind, i))) for kind in COLUMNS[1:]} for i in range(len(now.blocks))]
        target = (
            self.targets[0].limit
            * self.table.model_seconds(self.dense)
            / self.table.model_seconds(now.with_queries(None))
        )
        choices = allocate(self.table, now, self.group_sizes, curves, curve("embed"), target)
        if not choices:
            return {}
        kept = self.masks.units(choices[0][0])
        return {
            axis: kept[axis] if kept[axis] or Axis.parse(axis).kind in BRANCHES else len(orders[axis])
            for axis in orders
        }
