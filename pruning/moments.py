"""Second moments of a layer's inputs and targets over calibration images, and what follows from them in closed form.

Least squares, the error that any weights leave, and the joint cost of removing inputs once the others have adapted, all
from sums that ranks can add up. Sums and solutions are float64.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the variance of each input
PLAIN_RIDGE = 1e-4  # where nothing chooses
ROUNDING = 1e-6  # relative error of sums of products in float32
RESOLUTION = 1e-6  # of an input relative to its root mean square: what varies less is rounding of its own
AS_GOOD = 1e-3  # relative difference between held-out errors that is no reason for a smaller ridge
FLOOR = 1e-7  # of the largest eigenvalue or variance: what is below counts as this
TINY = 1e-30


def all_reduced(value: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


class Moments:
    """Sums over rows of inputs x (n) and targets t (m): of x [x, t]^T, of [x, t], and of t squared, about a shift.

    The shift is the mean of the first rows. Products are taken in float32 (float64 for such rows), and about the shift
    they keep the precision of the variance, however far the mean is from 0; the sums are float64. Moments of different
    shifts can be added: (x - a)(x - a)^T follows from the sums about b (Chan, Golub and LeVeque 1983).
    """

    def __init__(self, inputs: int, targets: int = 0, device: torch.device | str = "cpu") -> None:
        zeros = dict(dtype=torch.float64, device=device)
        self.inputs = inputs
        self.products = torch.zeros(inputs, inputs + targets, **zeros)
        self.sums, self.squares = torch.zeros(inputs + targets, **zeros), torch.zeros(targets, **zeros)
        self.shift, self.rows = torch.zeros(inputs + targets, **zeros), torch.zeros((), **zeros)
        self._shifted = False  # `rows` would have to come from the device

    def add(self, x: Tensor, target: Tensor | None = None) -> None:
        """Rows of inputs (..., n) and of targets (..., m)."""
        both = (x if target is None else torch.cat([x, target], -1)).flatten(0, -2)
        both = both if both.dtype == torch.float64 else both.float()
        if not self._shifted:
            self._shifted = True
            self.shift.copy_(both.mean(0, dtype=torch.float64).to(both.dtype))  # subtracted without rounding
        both = both - self.shift.to(both.dtype)
        self.products += (both[:, : self.inputs].T @ both).double()
        self.sums += both.sum(0, dtype=torch.float64)
        self.squares += both[:, self.inputs :].square().sum(0, dtype=torch.float64)
        self.rows += len(both)

    def about(self, shift: Tensor) -> Moments:
        """The same rows' moments about another shift (n + m,)."""
        n, moved = self.inputs, self.shift - shift
        shifted = Moments(n, len(self.squares), shift.device)
        cross = torch.outer(moved[:n], self.sums) + torch.outer(self.sums[:n], moved)
        shifted.products.copy_(self.products + cross + self.rows * torch.outer(moved[:n], moved))
        shifted.sums.copy_(self.sums + self.rows * moved)
        shifted.squares.copy_(self.squares + (2 * self.sums + self.rows * moved)[n:] * moved[n:])
        shifted.shift.copy_(shift)
        shifted.rows.copy_(self.rows)
        shifted._shifted = True
        return shifted

    def __add__(self, other: Moments) -> Moments:
        big, small = (self, other) if self.rows >= other.rows else (other, self)
        total, small = big.about(big.shift), small.about(big.shift)
        for name in ("products", "sums", "squares", "rows"):
            getattr(total, name).add_(getattr(small, name))
        return total

    def all_reduce(self) -> Moments:
        """Add up what the ranks have seen."""
        if not dist.is_initialized():
            return self
        common = all_reduced(self.shift * self.rows) / all_reduced(self.rows.clone()).clamp_min(1)
        moved = self.about(common)
        for name in ("products", "sums", "squares", "rows"):
            getattr(self, name).copy_(all_reduced(getattr(moved, name)))
        self.shift.copy_(common)
        return self

    @property
    def mean(self) -> Tensor:
        """Of inputs and targets: (n + m,)."""
        return self.shift + self.sums / self.rows

    @property
    def covariance(self) -> Tensor:
        """Of the inputs with inputs and targets: (n, n + m)."""
        offset = self.sums / self.rows
        return self.products / self.rows - torch.outer(offset[: self.inputs], offset)

    @property
    def second_moment(self) -> Tensor:
        """As `covariance`, about 0."""
        return self.covariance + torch.outer(self.mean[: self.inputs], self.mean)

    @property
    def spread(self) -> Tensor:
        """The sum of the targets' variances."""
        offset = self.sums[self.inputs :] / self.rows
        return (self.squares / self.rows - offset.square()).sum()

    def energy(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean over rows of the squared norm of weight x + bias."""
        n = self.inputs
        offset = weight @ self.mean[:n] + (0 if bias is None else bias)
        return float(((weight @ self.covariance[:, :n]) * weight).sum() + offset.square().sum())

    def rounding(self, weight: Tensor) -> float:
        """What `error` cannot resolve at these weights."""
        variance = self.covariance.diagonal().clamp_min(0)
        return ROUNDING * float((weight.square() @ variance).sum() + self.spread)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean over rows of the squared distance of weight x + bias to t; at least what rounding leaves of it."""
        n = self.inputs
        gram, cross = self.covariance.split([n, len(self.squares)], 1)
        offset = weight @ self.mean[:n] - self.mean[n:] + (0 if bias is None else bias)
        error = float(((weight @ gram - 2 * cross.T) * weight).sum() + self.spread + offset.square().sum())
        return max(error, self.rounding(weight))


def _penalty(gram: Tensor, ridge: float, mean: Tensor | None = None) -> Tensor:
    """Relative to every input's variance: (..., n, n). mean: of the inputs, whose rounding counts as variance too."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    noise = 0 if mean is None else (RESOLUTION * mean).square()
    return (diagonal * ridge + diagonal.amax(-1, keepdim=True) * FLOOR + noise + TINY).diag_embed()


def correct(weight: Tensor, bias: Tensor | None, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Weights (m, n) and bias plus their ridge-regressed correction towards the targets; the bias is not penalised."""
    n = moments.inputs
    second = moments.second_moment if bias is None else moments.covariance
    gram, cross = second[:, :n], second[:, n:]
    penalty = _penalty(gram, ridge, moments.mean[:n])
    fitted = weight + torch.linalg.solve(gram + penalty, cross - gram @ weight.T).T
    return fitted, None if bias is None else moments.mean[n:] - fitted @ moments.mean[:n]


def correct_(linear: nn.Linear, fit: Moments, held: Moments) -> tuple[float, float]:
    """Correct a layer towards its targets; returns its squared error on the `held` rows before and after.

    The largest ridge that does as well there as the best is then used on all rows. Weights that none improves stay, and
    so do those whose error is no more than rounding. A correction that lowers the root of the error from a to b moves
    the outputs by a + b at most, so by less than 2 a: one that moves them further owes its error to rounding, and is
    refused.
    """
    present = [None if p is None else p.detach().double() for p in (linear.weight, linear.bias)]
    before = held.error(*present)
    if before <= held.rounding(present[0]):
        return before, before
    errors = {}
    for ridge in RIDGES:
        weight, bias = correct(*present, fit, ridge)
        change = weight - present[0], None if bias is None else bias - present[1]
        if held.energy(*change) <= 4 * before:
            errors[ridge] = held.error(weight, bias)
    best = min(errors.values(), default=before)
    if not best < before:
        return before, before
    ridge = max(ridge for ridge, error in errors.items() if error <= (1 + AS_GOOD) * best)
    set_(linear, *correct(*present, fit + held, ridge))
    return before, errors[ridge]


def set_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)


def compensate(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's weights (m, n) on the inputs `kept` (indices), which take over what the others carried: (m, k).

    Ridge regression of the layer's own output on the inputs' moments; exact when nothing is cut.
    """
    n = moments.inputs
    second = (moments.second_moment if bias is None else moments.covariance)[:, :n]
    cut = torch.ones(n, dtype=torch.bool, device=weight.device).index_fill_(0, kept, False)
    gram = second[kept][:, kept]
    carried = second[cut][:, kept] @ torch.linalg.inv(
        gram + _penalty(gram, PLAIN_RIDGE, moments.mean[kept])
    )  # cut x kept
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
