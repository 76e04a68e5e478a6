"""Plain Vision Transformers and Swin Transformers under one name each for what both have."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from models import swin, vit
from models.dims import ViTDims
from models.swin_dims import Dims, SwinDims

Model = VisionTransformer | SwinTransformer


def is_swin(arch: str) -> bool:
    """Whether timm's model of that name is a Swin Transformer (the first version)."""
    return timm.is_model(arch) and timm.model_entrypoint(arch).__module__ == swin.MODULE


def skeleton(arch: str, **kwargs: Any) -> Model:
    """timm's model at full width without storage (meta device), cached: for names, shapes and counts.

    Raises ModelError for a name timm does not know and for a model that is neither a plain ViT nor a Swin Transformer.
    """
    if is_swin(arch):
        return swin.swin_skeleton(arch, **kwargs)
    if timm.is_model(arch) and (module := timm.model_entrypoint(arch).__module__).startswith(swin.MODULE):
        raise vit.ModelError(f"{arch} is not a Swin Transformer of the first version: it is built by {module}")
    return vit.skeleton(arch, **kwargs)


def build_vit(arch: str, dims: Dims | None = None, **kwargs: Any) -> Model:
    """timm's model `arch` with the widths `dims` (default: its own): `models.vit.build_vit`, `models.swin.build_swin`.

    Raises ModelError.
    """
    kind = SwinDims if is_swin(arch) else ViTDims
    if dims is not None and not isinstance(dims, kind):
        raise vit.ModelError(f"{arch} takes {kind.__name__}, not {type(dims).__name__}")
    return swin.build_swin(arch, dims, **kwargs) if kind is SwinDims else vit.build_vit(arch, dims, **kwargs)


@torch.no_grad()
def without_weights(arch: str, dims: Dims | None, device: torch.device, **kwargs: Any) -> Model:
    """`build_vit` without timm's initialisation, which takes longer than the rest: parameters hold anything."""
    with torch.device("meta"):
        model = build_vit(arch, dims, **kwargs)
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return model


def dims_of(model: Model) -> Dims:
    """Widths of a model of this project, or of one of timm's."""
    return SwinDims.of(model) if isinstance(model, SwinTransformer) else ViTDims.of(model)


def left_alone(arch: str, **kwargs: Any) -> dict[str, str]:
    """Axes of a model that cannot be pruned (`qk`, in every block), each with the reason."""
    return {} if is_swin(arch) else vit.left_alone(arch, **kwargs)
