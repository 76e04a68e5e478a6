"""How many units of each component to remove, so that a MACs budget is met and nothing could be put back.

A component's units, or groups of them, go in the order of its `Ranking`, so a choice is K counts. MACs are those of
`models.macs`, exactly, with the units of every block where the ranking puts them. Published SAViT excludes stem and
classifier from its budget, keeps individuals that miss it, and cuts one unit more than it counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.axes import Axis
from models.count import MacsFormula
from models.dims import ViTDims

WIDTHS = ("embed", "heads", "qk", "v", "mlp")
POINTS = 20_000  # of a grid over counts
POPULATION, KIDS, GENERATIONS = 100, 50, 100  # published


@dataclass(frozen=True)
class Ranking:
    """Units of one component that may go, the least important first, one by one or in groups of an axis.

    axes: the component's axes; axis: (M,) int64, which axis (by position in `axes`) each group is of; unit: (M, units
    of a group) int64, which of its units; scores: (M,) float64, of groups, ascending; total: units of the component,
    N, those that must stay included.
    """

    component: str
    axes: list[str]
    axis: np.ndarray
    unit: np.ndarray
    scores: np.ndarray
    total: int

    @property
    def group(self) -> int:
        """Units that go together."""
        return self.unit.shape[1]

    def removed_per_axis(self) -> np.ndarray:
        """(M + 1, axes): units gone from each axis after the first m of the ranking."""
        gone = np.zeros((len(self.axis) + 1, len(self.axes)), dtype=np.int64)
        gone[np.arange(1, len(gone)), self.axis] = self.group
        return gone.cumsum(0)


@dataclass(frozen=True)
class Objective:
    """Predicted loss increase when the first m_k units of every ranking go: the sum of tables[k][m_k], plus half the
    quadratic form of the removed shares, shares[k][m_k].

    tables, shares: (M_k + 1,) float64 for each component; quadratic: (K, K), symmetric.
    """

    tables: list[np.ndarray]
    shares: list[np.ndarray]
    quadratic: np.ndarray

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """counts: (…, K) int64."""
        separate = sum(table[counts[..., k]] for k, table in enumerate(self.tables))
        shares = np.stack([share[counts[..., k]] for k, share in enumerate(self.shares)], -1)
        return separate + 0.5 * np.einsum("...k,kl,...l->...", shares, self.quadratic, shares)


class Problem:
    """Counts of removed units, their MACs and their predicted loss. budget: MACs of one image that may stay."""

    def __init__(
        self, formula: MacsFormula, dims: ViTDims, rankings: list[Ranking], objective: Objective, budget: int
    ) -> None:
        self.formula, self.rankings, self.objective, self.budget = formula, rankings, objective, budget
        self.most = np.array([len(r.axis) for r in rankings], dtype=np.int64)
        self._full = {w: np.array([getattr(b, w) for b in dims.blocks], dtype=np.int64) for w in WIDTHS[1:]}
        self._full["embed"] = np.int64(dims.embed)
        self._blocks = [np.array([Axis.parse(axis).block or 0 for axis in r.axes]) for r in rankings]
        self._left: list[np.ndarray] = []  # per component (M + 1, L), or (M + 1,) for the embedding
        for ranking, blocks in zip(rankings, self._blocks, strict=True):
            gone = ranking.removed_per_axis()
            left = np.tile(self._full[ranking.component], (len(gone), 1))
            left[:, blocks] -= gone
            self._left.append(left[:, 0] if ranking.component == "embed" else left)
        self.derived = int(np.argmax(self.most))  # the component with the finest steps follows from the budget
        self.free = [k for k in range(len(rankings)) if k != self.derived]

    def macs(self, counts: np.ndarray) -> np.ndarray:
        """counts: (…, K) int64; result (…,) int64."""
        widths = dict(self._full)
        for k, ranking in enumerate(self.rankings):
            widths[ranking.component] = self._left[k][counts[..., k]]
        return sum(self.formula.parts(**widths).values())

    def slack(self, removed: list[np.ndarray], candidates: list[tuple[int, int]]) -> np.ndarray:
        """MACs that the budget has left as it is, then with each candidate, (component, position in its ranking), back.

        removed: (M_k,) bool of every ranking; result (1 + candidates,) int64.
        """
        rows = 1 + len(candidates)
        widths = {w: np.repeat(full[None], rows, 0) for w, full in self._full.items()}
        for k, ranking in enumerate(self.rankings):
            blocks = self._blocks[k][ranking.axis]
            width = widths[ranking.component].reshape(rows, -1)  # the embedding as one block
            width -= ranking.group * np.bincount(blocks[removed[k]], minlength=width.shape[1])
            for row, (component, position) in enumerate(candidates, 1):
                if component == k:
                    width[row, blocks[position]] += ranking.group
        return self.budget - sum(self.formula.parts(**widths).values())

    def complete(self, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(counts (n, K), predicted loss (n,)) for counts (n, K - 1) of all components but the derived one.

        The derived count is the least that meets the budget, by bisection. The loss is infinite where none does, and
        where the others alone remove more than they need to: there, a unit could be put back.
        """
        counts = np.zeros((len(free), len(self.rankings)), dtype=np.int64)
        counts[:, self.free] = free
        low, high = np.zeros(len(free), dtype=np.int64), np.full(len(free), self.most[self.derived])
        while (open_ := low < high).any():
            counts[:, self.derived] = middle = (low + high) // 2
            met = self.macs(counts) <= self.budget
            high = np.where(open_ & met, middle, high)
            low = np.where(open_ & ~met, middle + 1, low)
        counts[:, self.derived] = high
        possible = self.macs(counts) <= self.budget
        for k in self.free:
            back = counts.copy()
            back[:, k] = np.maximum(back[:, k] - 1, 0)
            possible &= (high > 0) | (counts[:, k] == 0) | (self.macs(back) > self.budget)
        return counts, np.where(possible, self.objective(counts), np.inf)


