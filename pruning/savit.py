"""SAViT (NeurIPS 2022): heads, MLP, embedding (and QK and V widths) pruned together, to a MACs target.

First-order scores of gates rank the units inside a component (Eq. 13); how much of each component goes is chosen by the
predicted loss of removing shares rho_k of all components at once (Eq. 2-12), under the budget. Deviations from the
published code: protected units keep their identity and really stay, the budget is met and used to the last unit, every
pair of blocks counts in the interactions, and with no interactions the individual scores decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.axes import Axis
from models.dims import ViTDims
from models.masks import Masks
from pruning.gates import Gates, axes_of_component
from pruning.macs_search import SEARCHES, Objective, Problem, Ranking, restore_units

METHODS = {2: "squares of batch gradients", 3: "squares of image gradients"}
FORMULAS = ("joint", "paper", "published")
NEVER_EMPTY = ("embed", "qk", "v")  # a model has a residual stream, and a head has widths


@dataclass(frozen=True)
class Importance:
    """What one pass over the data tells about the units.

    scores: by axis, (units,) float64, the mean of squared gate gradients; gradients: by axis, the mean gate gradient;
    fisher: by axis, the mean over images of its square, which estimates the Hessian's diagonal (Eq. 13);
    hessian: S_kl over `components`, (K, K) float64, or None; error: the standard error of each of its entries.
    """

    components: tuple[str, ...]
    method: int
    scores: dict[str, Tensor]
    gradients: dict[str, Tensor]
    fisher: dict[str, Tensor]
    hessian: Tensor | None = None
    error: Tensor | None = None

    def only(self, components: tuple[str, ...]) -> Importance:
        """That of some of its components, in their order. Raises ValueError for one that was not scored."""
        if missing := [c for c in components if c not in self.components]:
            raise ValueError(f"no importance of {', '.join(missing)}: scored were {', '.join(self.components)}")
        rows = [self.components.index(c) for c in components]
        parts = {
            name: None if value is None else value[rows][:, rows]
            for name, value in dict(hessian=self.hessian, error=self.error).items()
        }
        return replace(self, components=components, **parts)

    def without_interactions(self) -> Importance:
        return replace(self, hessian=None, error=None)


class Scores:
    """Sums over batches, as one vector that processes can add up: batches, loss, scores, gradients, Fisher information.

    method: 2 squares the gradient of a batch's mean loss (Taylor-2), 3 averages the squares of its images' gradients.
    """

    def __init__(self, dims: ViTDims, components: tuple[str, ...], method: int) -> None:
        self.components, self.method = components, method
        sizes = dims.sizes()
        self.sizes = {axis: sizes[axis] for c in components for axis in axes_of_component(dims, c)}
        self.sums = torch.zeros(2 + 3 * sum(self.sizes.values()), dtype=torch.float64)

    def measure(self, gates: Gates, images: int, loss: Callable[[], Tensor]) -> Tensor:
        """One batch's summand. loss: its mean loss, in a forward pass of the model that `gates` is attached to."""
        like = next(gates.model.parameters())
        gates.values = {
            axis: torch.ones(images, n, device=like.device, dtype=like.dtype, requires_grad=True)
            for axis, n in self.sizes.items()
        }
        value = loss()
        gradients = torch.autograd.grad(value, list(gates.values.values()))
        each = torch.cat([g.double() for g in gradients], 1).cpu()  # images x units, of the mean loss
        total = each.sum(0)
        fisher = (images * each).square().mean(0)
        scores = total.square() if self.method == 2 else fisher
        return torch.cat([torch.tensor([1.0, float(value.detach())], dtype=torch.float64), scores, total, fisher])

    def per_component(self, measured: Tensor) -> list[Tensor]:
        """The scores in a summand, one vector per component, its axes behind one another."""
        lengths = [sum(n for axis, n in self.sizes.items() if Axis.parse(axis).kind == c) for c in self.components]
        return list(measured[2 : 2 + sum(lengths)].split(lengths))

    def add(self, measured: Tensor) -> None:
        self.sums += measured

    @property
    def loss(self) -> float:
        """Mean over the batches."""
        return float(self.sums[1] / self.sums[0])

    def importance(self, hessian: Tensor | None = None, error: Tensor | None = None) -> Importance:
        """Means over what was added. Raises ValueError where a score is not finite."""
        scores, gradients, fisher = (
            dict(zip(self.sizes, part.split(list(self.sizes.values())), strict=True))
            for part in (self.sums[2:] / self.sums[0]).chunk(3)
        )
        if odd := [axis for axis, values in scores.items() if not torch.isfinite(values).all()]:
            raise ValueError(f"the importance of {odd[0]} is not finite")
        if hessian is not None and not torch.isfinite(hessian).all():
            raise ValueError("the interactions between components are not finite")
        return Importance(self.components, self.method, scores, gradients, fisher, hessian, error)


def floor_of(component: str, units: int, share: float | None) -> int:
    """Units of one axis that must stay: a share of them and at least one; share None: as few as a model can have."""
    if share is None:
        return 1 if component in NEVER_EMPTY else 0
    return min(units, max(1, int(share * units)))


def group_of(component: str, multiple: int) -> int:
    """Units of a component that go together, so that widths end at multiples; heads go one by one."""
    return 1 if component == "heads" else multiple


def floor_dims(dims: ViTDims, components: tuple[str, ...], share: float | None, multiple: int = 1) -> ViTDims:
    """The smallest architecture that the floors leave; units go in groups of `multiple`."""

    def least(component: str, units: int) -> int:
        group = group_of(component, multiple)
        return units - (units - floor_of(component, units, share)) // group * group

    blocks = [
        replace(
            b,
            **{c: least(c, getattr(b, c)) for c in components if c != "embed" and (b.mlp if c == "mlp" else b.heads)},
        )
        for b in dims.blocks
    ]
    return ViTDims(least("embed", dims.embed) if "embed" in components else dims.embed, tuple(blocks))


