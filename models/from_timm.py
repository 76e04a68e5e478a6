"""A timm model that exists already, as one of this project's: the same function, with widths that can be pruned."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from timm.layers import GluMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.arch import Arch
from models.from_transformers import ROUNDED, convert, disagreement, is_transformers
from models.mlps import MLPS
from models.norms import NORMS
from models.parents import ModelError, why_not_plain

PLAIN, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"  # where timm does not say which it is
AGREE = 1e-4  # relative difference of outputs, in float32


def unwrap(model: nn.Module) -> nn.Module:
    """Without DataParallel, DistributedDataParallel and torch.compile."""
    while inner := getattr(model, "_orig_mod", None) or (
        model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else None
    ):
        model = inner
    return model


def _mlp_ratio(model: VisionTransformer) -> float:
    """timm's argument: of a gated MLP in one layer both rows of every unit count."""
    mlp = model.blocks[0].mlp
    return mlp.fc2.in_features * (2 if isinstance(mlp, GluMlp) else 1) / model.embed_dim


def _arguments(model: VisionTransformer) -> dict[str, Any]:
    """timm's arguments that a model was built with, read from its modules."""
    block, stem = model.blocks[0], model.patch_embed
    size, patch = list(stem.img_size), list(stem.patch_size)
    known = dict(
        img_size=size[0] if size[0] == size[1] else size,
        patch_size=patch[0] if patch[0] == patch[1] else patch,
        in_chans=stem.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=_mlp_ratio(model) if isinstance(block.mlp, MLPS) else None,
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        qk_norm=isinstance(block.attn.q_norm, NORMS),
        scale_attn_norm=isinstance(block.attn.norm, NORMS),
        scale_mlp_norm=isinstance(block.mlp.norm, NORMS),
        init_values=1e-5 if hasattr(block.ls1, "gamma") else None,  # the values are among the weights
        global_pool=model.global_pool,
    )
    if not isinstance(model, VisionTransformerDistilled):
        known |= dict(
            class_token=model.cls_token is not None,
            reg_tokens=getattr(model, "num_reg_tokens", 0),
            no_embed_class=model.no_embed_class,
            pos_embed="none" if model.pos_embed is None else "learn",
            pre_norm=isinstance(model.norm_pre, NORMS),
            fc_norm=isinstance(model.fc_norm, NORMS),
            final_norm=isinstance(model.norm, NORMS) or isinstance(model.fc_norm, NORMS),
        )
    return known


def arch_of(model: VisionTransformer) -> Arch:
    """The architecture of a timm model. Raises ModelError where it is no plain Vision Transformer."""
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"a {type(model).__name__} is not a plain Vision Transformer of timm")
    if reason := why_not_plain(model):
        raise ModelError(f"the model is not a plain Vision Transformer: {reason}")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or ""
    if not timm.is_model(name):
        name = DISTILLED if isinstance(model, VisionTransformerDistilled) else PLAIN
    own = _arguments(model)
    usual = _arguments(Arch(name).skeleton)
    other = {key: value for key, value in own.items() if value != usual[key]}
    if "global_pool" in other and "fc_norm" in own:  # whose default follows the pooling
        other["fc_norm"] = own["fc_norm"]
    return Arch.of(name, **other)


@torch.no_grad()
def take(model: nn.Module) -> VisionTransformer:
    """A copy of a timm model as one of this project's, in eval mode, on its device. Raises ModelError.

    A vision model of transformers is converted; a model of this project is copied as it is.
    """
    model = unwrap(model)
    if is_transformers(model):
        return convert(model)
    if hasattr(model, "dims") and hasattr(model, "arch_kwargs"):
        return copy.deepcopy(model).eval()
    arch = arch_of(model)
    ours = arch.build()
    try:
        ours.load_state_dict(model.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{arch.name}: a model of this structure cannot be rebuilt: {reason}") from None
    if cfg := getattr(model, "pretrained_cfg", None):
        ours.pretrained_cfg = ours.default_cfg = cfg  # of these weights: how their images are prepared
    reference = next(model.parameters())
    ours = ours.to(reference.device, reference.dtype).eval()
    error, exact = disagreement(ours, model, lambda images: (ours(images), model(images)))
    if not error <= (AGREE if exact else ROUNDED):
        raise ModelError(f"{arch.name}: the model was changed after it was built; rebuilt, it differs by {error:.1e}")
    return ours
