"""timm's plain Vision Transformers with free widths in every block.

timm builds the model; only its blocks and LayerNorms are ours. Parameter names and the fused qkv row order are timm's,
so a timm state dict loads unchanged at full width. Legend: B batch, N tokens, E embed, H heads, d channels per head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.attention import attend
from models.dims import BlockDims, ViTDims
from models.mlps import sized_mlp
from models.norms import NORMS, norm_like
from models.parents import ModelError, left_alone, skeleton
from models.pooling import pool_by_attention_
from models.tokens import can_be_lean, merging, plain, train_matrices_


class Attention(nn.Module):
    """Multi-head self-attention with independent query/key and value widths.

    The softmax scale is the parent's (`parent_head_dim ** -0.5`), whatever qk remains. `route` is the route through the
    kernels (`models.attention`), None for the fastest; "fused" shows the bare architecture to a counter.
    """

    route: str | None = None

    def __init__(
        self,
        embed: int,
        dims: BlockDims,
        scale: float,
        qkv_bias: bool,
        proj_bias: bool,
        attn_drop: float,
        proj_drop: float,
        head_norm: Any = nn.Identity,
        inner_norm: Any = nn.Identity,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk, self.v, self.scale = dims.heads, dims.qk, dims.v, scale
        self.qkv = nn.Linear(embed, dims.heads * (2 * dims.qk + dims.v), bias=qkv_bias)
        self.q_norm, self.k_norm = head_norm(dims.qk), head_norm(dims.qk)
        self.attn_drop = attn_drop
        self.norm = inner_norm(dims.heads * dims.v)
        self.proj = nn.Linear(dims.heads * dims.v, embed, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the heads pass on: the fused rows of q, k and v, (B, N, H(2 qk + v)) -> (B, N, H v).

        bias: of every token's scores as a key, (B, 1, 1, N).
        """
        rows = self.num_heads * self.qk
        return self._attend(*qkv.split([rows, rows, self.num_heads * self.v], dim=-1), bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # B H N qk or v
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if bias is None else bias.to(q.dtype)
        dropout = self.attn_drop if self.training else 0.0
        return self.norm(attend(q, k, v, self.scale, dropout, self.route, bias))

    def forward(self, x: Tensor, queries: int | None = None, bias: Tensor | None = None) -> Tensor:
        """queries: only the first `queries` tokens are queries and get an output, None for all; bias: as in `mix`."""
        # a layer in qkv's place has no rows to take apart, and who looks at qkv sees those of all tokens
        if queries is None or type(self.qkv) is not nn.Linear or self.qkv._forward_hooks:
            return self.proj_drop(self.proj(self.mix(self.qkv(x), bias)[:, :queries]))  # B N E
        rows, weight = self.num_heads * self.qk, self.qkv.weight
        first, rest = (None, None) if self.qkv.bias is None else self.qkv.bias.tensor_split([rows])
        q = F.linear(x[:, :queries], weight[:rows], first)
        k, v = F.linear(x, weight[rows:], rest).tensor_split([rows], dim=-1)
        return self.proj_drop(self.proj(self._attend(q, k, v, bias)))


class Block(nn.Module):
    """timm's pre-norm block with the widths of `dims`. A branch of width 0 is not built.

    tokens: the compression that the block works inside of (`models.tokens`), None for all tokens. Takes the arguments
    timm passes to its `block_fn`; those that a plain ViT leaves at their default are ignored here because `skeleton`
    has refused any other value. num_queries: how many of the first tokens are queries, None for all; the others are
    only keys, and come out as they went in, or with `drop_rest` (`models.tokens.streamline_`) not at all.
    """

    drop_rest: bool = False

    def __init__(
        self,
        *,
        dims: BlockDims,
        scale: float,
        dim: int,
        norm_layer: Any,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Any = nn.GELU,
        mlp_layer: Any = Mlp,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        tokens: nn.Module | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dims, self.tokens, self.num_queries = dims, tokens, dims.queries
        if dims.heads:
            self.norm1 = norm_layer(dim)
            norms = [norm_layer if wanted else nn.Identity for wanted in (qk_norm, scale_attn_norm)]
            self.attn = Attention(dim, dims, scale, qkv_bias, proj_bias, attn_drop, proj_drop, *norms)
            self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
            self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if dims.mlp:
            self.norm2 = norm_layer(dim)
            self.mlp = sized_mlp(
                mlp_layer,
                dim,
                dims.mlp,
                act_layer=act_layer,
                norm_layer=norm_layer if scale_mlp_norm else None,
                bias=proj_bias,
                drop=proj_drop,
            )
            self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            out = self.branches(x)
        else:
            tokens = self.tokens.groups_for(x)
            z = tokens.compress(x)
            out = self.branches(z, tokens.bias)
            out = tokens.restore(out, z, x) if self.num_queries is None else out  # prefix tokens are never merged
        if self.num_queries is None or self.drop_rest:
            return out
        return torch.cat([out.to(x.dtype), x[:, self.num_queries :]], 1)

    def branches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention, its scores with a bias per key, and MLP, on all tokens or on those that compression leaves."""
        wanted = x if self.num_queries is None else x[:, : self.num_queries]
        if self.dims.heads:
            wanted = wanted + self.drop_path1(self.ls1(self.attn(self.norm1(x), self.num_queries, bias)))
        if self.dims.mlp:
            wanted = wanted + self.drop_path2(self.ls2(self.mlp(self.norm2(wanted))))
        return wanted  # B N E


class TokenLogits(nn.Module):
    """A model's (class-token logits, distillation-token logits), each (B, classes), in train and eval mode alike.

    A model with one head gives the same logits twice.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(images)  # B N E
        if not isinstance(self.model, VisionTransformerDistilled):
            logits = self.model.forward_head(features)
            return logits, logits
        cls, dist = self.model.head_drop(features[:, 0]), self.model.head_drop(features[:, 1])
        return self.model.head(cls), self.model.head_dist(dist)


def settle(arch: str, dims: ViTDims, kwargs: dict[str, Any]) -> tuple[ViTDims, dict[str, Any]]:
    """Dims with the architecture's structure, and the two ways to say that the last block is lean made one: queries in
    the dims, and lean_last in the arguments.

    Files of an earlier format have the argument alone. Raises ModelError where such a model cannot be.
    """
    parent, asked = skeleton(arch, **kwargs), {b.queries for b in dims.blocks} - {None}
    dims = replace(dims, structure=ViTDims.of(parent).structure)
    if not asked and not kwargs.get("lean_last"):
        return dims, kwargs
    prefix = parent.num_prefix_tokens
    if asked - {prefix} or any(b.queries is not None for b in dims.blocks[:-1]):
        raise ModelError(f"{arch}: only the {prefix} prefix tokens of the last block can be its queries")
    if not can_be_lean(parent):
        raise ModelError(f"{arch}: lean_last does not go with a head that reads every token")
    if kwargs.get("dense_merge"):
        raise ModelError("lean_last does not go with dense_merge, whose matrices may mix what the head reads")
    return dims.with_queries(prefix), kwargs | dict(lean_last=True)


def build_vit(arch: str, dims: ViTDims | None = None, **kwargs: Any) -> VisionTransformer:
    """timm's model `arch` with the widths `dims` (default: its own), initialised as timm does.

    kwargs are timm's (img_size, num_classes, drop_path_rate, …) and describe the *parent*: the softmax scale comes from
    its head width, whatever `dims` says. dense_merge=True stores token compression as full matrices,
    content_merge=True merges tokens by content (`models.content`), lean_last=True lets only the tokens that the head
    reads ask in the last block: the others are its keys and come out as they went in, and logits stay as they are. The
    result carries `dims`, `arch` and `arch_kwargs`. Raises ModelError.
    """
    pretrained = kwargs.pop("pretrained", False)
    parent = skeleton(arch, **kwargs)
    dims, kwargs = settle(arch, dims or ViTDims.of(parent), kwargs)
    blocks = iter(dims.blocks)
    prefix = parent.num_prefix_tokens
    total = parent.patch_embed.num_patches + prefix
    head_width = parent.blocks[0].attn.head_dim
    scale = head_width**-0.5
    for axis, reason in left_alone(arch, **kwargs).items():
        if any(b.heads and getattr(b, axis) != head_width for b in dims.blocks):
            raise ModelError(f"{arch}: {axis} must stay {head_width}: {reason}")

    def block(**timm_kwargs: Any) -> Block:
        dims = next(blocks)
        tokens = merging(dims.tokens, total, prefix, kwargs)
        return Block(dims=dims, scale=scale, tokens=tokens, **timm_kwargs)

    if odd := [b.tokens for b in dims.blocks if not prefix < b.tokens <= total]:
        raise ModelError(
            f"a block computes on {odd[0]} tokens, but {arch} has {total}, of which {prefix} are never "
            f"merged: {prefix + 1} to {total} are possible"
        )
    pool, norm = parent.attn_pool, norm_like(parent.blocks[0].norm1)
    own = dict(embed_dim=dims.embed, depth=len(dims.blocks), norm_layer=norm, block_fn=block)
    if pool:
        own |= dict(global_pool="")
    if isinstance(parent.patch_embed.norm, NORMS):
        own |= dict(embed_norm_layer=norm_like(parent.patch_embed.norm))
    model = timm.create_model(arch, pretrained=pretrained and not pool, **plain(kwargs) | own)
    if pool:
        pool_by_attention_(model, pool)
        if pretrained:
            model.load_state_dict(timm.create_model(arch, pretrained=True, **plain(kwargs)).state_dict())
    if kwargs.get("lean_last"):
        train_matrices_(model)
    model.dims, model.arch, model.arch_kwargs = dims, arch, kwargs
    return model
