"""How components of a ViT interact: the curvature of the loss along whole components, and how well it is known.

SAViT (NeurIPS 2022, Eq. 2-12) needs N_k N_l u_kl, the sum of w_i h_ij w_j over all units i of component k and j of l,
with unit gates w = 1: S_kl = 1' H_kl 1. That is the Hessian of the loss in K numbers, the common gate of each
component, so one Hessian-vector product per component gives a whole row over all pairs of blocks. The published code
draws one pair of blocks, l_j <= l_i, per entry and batch, and reads the upper triangle of nine products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.vit import Attention
from pruning.gates import Gates, axes_of_component

FORMS = ("exact", "finite")
STEP = 4e-3  # of the common gate, in finite differences


def _set_common_gates(gates: Gates, components: tuple[str, ...], alpha: Tensor) -> None:
    dims = gates.model.dims
    sizes = dims.sizes()
    gates.values = {
        axis: value.expand(1, sizes[axis])
        for component, value in zip(components, alpha, strict=True)
        for axis in axes_of_component(dims, component)
    }


def component_hessian(
    gates: Gates, components: tuple[str, ...], loss: Callable[[], Tensor], form: str = "exact"
) -> Tensor:
    """S_kl of one batch, (K, K) float64 on the CPU.

    loss: the batch's loss in a forward pass of the model that `gates` is attached to. `exact` differentiates twice
    (attention as plain matrix products: the fused kernels have no second derivative); `finite` takes central
    differences of the gradient, 2 K ordinary backward passes in the memory of one.
    """
    like = next(gates.model.parameters())
    if form == "finite":
        rows = []
        for direction in torch.eye(len(components), device=like.device, dtype=like.dtype):
            ends = []
            for step in (STEP, -STEP):
                alpha = (1 + step * direction).requires_grad_()
                _set_common_gates(gates, components, alpha)
                ends.append(torch.autograd.grad(loss(), alpha)[0].double())
            rows.append((ends[0] - ends[1]) / (2 * STEP))
    else:
        alpha = torch.ones(len(components), device=like.device, dtype=like.dtype, requires_grad=True)
        _set_common_gates(gates, components, alpha)
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(loss(), alpha, create_graph=True)
            last = len(components) - 1
            rows = [torch.autograd.grad(g, alpha, retain_graph=k < last)[0].double() for k, g in enumerate(gradient)]
    hessian = torch.stack(rows).cpu()
    return (hessian + hessian.T) / 2


@dataclass
class SampledMean:
    """Mean over batches of a (K, K) matrix, with the standard error of every entry.

    Batches are packed with `pack` and added, over processes too, before `merge` takes them in: the result does not
    depend on who saw which batch.
    """

    size: int

    def __post_init__(self) -> None:
        self.sums = torch.zeros(1 + 2 * self.size**2, dtype=torch.float64)  # count, sums, sums of squares

    @staticmethod
    def pack(value: Tensor) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), value.flatten(), value.flatten().square()])

    def merge(self, packed: Tensor) -> None:
        self.sums += packed

    @property
    def count(self) -> int:
        return int(self.sums[0])

    @property
    def mean(self) -> Tensor:
        return self.sums[1:].view(2, self.size, self.size)[0] / self.count

    @property
    def standard_error(self) -> Tensor:
        """(K, K), from two batches on."""
        squares = self.sums[1:].view(2, self.size, self.size)[1] / self.count
        variance = (squares - self.mean.square()).clamp_min(0) * self.count / (self.count - 1)
        return (variance / self.count).sqrt()

    @property
    def relative_error(self) -> Tensor:
        """Standard error of every entry over its size, or over sqrt(|S_kk S_ll|) where that is larger: an entry of
        nearly 0 needs no more digits than its row and column have."""
        diagonal = self.mean.diagonal().abs()
        scale = torch.maximum(self.mean.abs(), torch.outer(diagonal, diagonal).sqrt())
        return self.standard_error / scale

    @property
    def largest_error(self) -> float:
        """Of `relative_error`; infinite below two batches."""
        return float(self.relative_error.max()) if self.count > 1 else math.inf


@contextmanager
def _record_inputs(model: nn.Module) -> Iterator[dict[str, tuple[nn.Module, Tensor]]]:
    inputs: dict[str, tuple[nn.Module, Tensor]] = {}

    def record(name: str):
        return lambda module, args: inputs.update({name: (module, args[0].detach())})

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, Attention) or not list(module.children())
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def without_second_derivative(model: nn.Module, images: Tensor) -> str | None:
    """Name and class of the first layer that cannot be differentiated twice, None where all can.

    images: (B, 3, S, S), for one forward pass; each layer is then tried alone on its own input.
    """
    with _record_inputs(model) as inputs, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    for name, (module, x) in inputs.items():
        x = x.clone().requires_grad_()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
                torch.autograd.grad(gradient.square().sum(), x)
        except (RuntimeError, NotImplementedError):
            return f"{name} ({type(module).__name__})"
    return None
