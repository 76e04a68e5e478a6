"""From a masked full-size model to the dense model of the widths that are left."""
from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

from models.masks import Masks
from models.vit import build_vit


@torch.no_grad()
def compact(model: VisionTransformer, masks: Masks) -> VisionTransformer:
    """The dense model that computes what the masked `model` computes (to rounding), on its device, in its mode.

    A block without heads or without MLP units loses that branch, its bias included.
    """
    small = build_vit(model.arch, masks.dims, **model.arch_kwargs)
    source = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        parameter.copy_(masks.cut(name, source[name]))
        parameter.requires_grad_(source[name].requires_grad)
    reference = next(model.parameters())
    return small.to(device=reference.device, dtype=reference.dtype).train(model.training)