def grid(problem: Problem) -> np.ndarray:
    """Counts (K,) of the least predicted loss: a grid over all components but one, refined down to single units."""
    most = problem.most[problem.free]
    points = max(3, int(POINTS ** (1 / max(1, len(most)))))
    centre, spacing, best_loss = most // 2, np.maximum(most / (points - 1), 1.0), np.inf
    low, high = np.zeros_like(most), most
    best = problem.most.copy()
    while True:
        lines = [np.unique(np.linspace(a, b, points).round().astype(np.int64)) for a, b in zip(low, high, strict=True)]
        free = [mesh.flatten() for mesh in np.meshgrid(*lines, indexing="ij")]
        counts, loss = problem.complete(np.stack(free, 1) if free else np.zeros((1, 0), dtype=np.int64))
        if loss.min() < best_loss:
            best, best_loss = counts[loss.argmin()], loss.min()
            centre = best[problem.free]
        elif (spacing <= 1).all():
            return best
        spacing = np.maximum(spacing / 2, 1.0)
        reach = np.ceil(spacing * (points - 1) / 2).astype(np.int64)
        low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach, most)


def evolution(problem: Problem, seed: int) -> np.ndarray:
    """The published evolutionary search, with the budget enforced: an individual that misses it has no fitness.

    Genes in [0, 1] are the other components' shares of what may go; their mutation strengths evolve with them.
    """
    generator = np.random.default_rng(seed)
    most = problem.most[problem.free]
    genes = np.tile(generator.random(len(most)), (POPULATION, 1))
    strengths = generator.random((POPULATION, len(most)))

    def losses(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return problem.complete((genes * most).astype(np.int64))

    for _ in range(GENERATIONS):
        parents = generator.integers(POPULATION, size=(KIDS, 2))
        first = generator.random((KIDS, len(most))) < 0.5
        kids = np.where(first, genes[parents[:, 0]], genes[parents[:, 1]])
        spread = np.where(first, strengths[parents[:, 0]], strengths[parents[:, 1]])
        spread = np.maximum(spread + generator.uniform(-0.5, 0.5, spread.shape), 0)
        kids = (kids + spread * generator.standard_normal(kids.shape)).clip(0, 1)
        genes, strengths = np.concatenate([genes, kids]), np.concatenate([strengths, spread])
        order = losses(genes)[1].argsort(kind="stable")[:POPULATION]
        genes, strengths = genes[order], strengths[order]
    counts, loss = losses(genes[:1])
    if np.isinf(loss[0]):
        raise ValueError("the evolutionary search met no individual within the budget; --search grid finds one")
    return counts[0]


SEARCHES: dict[str, Callable[[Problem, int], np.ndarray]] = dict(
    grid=lambda problem, seed: grid(problem), evolution=evolution
)


def restore_units(problem: Problem, counts: np.ndarray) -> list[np.ndarray]:
    """Which units of each ranking go, (M_k,) bool, once every unit that still fits into the budget is back.

    counts: (K,), how many went at first. Of what fits, the unit with the largest predicted gain per MAC comes first.
    """
    counts = counts.copy()
    removed = [np.arange(most) < count for most, count in zip(problem.most, counts, strict=True)]
    while True:
        candidates = [
            (k, int(gone[ranking.axis[gone] == axis][-1]))  # the best that is gone from each axis
            for k, ranking in enumerate(problem.rankings)
            for gone in [removed[k].nonzero()[0]]
            for axis in np.unique(ranking.axis[gone])
        ]
        now, *then = problem.slack(removed, candidates)
        fewer = np.maximum(counts - np.eye(len(counts), dtype=np.int64), 0)
        gains = problem.objective(counts) - problem.objective(fewer)
        fitting = [
            (gains[k] / max(now - slack, 1), position, k)
            for (k, position), slack in zip(candidates, then, strict=True)
            if slack >= 0
        ]
        if not fitting:
            return removed
        _, position, k = max(fitting)
        removed[k][position] = False
        counts[k] -= 1
