"""Budgets that pruning must come down to: latency as a share or in milliseconds, MACs, parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latency.table import LatencyTable
from models.arch import Arch
from models.swin_dims import Dims

LEAST_STEP = 0.5  # of the last aim
CLOSE = 0.01  # how far below a measured target is close enough


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
        unit = f"ms per batch of {table.meta.get('batch', 'unknown size')} on {table.device or 'its device'}"
        targets.append(Target("--latency_target_ms", latency_ms, unit, lambda d: 1e3 * table.model_seconds(d)))
    counts = (("--macs_target", "MACs", macs_, "macs"), ("--params_target", "parameters", params_, "params"))
    for flag, unit, limit, count in counts:
        if limit is not None:
            number = limit if limit > 1 else limit * getattr(arch.plain, count)(dense)
            targets.append(Target(flag, number, unit, getattr(arch, count)))
    return targets


def next_aim(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """The predicted ratio at which `wanted` will be measured, from (predicted, measured) ratios so far; at most 1.

    A factor and an offset: the line through the two nearest points, one on either side of `wanted` where there are. The
    dense model, of which both are 1, is a point, too. At least half of the last prediction: a line may be far off.
    """
    known = {(1.0, 1.0), *points}
    above = sorted((point for point in known if point[1] > wanted), key=lambda point: point[1])
    below = sorted((point for point in known if point[1] <= wanted), key=lambda point: -point[1])
    near = [*above[:1], *below[:1]] if above and below else (above or below)[:2]
    (p, m), (q, n) = near if len(near) == 2 else (points[-1], points[-1])
    last, measured = points[-1]
    rises = (q - p) * (n - m) > 0  # else it is noise, or the same point
    aim = p + (wanted - m) * (q - p) / (n - m) if rises else last * wanted / measured
    return min(1.0, max(aim, LEAST_STEP * last))
