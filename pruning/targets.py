"""Budgets that pruning must come down to: latency as a share or in milliseconds, MACs, parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from latency.table import LatencyTable
from models.arch import Arch
from models.swin_dims import Dims


@dataclass(frozen=True)
class Target:
    """`measure(dims)` must come down to `limit`, both in `unit`; `flag` names it in messages."""

    flag: str
    limit: float
    unit: str
    measure: Callable[[Dims], float]

    def show(self, value: float) -> str:
        return f"{value:,.0f} {self.unit}" if value >= 10_000 else f"{value:.4g} {self.unit}"

    def check_reachable(self, floor: Dims) -> None:
        """Raises ValueError when even `floor`, the smallest that may be reached, lies above the limit."""
        if self.limit < (lowest := self.measure(floor)):
            raise ValueError(
                f"{self.flag} {self.limit:g} is below {self.show(lowest)}, the least that the group sizes allow"
            )


def latency_share(predicted: Callable[[Dims], float], limit: float) -> Target:
    """The published target: predicted latency over the dense model's."""
    return Target("--latency_target", limit, "of the dense latency", predicted)


def targets_of(
    dense: Dims,
    table: LatencyTable,
    arch: Arch,
    *,
    latency_ms: float | None = None,
    macs_: float | None = None,
    params_: float | None = None,
) -> list[Target]:
    """The targets beside the published one that are not None.

    latency_ms: milliseconds per batch of the table; macs_, params_: a share of the dense model's up to 1, above it the
    number of one image's MACs, or of parameters.
    """
    targets = []
    if latency_ms is not None:
        unit = f"ms per batch of {table.meta.get('batch', 'unknown size')} on {table.meta.get('device', 'its device')}"
        targets.append(Target("--latency_target_ms", latency_ms, unit, lambda d: 1e3 * table.model_seconds(d)))
    counts = (("--macs_target", "MACs", macs_, "macs"), ("--params_target", "parameters", params_, "params"))
    for flag, unit, limit, count in counts:
        if limit is not None:
            number = limit if limit > 1 else limit * getattr(arch.plain, count)(dense)
            targets.append(Target(flag, number, unit, getattr(arch, count)))
    return targets
