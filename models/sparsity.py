"""2:4 sparsity of a dense model's linear layers: of every four weights in a row, the two largest stay.

Mishra et al., arXiv 2104.08378, as NViT applies it after finetuning. GPUs from compute capability 8.0 on skip the zeros
in half precision, through torch's semi-structured tensors; elsewhere they are zeros and no more.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured


class Packed(nn.Linear):
    """A linear layer whose weights cannot be sliced."""


def two_of_four(weight: Tensor) -> Tensor:
    """(out, in) weights, in a multiple of 4, to a bool mask: True for the two largest magnitudes of each four."""
    fours = weight.detach().abs().reshape(-1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
    return mask.reshape(weight.shape)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in n}


@torch.no_grad()
def sparsify_(model: nn.Module) -> list[str]:
    """Zero two of every four weights of the linear layers in the blocks; returns the layers whose width forbids it."""
    odd = []
    for name, layer in _linears(model).items():
        if layer.in_features % 4:
            odd.append(name)
        else:
            layer.weight.mul_(two_of_four(layer.weight))
    return odd


def has_kernels(device: torch.device) -> bool:
    """Whether the device runs 2:4 sparse matrices faster than dense ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def accelerate(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in half precision whose sparse layers are torch's semi-structured tensors, for a device with kernels."""
    fast = copy.deepcopy(model).to(dtype).eval()
    for layer in _linears(fast).values():
        # torch's kernels take multiples of 32 rows and 64 columns in half precision
        if layer.in_features % 64 == 0 and layer.out_features % 32 == 0:
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
            layer.__class__ = Packed
    return fast
