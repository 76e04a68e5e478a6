"""From samples to a table: parts, then whole models that set its scale, and again where the two disagree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from latency.fit import MOST_ERROR, Measure, correct, fit
from latency.samples import Progress, Source, sample_all
from latency.steady import notes
from latency.table import LatencyTable
from models.swin_dims import Dims


def assemble(
    bench: Source,
    progress: Progress,
    rounds: int,
    dense: Dims,
    chosen: Sequence[Dims],
    measure: Measure,
    *,
    meta: dict[str, Any],
    wanted: int,
    say: Callable[[str], None],
    until: float,
) -> LatencyTable:
    """The table of what `bench` measures, brought to what the `chosen` models measure.

    Where the two disagree by more than `MOST_ERROR`, both are measured once more, unless points are dear. meta: the
    beginning of `_meta`; wanted: threads that were asked for; say: called with a line where there is something to know.
    Raises OutOfTime after `until`, of `time.perf_counter`.
    """
    for attempt in range(2):
        sample_all(bench, progress, rounds * (attempt + 1), until)
        table = LatencyTable.of_parts(progress.seconds(), meta)
        factor, constant, error = fit(table, dense, chosen, measure)
        if error <= MOST_ERROR:
            break
        again = not attempt and not bench.at_once
        more = "; both are measured again" if again else ""
        say(f"parts and whole models disagree by {error:.0%} on average, as on a machine that others use{more}")
        if not again:
            break
    disturbed = getattr(bench, "disturbed", 0) / max(1, getattr(bench, "taken", 0))
    return correct(
        table,
        factor,
        constant,
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        complete=True,
        fit=dict(factor=factor, constant=constant, error=round(error, 4)),
        **notes(wanted, disturbed),
    )
