"""Second moments of a layer's inputs and targets over calibration images, and what follows from them in closed form.

Least squares, the error that any weights leave, and the joint cost of removing inputs once the others have adapted, all
from sums that ranks can add up. Sums and solutions are float64.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the variance of each input
PRECISION = 1e-6  # of the targets' second moment: an error below is rounding, of products in float32
PLAIN_RIDGE = 1e-4  # where nothing chooses
FLOOR = 1e-7  # of the largest eigenvalue or variance: what is below counts as this
TINY = 1e-30


def all_reduced(value: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


class Moments:
    """Sums over rows, for inputs x (n) and targets t (m): of x [x, t]^T, of [x, t], and of t squared."""

    def __init__(self, inputs: int, targets: int = 0, device: torch.device | str = "cpu") -> None:
        zeros = dict(dtype=torch.float64, device=device)
        self.inputs = inputs
        self.products = torch.zeros(inputs, inputs + targets, **zeros)
        self.sums, self.squares = torch.zeros(inputs + targets, **zeros), torch.zeros(targets, **zeros)
        self.rows = torch.zeros((), **zeros)

    def add(self, x: Tensor, target: Tensor | None = None) -> None:
        """Rows of inputs (..., n) and of targets (..., m)."""
        both = (x if target is None else torch.cat([x, target], -1)).flatten(0, -2).float()
        self.products += (both[:, : self.inputs].T @ both).double()
        self.sums += both.sum(0, dtype=torch.float64)
        self.squares += both[:, self.inputs :].square().sum(0, dtype=torch.float64)
        self.rows += len(both)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.inputs, len(self.squares), self.rows.device)
        for name in ("products", "sums", "squares", "rows"):
            getattr(total, name).copy_(getattr(self, name) + getattr(other, name))
        return total

    def all_reduce(self) -> Moments:
        """Add up what the ranks have seen."""
        for value in (self.products, self.sums, self.squares, self.rows):
            all_reduced(value)
        return self

    @property
    def mean(self) -> Tensor:
        """Of inputs and targets: (n + m,)."""
        return self.sums / self.rows

    @property
    def covariance(self) -> Tensor:
        """Of the inputs with inputs and targets: (n, n + m)."""
        return self.products / self.rows - torch.outer(self.mean[: self.inputs], self.mean)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean over rows of the squared distance of weight x + bias to t."""
        n = self.inputs
        gram, cross = self.covariance.split([n, len(self.squares)], 1)
        spread = (self.squares / self.rows - self.mean[n:].square()).sum()
        offset = weight @ self.mean[:n] - self.mean[n:] + (0 if bias is None else bias)
        return float(((weight @ gram - 2 * cross.T) * weight).sum() + spread + offset.square().sum())


def _penalty(gram: Tensor, ridge: float) -> Tensor:
    """Relative to every input's variance: (..., n, n)."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return (diagonal * ridge + diagonal.amax(-1, keepdim=True) * FLOOR + TINY).diag_embed()


def corrected(weight: Tensor, bias: Tensor | None, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Weights (m, n) and bias plus their ridge-regressed correction towards the targets; the bias is not penalised."""
    n = moments.inputs
    second = moments.products / moments.rows if bias is None else moments.covariance
    gram, cross = second[:, :n], second[:, n:]
    fitted = weight + torch.linalg.solve(gram + _penalty(gram, ridge), cross - gram @ weight.T).T
    return fitted, None if bias is None else moments.mean[n:] - fitted @ moments.mean[:n]


def correct_(linear: nn.Linear, fit: Moments, held: Moments) -> tuple[float, float]:
    """Correct a layer towards its targets; returns its squared error on the `held` rows before and after.

    The ridge that is best there is then used on all rows. Weights that none improves stay, and so do those whose error
    is no more than rounding.
    """
    present = [None if p is None else p.detach().double() for p in (linear.weight, linear.bias)]
    before = held.error(*present)
    if before <= PRECISION * float(held.squares.sum() / held.rows):
        return before, before
    after, ridge = min((held.error(*corrected(*present, fit, ridge)), ridge) for ridge in RIDGES)
    if not after < before:
        return before, before
    set_(linear, *corrected(*present, fit + held, ridge))
    return before, after


def set_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)


def compensated(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's weights (m, n) on the inputs `kept` (indices), which take over what the others carried: (m, k).

    Ridge regression of the layer's own output on the inputs' moments; exact when nothing is cut.
    """
    n = moments.inputs
    second = (moments.products / moments.rows if bias is None else moments.covariance)[:, :n]
    cut = torch.ones(n, dtype=torch.bool, device=weight.device).index_fill_(0, kept, False)
    gram = second[kept][:, kept]
    carried = second[cut][:, kept] @ torch.linalg.inv(gram + _penalty(gram, PLAIN_RIDGE))  # cut x kept
    fitted = weight[:, kept] + weight[:, cut] @ carried
    if bias is not None:
        mean = moments.mean[:n]
        bias = bias + weight @ mean - fitted @ mean[kept]
    return fitted, bias


def removal(covariance: Tensor, weight: Tensor, group: int = 1) -> Tensor:
    """Inputs, or groups of `group` neighbours, in the order of their worth: the first is the last that would go.

    Greedy backward elimination by the squared error of the layers' outputs once the remaining weights have adapted (the
    Schur complement of the covariance). covariance: (L, n, n) of the inputs of L layers that lose the same inputs;
    weight: (L, m, n). Long lists go in 128 steps.
    """
    n, device = covariance.shape[-1], covariance.device
    inverse = torch.linalg.inv(covariance + _penalty(covariance, PLAIN_RIDGE))
    weight = weight.detach().double()
    alive = torch.arange(n // group, device=device)
    step = max(1, len(alive) // 128)
    order = []
    while len(alive):
        L, A = len(inverse), len(alive)
        blocks = inverse.view(L, A, group, A, group).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # L A g g
        columns = weight.view(L, -1, A, group).permute(0, 2, 3, 1)  # L A g m
        cost = (torch.linalg.solve(blocks, columns) * columns).sum((0, 2, 3))  # A
        gone = cost.argsort()[:step]
        order.append(alive[gone].flip(0))
        units = (gone[:, None] * group + torch.arange(group, device=device)).flatten()
        stays = torch.ones(A * group, dtype=torch.bool, device=device).index_fill_(0, units, False)
        across = inverse[:, units][:, :, stays]
        share = torch.linalg.solve(inverse[:, units][:, :, units], across)  # minus what the others take over
        weight = weight[:, :, stays] - weight[:, :, units] @ share
        inverse = inverse[:, stays][:, :, stays] - across.mT @ share
        alive = alive[stays.view(-1, group)[:, 0]]
    return torch.cat(order[::-1])
