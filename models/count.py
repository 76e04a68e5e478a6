"""MACs and parameters in closed form, of the architecture: padding inside a kernel is the latency table's business."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from models.axes import branch_of
from models.content import anchors_of
from models.dims import ViTDims
from models.swin_dims import Dims, SwinDims
from models.tokens import merging

Model = VisionTransformer | SwinTransformer


def params(parent: Model, dims: Dims, kwargs: dict[str, Any]) -> int:
    """Trainable parameters of a model with the widths `dims`.

    parent: timm's model at full width, of as many blocks; kwargs: among them how tokens are merged.
    """
    sizes = dims.sizes()
    total = 0
    for name, parameter in parent.named_parameters():
        branch = branch_of(name)
        if branch is None or sizes.get(branch):
            total += prod(
                sum(prod(sizes[axis] for axis in segment) for segment in dim) if dim else length
                for dim, length in zip(dims.axes_of(name), parameter.shape, strict=True)
            )
    if isinstance(parent, SwinTransformer):
        return total
    return total + sum(_token_params(parent, b.tokens, kwargs) for b in dims.blocks)


def _token_params(parent: VisionTransformer, tokens: int, kwargs: dict[str, Any]) -> int:
    prefix = parent.num_prefix_tokens
    with torch.device("meta"):
        compression = merging(tokens, parent.patch_embed.num_patches + prefix, prefix, kwargs)
    return sum(p.numel() for p in compression.parameters()) if compression else 0


@dataclass(frozen=True)
class MacsFormula:
    """Multiply-accumulates of one image as a function of the widths, for many architectures at once.

    Counts what torch's counter counts: convolutions, linears and both attention products. Norms, softmax, GELU and
    residual additions are left out, as in the papers (NViT's DeiT-B figure of 17.66 G is reproduced). Merging and
    reconstructing tokens count as the two matrix products that they are (without gradients less is computed), by
    content as its likenesses and its means.
    stem, classifier, compression: MACs per embedding channel; tokens, queries: (L,) int64, of each block the
    tokens that it computes on, and those that are queries and pass the MLP; pool: MACs of a pool by attention and of
    what reads it, whatever the embedding; matrices: of an MLP, 2, or 3 where it is gated.
    """

    stem: int
    classifier: int
    tokens: np.ndarray
    queries: np.ndarray
    compression: int
    pool: int = 0
    matrices: int = 2

    @classmethod
    def of(cls, parent: VisionTransformer, dims: ViTDims, by_content: bool = False) -> MacsFormula:
        """Everything but the widths comes from the full-width model, tokens and queries from `dims`.

        by_content: whether tokens are merged by content (`models.content`).
        """
        patch = prod(parent.patch_embed.patch_size) * parent.patch_embed.proj.in_channels
        heads = sum(hasattr(parent, name) for name in ("head", "head_dist"))
        classifier, pool = _pool_macs(parent) if parent.attn_pool else (heads * parent.num_classes, 0)
        tokens = np.array([b.tokens for b in dims.blocks], dtype=np.int64)
        patches, prefix = parent.patch_embed.num_patches, parent.num_prefix_tokens
        merged = tokens < patches + prefix
        queries = np.array([b.tokens if b.queries is None else b.queries for b in dims.blocks], dtype=np.int64)
        if by_content:
            compression = sum(anchors_of(k - prefix) + k for k in tokens[merged].tolist()) * (patches + prefix)
        else:
            rebuilt = merged & (queries == tokens)
            compression = int(tokens[merged].sum() + tokens[rebuilt].sum()) * (patches + prefix)
        matrices = 3 if isinstance(parent.blocks[0].mlp, GluMlp | SwiGLU) else 2
        return cls(patches * patch, classifier, tokens, queries, compression, pool, matrices)

    def parts(
        self, embed: np.ndarray, heads: np.ndarray, qk: np.ndarray, v: np.ndarray, mlp: np.ndarray
    ) -> dict[str, np.ndarray]:
        """By part of the model. embed: (…,); heads, qk, v, mlp: (…, L), all int64; each result (…,)."""
        e = np.asarray(embed)[..., None]
        each = e * heads * (qk + v)  # queries and proj of the query tokens, keys and values of all
        attention = (self.queries + self.tokens) * each + self.queries * self.tokens * heads * (qk + v)
        hidden = self.matrices * self.queries * e * mlp
        return dict(
            patch_embed=self.stem * embed,
            attention=attention.sum(-1),
            mlp=hidden.sum(-1),
            tokens=self.compression * embed,
            classifier=self.classifier * embed + self.pool,
        )


def _pool_macs(parent: VisionTransformer) -> tuple[int, int]:
    """MACs of timm's pool by attention, with the classifier behind it: per embedding channel, and in all besides."""
    pool, width = parent.attn_pool, parent.attn_pool.out_features
    tokens = parent.patch_embed.num_patches + parent.num_prefix_tokens * parent.pool_include_prefix
    linears = 2 * width + 2 * pool.mlp.fc1.out_features + parent.num_classes  # q, proj, MLP, classifier, of one token
    return tokens * 2 * width, width * (linears + 2 * tokens)


def _swin_macs(parent: SwinTransformer, dims: SwinDims) -> dict[str, int]:
    """As MacsFormula counts; attention runs over windows, with what pads the last of them."""
    embeds, resolutions = [s.embed for s in dims.stages], [s.blocks[0].tokens for s in dims.stages]
    stem, attention, mlp = parent.patch_embed, 0, 0
    for stage, layer in zip(dims.stages, parent.layers, strict=True):
        for b, block in zip(stage.blocks, layer.blocks, strict=True):
            sides = zip(block.input_resolution, block.window_size, strict=True)
            windows, area = prod(-(-side // window) for side, window in sides), block.window_area
            linears = stage.embed * b.heads * (2 * b.qk + b.v) + b.heads * b.v * stage.embed
            attention += windows * (area * linears + area**2 * b.heads * (b.qk + b.v))
            mlp += 2 * b.tokens * stage.embed * b.mlp
    return dict(
        patch_embed=stem.num_patches * prod(stem.patch_size) * stem.proj.in_channels * embeds[0],
        attention=attention,
        mlp=mlp,
        downsampling=sum(n * 4 * e * e_ for n, e, e_ in zip(resolutions[1:], embeds, embeds[1:], strict=False)),
        classifier=embeds[-1] * parent.num_classes,
    )


def macs_by_part(parent: Model, dims: Dims, by_content: bool = False) -> dict[str, int]:
    """MACs of one image by part of the model; arguments as of `MacsFormula.of`, or a Swin Transformer's."""
    if isinstance(dims, SwinDims):
        return _swin_macs(parent, dims)
    widths = np.array([(b.heads, b.qk, b.v, b.mlp) for b in dims.blocks], dtype=np.int64).reshape(-1, 4).T
    parts = MacsFormula.of(parent, dims, by_content).parts(np.int64(dims.embed), *widths)
    return {name: int(number) for name, number in parts.items()}
