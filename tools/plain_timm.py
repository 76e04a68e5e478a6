"""A compact model as a plain timm Vision Transformer, which has one set of widths for all blocks.

Narrower blocks are padded with zeros, so that the function stays the same and the cost is that of the widest block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from models import BlockDims, Masks, ModelError, ViTDims, build_vit
from models.arch import Arch
from models.compact import expand_
from models.norms import NORMS
from models.parents import skeleton


def uniform_dims(dims: ViTDims) -> ViTDims:
    """The narrowest widths that timm can express and that hold `dims`: heads x width is the embedding.

    Raises ModelError where there are none.
    """
    heads = max(b.heads for b in dims.blocks)
    width = max((max(b.qk, b.v) for b in dims.blocks if b.heads), default=1)
    fitting = [h for h in range(max(1, heads), dims.embed + 1) if dims.embed % h == 0 and dims.embed // h >= width]
    if not fitting:
        raise ModelError(
            f"timm's own ViT has heads x width = embedding, and {heads} heads of {width} do not fit into "
            f"an embedding of {dims.embed}; --format standalone keeps any widths"
        )
    channels, mlp = dims.embed // fitting[0], max(1, *(b.mlp for b in dims.blocks))
    return ViTDims(dims.embed, tuple(BlockDims(fitting[0], channels, channels, mlp, b.tokens) for b in dims.blocks))


def _why_not(model: VisionTransformer, block: BlockDims) -> str | None:
    """What keeps a model from being timm's with blocks of these widths, or None."""
    if (pool := model.attn_pool) is not None:
        own = pool.out_features, pool.num_heads, pool.mlp.fc1.out_features
        if own != (model.dims.embed, block.heads, block.mlp):
            return "timm gives a pool by attention the width, heads and MLP of its blocks, and these were pruned"
    for i, each in enumerate(model.blocks):
        padded = (each.dims.heads, each.dims.v) != (block.heads, block.v)
        if each.dims.heads and padded and isinstance(each.attn.norm, NORMS):
            return f"the norm in attention of block {i} would count the zeros that pad it to the width of the others"
        if each.dims.mlp not in (0, block.mlp) and isinstance(each.mlp.norm, NORMS):
            return f"the norm in the MLP of block {i} would count the zeros that pad it to the width of the others"
    return None


def _mlp_ratio(embed: int, mlp: int) -> float:
    """timm multiplies and rounds down."""
    return next(ratio for ratio in (mlp / embed, (mlp + 0.5) / embed) if int(embed * ratio) == mlp)


@torch.no_grad()
def plain_timm(model: VisionTransformer, **pretrained_cfg: Any) -> VisionTransformer:
    """timm's model, without any code of this project, that computes what `model` does. Raises ModelError.

    pretrained_cfg: what timm is told about input size and normalisation.
    """
    uniform, block = uniform_dims(model.dims), uniform_dims(model.dims).blocks[0]
    if reason := _why_not(model, block):
        raise ModelError(f"{reason}; --format standalone keeps any widths")
    parent_width = skeleton(model.arch, **model.arch_kwargs).blocks[0].attn.head_dim
    dims = ViTDims(
        model.dims.embed, tuple(b if b.heads else replace(b, qk=block.qk, v=block.v) for b in model.dims.blocks)
    )
    padded = build_vit(model.arch, uniform, **model.arch_kwargs)
    expand_(padded, Masks.first(padded.dims, dims), model)
    state, fold = padded.state_dict(), (block.qk / parent_width) ** 0.5  # timm's scale is the padded width's
    for name, value in state.items():
        if ".attn.qkv." in name:
            value[: block.heads * block.qk] *= fold
    shape = dict(
        embed_dim=uniform.embed,
        depth=len(uniform.blocks),
        num_heads=block.heads,
        mlp_ratio=_mlp_ratio(uniform.embed, block.mlp * (2 if padded.dims.structure.packed else 1)),
    )
    timm_model = timm.create_model(
        model.arch, **Arch.of_model(model).timm_kwargs | shape, pretrained_cfg_overlay=pretrained_cfg
    )
    timm_model.load_state_dict(state)
    return timm_model.eval()
