"""Widths of every block under a latency target: least predicted divergence, by an exact solver on the latency table.

The divergence of a model is predicted as the sum of what each of its cuts costs alone (`pruning.probe`). For every
embedding width, blocks are then independent but for the latency they share: a multiple-choice knapsack, solved by
dynamic programming over discretised latency. Whole branches and blocks are candidates like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latency.stage import ALL
from latency.table import LatencyTable
from models.axes import Axis
from models.dims import BlockDims, ViTDims
from pruning.probe import Curve

LEAST = 1e-9  # nats: what is smaller counts as this
BINS = 20_000  # of the latency budget
DUAL_STEPS = 40  # halvings of the range of a price per second
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


def _attention(full: BlockDims, group: dict[str, int], curves: dict[str, Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of the attention branch: (heads, qk, v), (n, 3), and their divergence; free where `full` has none.

    Prices of qk and v are of all heads: with h of H left they cost h / H of their own.
    """
    if not full.heads:
        return np.zeros((1, 3), dtype=int), np.zeros(1)
    axes = [_widths(getattr(full, axis), group[axis]) for axis in AXES[:3]]
    heads, qk, v = (interpolate(curves[axis], widths) for axis, widths in zip(AXES[:3], axes, strict=True))
    share = axes[0] / full.heads
    cost = heads[:, None, None] + (qk[:, None] + v) * share[:, None, None]
    rows = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return np.insert(rows, 0, 0, axis=0), np.insert(cost.ravel(), 0, _absent(curves["heads"]))


