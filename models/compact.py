"""From a masked full-size model to the dense model of the widths that are left, and back."""

from __future__ import annotations

import torch

from models.arch import Arch, Model, build_empty
from models.exact import full_float32
from models.masks import Masks
from models.tokens import layers


@torch.no_grad()
def compact(model: Model, masks: Masks) -> Model:
    """The dense model that computes what the masked `model` computes (to rounding), on its device, in its mode.

    A block without heads or without MLP units loses that branch, its bias included.
    """
    reference = next(model.parameters())
    small = build_empty(Arch.of_model(model), masks.dims, reference.device).to(reference.dtype)
    source = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if name in source:  # all but what merges tokens by a mask
            parameter.copy_(masks.cut(name, source[name]))
            parameter.requires_grad_(source[name].requires_grad)
    if masks.grid:
        masks.install_tokens_(small)
    else:
        for i, tokens in layers(small):
            tokens.load_state_dict(model.blocks[i].tokens.state_dict())
    return small.train(model.training)


@torch.inference_mode()
@full_float32()
def difference(model: Model, small: Model) -> float:
    """Relative difference of the logits of a masked model and its compact one on random images, both in eval mode."""
    shape = (4, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    masked = model(images)
    return float((small(images) - masked).norm() / masked.norm().clamp_min(1e-12))


@torch.no_grad()
def expand_(model: Model, masks: Masks, small: Model) -> None:
    """Write a compact model's weights into the masked full-size `model`: the inverse of `compact`."""
    compacted = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(masks.paste(name, compacted[name], parameter)) if name in compacted else parameter.zero_()
    if not masks.grid:
        for i, tokens in layers(model):
            tokens.load_state_dict(small.blocks[i].tokens.state_dict())
    masks.install_(model)