def rank(
    importance: Importance, component: str, dims: ViTDims, share: float | None, norm: int | None, multiple: int = 1
) -> Ranking:
    """Units of a component in the order they go, over all blocks; the best of every axis, up to its floor, stay.

    norm: 1 or 2 divides the scores of every axis by their L1 or L2 norm (published `normalize_by_layer`). multiple: the
    units of an axis, heads apart, go in groups of so many, neighbours in its order, with the sum of their scores.
    """
    axes, group = axes_of_component(dims, component), group_of(component, multiple)
    scored, places, members = [], [], []
    for position, axis in enumerate(axes):
        scores = importance.scores[axis].numpy()
        if norm is not None:
            scores = scores / max(np.linalg.norm(scores, norm), np.finfo(float).tiny)
        may_go = (len(scores) - floor_of(component, len(scores), share)) // group * group
        units = scores.argsort(kind="stable")[:may_go].reshape(-1, group)
        scored.append(scores[units].sum(1))
        places.append(np.full(len(units), position))
        members.append(units)
    score, axis, unit = (np.concatenate(parts) for parts in (scored, places, members))
    order = score.argsort(kind="stable")
    total = sum(len(importance.scores[axis]) for axis in axes)
    return Ranking(component, axes, axis[order], unit[order], score[order], total)


def published_sizes(dims: ViTDims, hessian_embed: float) -> dict[str, float]:
    """By what the published code divides 1'H1: c x block pairs, with c = (D, 4 D, D x L x hessian_embed)."""
    depth = len(dims.blocks)
    hidden = max(b.mlp for b in dims.blocks)
    return dict(heads=dims.embed * depth, mlp=hidden * depth, embed=dims.embed * depth * hessian_embed)


def _per_unit(ranking: Ranking, values: dict[str, Tensor]) -> np.ndarray:
    """(M,) sums of a ranking's groups of units, from one vector per axis."""
    result = np.empty(len(ranking.axis))
    for position, axis in enumerate(ranking.axes):
        here = ranking.axis == position
        result[here] = values[axis].numpy()[ranking.unit[here]].sum(1)
    return result


def _total(ranking: Ranking, values: dict[str, Tensor]) -> float:
    """Over the whole component, what must stay included."""
    return sum(float(values[axis].sum()) for axis in ranking.axes)


def _running(values: np.ndarray) -> np.ndarray:
    """(M + 1,): the sum of the first m."""
    return np.concatenate([[0.0], values.cumsum()])


def objective(
    importance: Importance,
    rankings: list[Ranking],
    dims: ViTDims,
    *,
    formula: str = "joint",
    linear: bool = False,
    hessian_embed: float = 6.0,
) -> Objective:
    """Predicted loss of removing m_k units of every component, to second order: 1/2 dw'H dw, with `linear` + g'dw.

    paper: 1/2 sum_kl S_kl rho_k rho_l with rho_k = m_k / N_k, as if the removed units were a random sample (Eq. 8-12).
    joint: what goes is the least important, not a random sample. So the diagonal of H is each unit's own, `fisher` f_i,
    and what else is in S_kl goes by the removed share sigma_k of the component's root scores:
    1/2 sum_i f_i + 1/2 sum_kl (S_kl - [k = l] sum of f over k) sigma_k sigma_l.
    published: as paper, with S_kl divided by `published_sizes` and no linear term.
    With no interactions: the sum of the removed units' scores. Raises ValueError for a component that the published
    formula does not know.
    """
    if importance.hessian is None:
        shares = [np.zeros(len(r.axis) + 1) for r in rankings]
        return Objective([_running(r.scores) for r in rankings], shares, np.zeros((len(rankings),) * 2))
    quadratic = importance.hessian.numpy()
    shares = [r.group * np.arange(len(r.axis) + 1) / r.total for r in rankings]
    separate = [np.zeros(len(r.axis)) for r in rankings]
    if formula == "joint":
        roots = {axis: scores.sqrt() for axis, scores in importance.scores.items()}
        tiny = np.finfo(float).tiny
        shares = [_running(_per_unit(r, roots)) / max(_total(r, roots), tiny) for r in rankings]
        separate = [_per_unit(r, importance.fisher) / 2 for r in rankings]
        quadratic = quadratic - np.diag([_total(r, importance.fisher) for r in rankings])
    if formula == "published":
        sizes = published_sizes(dims, hessian_embed)
        if unknown := [r.component for r in rankings if r.component not in sizes]:
            raise ValueError(f"--hessian_formula published has no weight for {', '.join(unknown)}")
        c = np.array([sizes[r.component] for r in rankings])
        quadratic = 2 * quadratic / np.outer(c, c)
    elif linear:
        separate = [s - _per_unit(r, importance.gradients) for s, r in zip(separate, rankings, strict=True)]
    return Objective([_running(s) for s in separate], shares, quadratic)


def choose(
    problem: Problem, dims: ViTDims, search: str = "grid", seed: int = 0, device: torch.device | str = "cpu"
) -> Masks:
    """Masks of the searched counts, with every unit put back that still fits into the budget.

    Raises ValueError where the search finds nothing.
    """
    removed = restore_units(problem, SEARCHES[search](problem, seed))
    masks = Masks(dims, device)
    for ranking, gone in zip(problem.rankings, removed, strict=True):
        for position, axis in enumerate(ranking.axes):
            masks.remove(axis, torch.from_numpy(ranking.unit[gone & (ranking.axis == position)].flatten()).to(device))
    return masks
