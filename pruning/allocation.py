"""Widths of every block under a latency target: least predicted divergence, by an exact solver on the latency table.

The divergence of a model is predicted as the sum of what each of its cuts costs alone (`pruning.probe`). For every
embedding width, blocks are then independent but for the latency they share: a multiple-choice knapsack, solved by
dynamic programming over discretised latency. Whole branches and blocks are candidates like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from latency.stage import ALL
from latency.table import LatencyTable
from models.axes import Axis
from models.dims import BlockDims, ViTDims
from pruning.probe import Curve

LEAST = 1e-9  # nats: what is smaller counts as this
BINS = 20_000  # of the latency budget
AXES = ("heads", "qk", "v", "mlp")
TOKEN_COUNTS = 6  # of a block, at most


def interpolate(curve: Curve, widths: np.ndarray) -> np.ndarray:
    """Divergence at any widths: linear in its logarithm between the probed ones, and below them.

    It falls with every unit, if only by rounding, so that units worth nothing stay while there is time for them.
    """
    known = np.array(sorted(set(curve) - {0}), dtype=float)
    prices = np.maximum.accumulate([curve[w] for w in known[::-1]])[::-1]  # a wider axis never costs more
    values = np.log(prices + LEAST * np.exp(1 - known / known[-1]))
    below = (values[1] - values[0]) / (known[1] - known[0]) * np.minimum(widths - known[0], 0) if len(known) > 1 else 0
    return np.exp(np.interp(widths, known, values) + below) - LEAST


def _absent(curve: Curve) -> float:
    """Divergence without the branch: at least that of any width."""
    return max(curve.values()) + (np.e - 1) * LEAST


@dataclass(frozen=True)
class Options:
    """Candidates of one block, none dominated: rows of widths, seconds and divergence; quickest first."""

    widths: np.ndarray  # (n, 5): heads, qk, v, mlp, tokens
    seconds: np.ndarray
    cost: np.ndarray


def _widths(full: int, group: int) -> np.ndarray:
    return np.array(sorted({*range(group, full, group), full}))


def _token_counts(full: int, curve: Curve) -> list[tuple[int, float]]:
    """(tokens, divergence), spread evenly over the counts of the curve; the full count alone where there is none."""
    if not curve:
        return [(full, 0.0)]
    counts = np.array(sorted(curve))
    counts = counts[np.unique(np.linspace(0, len(counts) - 1, TOKEN_COUNTS).round().astype(int))]
    return list(zip(counts.tolist(), interpolate(curve, counts), strict=True))


def candidates(full: BlockDims, group: dict[str, int], curves: dict[str, Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Every combination of a block's branches and tokens, (n, 5), and its predicted divergence.

    A branch that `full` lacks is free. Token counts are those of their curve, which may be absent.
    """
    attention, mlp = [((0, 0, 0), 0.0)], [(0, 0.0)]
    axes = {axis: _widths(getattr(full, axis), group[axis]) for axis in AXES}
    if full.heads:
        (heads, qk, v) = (list(zip(axes[a], interpolate(curves[a], axes[a]), strict=True)) for a in AXES[:3])
        attention = [((0, 0, 0), _absent(curves["heads"]))]
        for (h, ch), (q, cq), (w, cw) in product(heads, qk, v):
            attention.append(((h, q, w), ch + (cq + cw) * h / full.heads))
    if full.mlp:
        mlp = [(0, _absent(curves["mlp"])), *zip(axes["mlp"], interpolate(curves["mlp"], axes["mlp"]), strict=True)]
    tokens = _token_counts(full.tokens, curves.get("tokens", {}))
    rows = [((*a, m, t), ca + cm + ct) for (a, ca), (m, cm), (t, ct) in product(attention, mlp, tokens)]
    return np.array([w for w, _ in rows]), np.array([c for _, c in rows])


def drop_dominated(widths: np.ndarray, seconds: np.ndarray, cost: np.ndarray) -> Options:
    """Those candidates that no quicker one beats."""
    order = np.lexsort((cost, seconds))
    best = np.minimum.accumulate(cost[order])
    keep = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return Options(widths[keep], seconds[keep], cost[keep])


def knapsack(options: list[Options], budget: float) -> tuple[list[int], float]:
    """Choice of one option per block, of least total cost within the budget of seconds, and that cost.

    Exact but for rounding every time up to a twenty-thousandth of the budget. Raises ValueError where nothing fits.
    """
    if budget <= 0:
        raise ValueError("no time is left for the blocks")
    unit = budget / BINS
    best, picks = np.zeros(BINS + 1), []
    for block in options:
        new, pick = np.full(BINS + 1, np.inf), np.zeros(BINS + 1, dtype=np.int32)
        for k, (size, cost) in enumerate(zip(np.ceil(block.seconds / unit).astype(int), block.cost, strict=True)):
            if size <= BINS:
                total = best[: BINS + 1 - size] + cost
                better = total < new[size:]
                new[size:][better], pick[size:][better] = total[better], k
        best = new
        picks.append(pick)
    if not np.isfinite(best[-1]):
        raise ValueError("no combination of widths is within the latency budget")
    chosen, room = [], BINS
    for block, pick in zip(reversed(options), reversed(picks), strict=True):
        chosen.append(int(pick[room]))
        room -= int(np.ceil(block.seconds[chosen[-1]] / unit))
    return chosen[::-1], float(best[-1])


def allocate(
    table: LatencyTable,
    full: ViTDims,
    groups: dict[str, int],
    curves: list[dict[str, Curve]],
    embed: Curve,
    target: float,
) -> list[tuple[ViTDims, float]]:
    """For every embedding width the best widths at a predicted ratio of at most `target` to the dense model's latency.

    groups: units per group, by axis; curves, embed: prices from `pruning.probe`. Blocks keep the queries of `full`,
    which the dense model does without. Returns (widths, predicted divergence), the best first; nothing where no widths
    are quick enough. Raises LatencyTableError.
    """
    budget = target * table.model_seconds(full.with_queries(None))
    rows = [
        candidates(block, {kind: groups[str(Axis(kind, i))] for kind in AXES}, prices)
        for i, (block, prices) in enumerate(zip(full.blocks, curves, strict=True))
    ]
    widths, queries = (
        _widths(full.embed, groups["embed"]),
        [ALL if b.queries is None else b.queries for b in full.blocks],
    )
    choices = []
    for E, price in zip(widths, interpolate(embed, widths), strict=True):
        options = [
            drop_dominated(w, table.blocks_seconds(np.column_stack([np.full(len(w), E), w, np.full(len(w), q)])), c)
            for (w, c), q in zip(rows, queries, strict=True)
        ]
        try:
            chosen, cost = knapsack(options, budget - table.overhead_seconds(int(E)))
        except ValueError:
            continue
        picked = (o.widths[k].tolist() for o, k in zip(options, chosen, strict=True))
        blocks = (BlockDims(*w, queries=b.queries) for w, b in zip(picked, full.blocks, strict=True))
        choices.append((ViTDims(int(E), tuple(blocks)), cost + float(price)))
    return sorted(choices, key=lambda pair: pair[1])