def _mlp(full: BlockDims, group: dict[str, int], curves: dict[str, Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of the MLP branch: widths, (n,), and their divergence; free where `full` has none."""
    if not full.mlp:
        return np.zeros(1, dtype=int), np.zeros(1)
    widths = _widths(full.mlp, group["mlp"])
    cost = interpolate(curves["mlp"], widths)
    return np.insert(widths, 0, 0), np.insert(cost, 0, _absent(curves["mlp"]))


@dataclass(frozen=True)
class Candidates:
    """Of one block: widths and divergence of its branches and token counts, which may be combined in any way."""

    attention: tuple[np.ndarray, np.ndarray]  # (a, 3), (a,)
    mlp: tuple[np.ndarray, np.ndarray]  # (m,), (m,)
    tokens: tuple[np.ndarray, np.ndarray]  # (t,), (t,)

    @classmethod
    def of(cls, full: BlockDims, group: dict[str, int], curves: dict[str, Curve]) -> Candidates:
        """group: units per group, and curves: prices, by axis. Token counts are those of their curve, if any."""
        counts, prices = zip(*_token_counts(full.tokens, curves.get("tokens", {})), strict=True)
        tokens = np.array(counts), np.array(prices)
        return cls(_attention(full, group, curves), _mlp(full, group, curves), tokens)

    def combine(self) -> tuple[np.ndarray, np.ndarray]:
        """Every combination: (n, 5) widths (heads, qk, v, mlp, tokens), and (n,) divergence."""
        (a, ca), (m, cm), (t, ct) = self.attention, self.mlp, self.tokens
        i, j, k = (index.ravel() for index in np.meshgrid(*map(np.arange, map(len, (a, m, t))), indexing="ij"))
        return np.column_stack([a[i], m[j], t[k]]), ca[i] + cm[j] + ct[k]


def drop_dominated(widths: np.ndarray, seconds: np.ndarray, cost: np.ndarray) -> Options:
    """Those candidates that no quicker one beats."""
    order = np.lexsort((cost, seconds))
    best = np.minimum.accumulate(cost[order])
    keep = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return Options(widths[keep], seconds[keep], cost[keep])


class _Times:
    """Seconds of candidates at an embedding width. Blocks of the same widths are looked up once."""

    def __init__(self, table: LatencyTable, embed: int) -> None:
        self.table, self.embed = table, embed
        self._known: dict[tuple, np.ndarray] = {}

    def _look_up(self, key: tuple, widths: np.ndarray, queries: float) -> np.ndarray:
        if key not in self._known:
            rows = np.insert(widths, 0, self.embed, axis=1)
            self._known[key] = self.table.blocks_seconds(np.column_stack([rows, np.full(len(rows), queries)]))
        return self._known[key]

    def options(self, block: BlockDims, of: Candidates) -> Options:
        """The candidates of a block that no other beats in both seconds and divergence."""
        queries = ALL if block.queries is None else block.queries
        if not self.table.branches_apart:
            widths, cost = of.combine()
            return drop_dominated(widths, self._look_up((block, "all"), widths, queries), cost)
        parts = []
        for t, price in zip(*of.tokens, strict=True):
            # seconds of branches add up, and so a dominated branch is in no combination that is not dominated
            (a, ca), (m, cm) = of.attention, of.mlp
            a = np.column_stack([a, np.zeros(len(a)), np.full(len(a), t)]).astype(int)
            m = np.column_stack([np.zeros((len(m), 3)), m, np.full(len(m), t)]).astype(int)
            merging = self._look_up((block, "neither", t), np.array([[0, 0, 0, 0, t]]), queries)[0]
            first = drop_dominated(a, self._look_up((block, "attention", t), a, queries), ca)
            second = drop_dominated(m, self._look_up((block, "mlp", t), m, queries) - merging, cm)
            i, j = (index.ravel() for index in np.indices((len(first.cost), len(second.cost))))
            widths = first.widths[i]
            widths[:, 3] = second.widths[j, 3]
            parts.append((widths, first.seconds[i] + second.seconds[j], first.cost[i] + second.cost[j] + price))
        return drop_dominated(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def least_cost(options: list[Options], budget: float) -> float:
    """A lower bound of the cost of `knapsack`, by Lagrangian relaxation; infinite where nothing fits.

    For any price per second, the sum over blocks of the least (cost + price x seconds), minus price x budget, is below
    the cost of every choice within the budget.
    """
    if budget <= 0 or sum(block.seconds[0] for block in options) > budget:
        return np.inf
    low, high, bound = -40.0, 40.0, sum(block.cost.min() for block in options)
    for _ in range(DUAL_STEPS):
        price = np.exp((low + high) / 2)
        best = [int((block.cost + price * block.seconds).argmin()) for block in options]
        cost = sum(block.cost[k] for block, k in zip(options, best, strict=True))
        over = sum(block.seconds[k] for block, k in zip(options, best, strict=True)) - budget
        bound = max(bound, cost + price * over)
        low, high = ((low + high) / 2, high) if over > 0 else (low, (low + high) / 2)
    return float(bound)


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
    """The best widths at a predicted ratio of at most `target` to the dense model's latency.

    groups: units per group, by axis; curves, embed: prices from `pruning.pricing`. Blocks keep the queries of `full`,
    which the dense model does without. Returns (widths, predicted divergence), the best first, without embedding widths
    that a lower bound rules out; nothing where no widths are quick enough. Raises LatencyTableError.
    """
    budget = target * table.model_seconds(full.with_queries(None))
    blocks = [
        Candidates.of(block, {kind: groups[str(Axis(kind, i))] for kind in AXES}, prices)
        for i, (block, prices) in enumerate(zip(full.blocks, curves, strict=True))
    ]
    problems = []
    widths = _widths(full.embed, groups["embed"])
    for E, price in zip(widths.tolist(), interpolate(embed, widths).tolist(), strict=True):
        times, left = _Times(table, E), budget - table.overhead_seconds(E)
        options = [times.options(block, of) for block, of in zip(full.blocks, blocks, strict=True)]
        problems.append((least_cost(options, left) + price, E, price, options, left))
    choices: list[tuple[ViTDims, float]] = []
    for bound, E, price, options, left in sorted(problems, key=lambda problem: problem[0]):
        if bound >= min([np.inf, *(cost for _, cost in choices)]):
            break
        try:
            chosen, cost = knapsack(options, left)
        except ValueError:
            continue
        picked = (o.widths[k].tolist() for o, k in zip(options, chosen, strict=True))
        dims = (BlockDims(*w, queries=b.queries) for w, b in zip(picked, full.blocks, strict=True))
        choices.append((ViTDims(E, tuple(dims)), cost + price))
    return sorted(choices, key=lambda pair: pair[1])
