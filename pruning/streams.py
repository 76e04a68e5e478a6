"""A plain ViT taken apart for walking it layer by layer: stem, branches, and which tokens the classifier reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.mlps import between, first_layers
from models.vit import Block


class Branch(NamedTuple):
    """x + gamma last(mix(first(norm(x)))): attention (qkv, proj) or MLP (fc1, fc2). No LayerScale: gamma is None.

    readers: the first layers by their names in the block; `mix` takes their outputs side by side.
    """

    norm: nn.Module
    readers: dict[str, nn.Linear]
    mix: Callable[[Tensor], Tensor]
    last: nn.Linear
    gamma: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """What the branch adds to the residual stream x."""
        return self.write(self.mix(self.first(self.norm(x))))

    def first(self, normed: Tensor) -> Tensor:
        """The readers' outputs side by side: (B, N, E) -> (B, N, rows)."""
        outputs = [reader(normed) for reader in self.readers.values()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def write(self, mixed: Tensor) -> Tensor:
        """The branch from its mixed values on."""
        out = self.last(mixed)
        return out if self.gamma is None else out * self.gamma


def attention(block: Block) -> Branch | None:
    """A block's attention branch, None where it has none."""
    if not block.dims.heads:
        return None
    readers = {"attn.qkv": block.attn.qkv}
    return Branch(block.norm1, readers, block.attn.mix, block.attn.proj, getattr(block.ls1, "gamma", None))


def mlp(block: Block) -> Branch | None:
    """A block's MLP branch, gated or not, None where it has none."""
    if not block.dims.mlp:
        return None
    readers = {f"mlp.{name}": layer for name, layer in first_layers(block.mlp).items()}
    return Branch(block.norm2, readers, between(block.mlp), block.mlp.fc2, getattr(block.ls2, "gamma", None))


def branches(block: Block) -> list[Branch]:
    """The branches that the block has, in order."""
    return [branch for branch in (attention(block), mlp(block)) if branch]


def stem(model: VisionTransformer, images: Tensor) -> Tensor:
    """The residual stream before the first block: B N E."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def head(model: VisionTransformer, stream: Tensor) -> Tensor:
    """Logits from the residual stream after the last block."""
    return model.forward_head(model.norm(stream))


def read(model: VisionTransformer) -> slice:
    """The tokens that the classifier reads."""
    if isinstance(model, VisionTransformerDistilled):
        return slice(0, 2)
    if model.global_pool == "token":
        return slice(0, 1)
    everything = model.pool_include_prefix or not model.global_pool
    return slice(0 if everything else model.num_prefix_tokens, None)


def outlets(model: VisionTransformer) -> list[nn.Linear]:
    """The linear layers that read the residual stream behind the last block: classifiers, or a pool's keys and values.

    None where the stream itself is what the model gives.
    """
    if model.attn_pool is not None:
        return [model.attn_pool.kv]
    heads = (model.head, getattr(model, "head_dist", None))
    return [head for head in heads if isinstance(head, nn.Linear)]


def pool(model: VisionTransformer, stream: Tensor) -> list[tuple[nn.Linear, Tensor]]:
    """The layers of a pool by attention up to its projection, each with what it is given; none where there is none."""
    if (pool := model.attn_pool) is None:
        return []
    tokens = model.norm(stream)[:, read(model)]
    return [(pool.kv, tokens), (pool.proj, pool.mix(pool.kv(tokens)))]


def classifiers(model: VisionTransformer, stream: Tensor) -> list[tuple[nn.Linear, Tensor]]:
    """Every classifier with what it is given: (B, width)."""
    features = model.norm(stream)
    if isinstance(model, VisionTransformerDistilled):
        return [(model.head, features[:, 0]), (model.head_dist, features[:, 1])]
    return [(model.head, model.forward_head(features, pre_logits=True))]
