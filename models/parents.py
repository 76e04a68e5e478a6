"""timm's plain Vision Transformers at full width and without storage: names, shapes and what can be pruned."""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.axes import axes_of
from models.mlps import MLPS
from models.norms import NORMS
from models.tokens import plain


class ModelError(ValueError):
    """A model name or structure that this project cannot build; the message says why and what would do."""


def _why_not_pooled(model: nn.Module) -> str | None:
    """What keeps a pool by attention from being described here, or None."""
    if model.attn_pool is None:
        return None
    if type(model.attn_pool) is not AttentionPoolLatent:
        return f"it pools by {type(model.attn_pool).__name__}"
    return None if isinstance(model.fc_norm, nn.Identity) else "a norm follows its pool by attention"


def _why_not_block(block: nn.Module) -> str | None:
    """What keeps a block from being described here, or None."""
    if type(block) is not TimmBlock or type(block.attn) is not TimmAttention or type(block.mlp) not in MLPS:
        parts = (block, getattr(block, "attn", None), getattr(block, "mlp", None))
        return f"its blocks are not plain ({', '.join(type(m).__name__ for m in parts)})"
    norms = [block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
    odd = [norm for norm in norms if not isinstance(norm, (*NORMS, nn.Identity))]
    return f"it normalises with {type(odd[0]).__name__}" if odd else None


def why_not_plain(model: nn.Module) -> str | None:
    """What keeps a timm model from being pruned by width here, or None."""
    if not len(model.blocks):
        return "it has no blocks"
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return f"it is a {type(model).__name__}"
    if not isinstance(model.patch_embed, PatchEmbed):
        return f"its stem is a {type(model.patch_embed).__name__}"
    for reason in (_why_not_pooled(model), *map(_why_not_block, model.blocks)):
        if reason:
            return reason
    for name, _ in model.named_parameters():
        try:
            axes_of(name)
        except KeyError:
            return f"its parameter {name} is not part of a plain ViT"
    return None


@lru_cache(maxsize=32)
def _skeleton(arch: str, kwargs_json: str) -> VisionTransformer:
    if not timm.is_model(arch):
        names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        closest = sorted(names, key=lambda n: -difflib.SequenceMatcher(None, arch, n[: len(arch)]).ratio())[:3]
        raise ModelError(f"timm knows no model {arch!r}; closest: {', '.join(closest)}")
    module = timm.model_entrypoint(arch).__module__
    if module not in ("timm.models.vision_transformer", "timm.models.deit"):
        raise ModelError(f"{arch} is not a plain Vision Transformer: it is built by {module}")
    try:
        with torch.device("meta"):
            model = timm.create_model(arch, **json.loads(kwargs_json))
    except (TypeError, AssertionError, RuntimeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ModelError(f"timm cannot build {arch} with {kwargs_json}: {error}") from error
    if reason := why_not_plain(model):
        raise ModelError(f"{arch} is not a plain Vision Transformer: {reason}")
    return model


def skeleton(arch: str, **kwargs: Any) -> VisionTransformer:
    """timm's model at full width without storage (meta device), cached: for names, shapes and counts.

    Raises ModelError for a name timm does not know and for a model that is not a plain ViT.
    """
    try:
        return _skeleton(arch, json.dumps(plain(kwargs), sort_keys=True))
    except TypeError as error:
        raise ModelError(f"{arch}: model arguments must be plain values ({error})") from None


def left_alone(arch: str, **kwargs: Any) -> dict[str, str]:
    """Axes of a model that cannot be pruned (`qk`, in every block), each with the reason."""
    if isinstance(skeleton(arch, **kwargs).blocks[0].attn.q_norm, NORMS):
        return dict(qk="queries and keys are normalised over it")
    return {}
