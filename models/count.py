"""MACs and parameters in closed form, of the architecture: padding inside a kernel is the latency table's business."""

from __future__ import annotations

from math import prod
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from models.axes import axes_of, branch_of
from models.dims import ViTDims
from models.vit import skeleton


def _parent(arch: str, dims: ViTDims | None, kwargs: dict[str, Any]) -> tuple[VisionTransformer, ViTDims]:
    if dims is not None:
        kwargs = kwargs | dict(depth=max(1, len(dims.blocks)))
    parent = skeleton(arch, **kwargs)
    return parent, dims or ViTDims.of(parent)


def params(arch: str, dims: ViTDims | None = None, **kwargs: Any) -> int:
    """Trainable parameters of `build_vit(arch, dims, **kwargs)`."""
    parent, dims = _parent(arch, dims, kwargs)
    sizes = dims.sizes()
    total = 0
    for name, parameter in parent.named_parameters():
        branch = branch_of(name)
        if branch is None or sizes.get(branch):
            total += prod(
                sum(prod(sizes[axis] for axis in segment) for segment in dim) if dim else length
                for dim, length in zip(axes_of(name), parameter.shape, strict=True)
            )
    return total


def macs(arch: str, dims: ViTDims | None = None, **kwargs: Any) -> int:
    """Multiply-accumulates of one image through `build_vit(arch, dims, **kwargs)`.

    Counts what torch's counter counts: convolutions, linears and both attention products. Norms, softmax, GELU and
    residual additions are left out, as in the papers (NViT's DeiT-B figure of 17.66 G is reproduced).
    """
    parent, dims = _parent(arch, dims, kwargs)
    embed = dims.embed
    patch = prod(parent.patch_embed.patch_size) * parent.patch_embed.proj.in_channels
    total = parent.patch_embed.num_patches * patch * embed
    for b in dims.blocks:
        linears = embed * b.heads * (2 * b.qk + b.v) + b.heads * b.v * embed + 2 * embed * b.mlp
        total += b.tokens * linears + b.tokens**2 * b.heads * (b.qk + b.v)
    heads = sum(hasattr(parent, name) for name in ("head", "head_dist"))
    return total + heads * embed * parent.num_classes
