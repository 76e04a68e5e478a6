"""Norms over the channels of one axis, of which some may be masked: LayerNorm and RMSNorm.

With no mask they are torch's. With a mask (True is keep) of K of n channels they compute of the survivors what a norm
of width K computes, and no gradient reaches a removed channel: survivors are stretched by c = sqrt(n/K), so that
torch's statistics over all n channels are those of the survivors, and the weights are divided by c. What depends on
the mask is in tensors: a compiled model stays valid when more is removed. Published NViT keeps statistics over all
channels while masked, which makes masked and compact differ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = (nn.LayerNorm, timm.layers.RmsNorm)  # by channel, of any model


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose statistics run over the surviving channels only.

    Removed channels take the survivors' mean mu, and survivors are stretched around it: then mean and variance over all
    channels are those of the survivors.
    """

    averager: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("averager", "stretch", "shrink"):
            self.register_buffer(name, None, persistent=False)

    def set_mask(self, keep: Tensor) -> None:
        """keep: (n,) bool, True is keep; where nothing is kept, weights of 0 make the output 0."""
        if keep.all() or not keep.any():
            self.averager = self.stretch = self.shrink = None
            return
        survivors = keep.to(self.weight.dtype)
        self.shrink = survivors.mean().sqrt()  # 1 / c
        self.stretch = survivors / self.shrink
        self.averager = (survivors / survivors.sum()).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.averager is None:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.averager.dtype)
            x = torch.lerp(x @ self.averager, x, self.stretch)  # mu + stretch (x - mu)
            return F.layer_norm(x, self.normalized_shape, self.weight * self.shrink, self.bias, self.eps)


class RmsNorm(timm.layers.RmsNorm):
    """RMSNorm whose mean square runs over the surviving channels only; removed channels count as 0."""

    stretch: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("stretch", "shrink"):
            self.register_buffer(name, None, persistent=False)

    def set_mask(self, keep: Tensor) -> None:
        """keep: (n,) bool, True is keep; where nothing is kept, weights of 0 make the output 0."""
        if keep.all() or not keep.any():
            self.stretch = self.shrink = None
            return
        survivors = keep.to(self.weight.dtype)
        self.shrink = survivors.mean().sqrt()  # 1 / c
        self.stretch = survivors / self.shrink

    def forward(self, x: Tensor) -> Tensor:
        if self.stretch is None:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # fused for one type
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.stretch.dtype) * self.stretch
            return F.rms_norm(x, self.normalized_shape, self.weight * self.shrink, self.eps)


MASKED = (LayerNorm, RmsNorm)


def norm_like(norm: nn.Module) -> partial:
    """What makes norms like timm's `norm`, of any width, that take masks."""
    return partial(RmsNorm if isinstance(norm, timm.layers.RmsNorm) else LayerNorm, eps=norm.eps)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm without its weights and bias."""
    if isinstance(norm, timm.layers.RmsNorm):
        return F.rms_norm(x, norm.normalized_shape, eps=norm.eps)
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
