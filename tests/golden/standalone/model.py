"""deit_tiny_distilled_patch16_224 with pruned widths: embedding 16, 2 blocks.

Needs torch and timm, and nothing else; config.json and model.safetensors lie beside this file.

    from model import load, transform
    model, prepare = load(), transform()
    logits = model(prepare(image).unsqueeze(0))  # image: a PIL image; logits: (1, classes)
"""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import create_transform
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

HERE = Path(__file__).parent


class BlockDims(NamedTuple):
    """Widths of one block: 0 heads is no attention branch, 0 mlp no MLP branch."""

    heads: int
    qk: int
    v: int
    mlp: int
    tokens: int


ROUTES = ("fused", "padded", "explicit")
SCORES_BYTES = 2 << 20  # of one chunk of images on the explicit route
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # matrix instructions of recent Intel CPUs
TENSOR_CORES = 8  # widths that a GPU's kernels take without a slow path are multiples of this


def route(qk: int, v: int, device: torch.device, dtype: torch.dtype) -> str:
    """The fastest exact route where no gradient is needed; with one, explicit gives way to padded.

    A CPU's fused kernel is the quickest at equal widths in fp32; unequal ones it takes slowly, and padded it computes
    the zeros too. In bf16 it is slow without Intel's AMX; in fp16 matrix products by themselves are slower still.
    """
    if device.type == "cpu":
        if dtype == torch.float16:
            return "fused"
        if dtype == torch.bfloat16:
            return ("fused" if qk == v else "padded") if AMX else "explicit"
        return "fused" if qk == v else "explicit"
    return "fused" if qk == v and qk % TENSOR_CORES == 0 else "padded"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0, way: str | None = None,
           bias: Tensor | None = None) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + bias) v: q (B, H, N, qk), k (B, H, M, qk), v (B, H, M, v) -> (B, N, H v).

    way: a route, None for the rule's; bias: of the keys, (B, 1, 1, M), None for none.
    """
    way = way or route(q.shape[-1], v.shape[-1], q.device, q.dtype)
    if way == "explicit":
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dropout:
            return _explicit(q, k, v, scale, bias)
        way = "padded"
    B, H, N, _ = q.shape
    out = by_kernel(q, k, v, scale, dropout, bias, padded=way == "padded")
    return out.transpose(1, 2).reshape(B, N, H * v.shape[-1])


def by_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0, bias: Tensor | None = None,
              padded: bool = True) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + bias) v by torch's kernel, as it is or padded: shapes of `attend` -> (B, H, N, v).

    bias: of the scores, (B, H, N, M) or 1 where they share it.
    """
    width = v.shape[-1]
    if padded:
        multiple = 1 if q.device.type == "cpu" else TENSOR_CORES
        common = -(-max(q.shape[-1], width) // multiple) * multiple
        q, k, v = (F.pad(t, (0, common - t.shape[-1])) if t.shape[-1] < common else t for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)[..., :width]


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    (B, H, N, _), width = q.shape, v.shape[-1]
    chunk = max(1, SCORES_BYTES // (H * N * k.shape[2] * q.element_size()))
    out = v.new_empty(B, N, H, width)
    for i, rows in enumerate(zip(*(t.split(chunk) for t in (q, k, v, out)), strict=True)):
        q_, k_, v_ = (t.flatten(0, 1) for t in rows[:3])  # b*H N d
        scores = torch.baddbmm(q_.new_empty(1), q_, k_.transpose(1, 2), beta=0, alpha=scale)  # b*H N N
        if bias is not None:
            scores.unflatten(0, (-1, H)).add_(bias[i * chunk : (i + 1) * chunk])
        rows[3].copy_(torch.bmm(scores.softmax(-1), v_).view(-1, H, N, width).transpose(1, 2))
    return out.view(B, N, H * width)


def anchors_of(groups: int) -> int:
    """How many of a block's groups have an anchor."""
    return max(1, groups // 2)


class Groups(NamedTuple):
    """The groups of one batch.

    owner: (B, T) int64, the group of every token, prefix tokens first; member: (B, K, T), 1 where a token goes into a
    group, else 0; sizes: (B, K, 1), the tokens of each group.
    """

    owner: Tensor
    member: Tensor
    sizes: Tensor
    prefix: int

    @property
    def bias(self) -> Tensor:
        """Of attention's scores, the logarithm of the sizes: (B, 1, 1, K)."""
        return self.sizes.log().mT[:, None]

    def compress(self, x: Tensor) -> Tensor:
        """Means of the groups: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return (self.member.to(x.dtype) @ x) / self.sizes

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """x + R (out - z): out, z (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            gained, (B, K, E) = out.to(x.dtype) - z, z.shape
            rows = (self.owner + K * torch.arange(B, device=x.device)[:, None]).flatten()
            return x + gained.flatten(0, 1).index_select(0, rows).view(B, -1, E)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s) of the first image, as `models.tokens` defines them: (K, T), (T, K) and (T,)."""
        member, sizes = self.member[0], self.sizes[0]
        return member / sizes, member.T, (member.T @ sizes)[:, 0].gt(1).to(member)


class ContentMerge(nn.Module):
    """Finds the groups of a batch. `anchors` (N,) bool is all that a layer stores; nothing trains."""

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        self.register_buffer("anchors", torch.zeros(total - prefix, dtype=torch.bool))
        self.register_load_state_dict_post_hook(lambda module, _: module._plan())
        self.reset()

    def reset(self) -> None:
        """Anchors at equal distances in the raster: a structure before any is chosen."""
        if not self.anchors.is_meta:
            count = anchors_of(self.tokens - self.prefix)
            places = torch.arange(count) * len(self.anchors) // count
            self.set(torch.zeros(len(self.anchors), dtype=torch.bool).index_fill(0, places, True))

    @torch.no_grad()
    def set(self, anchors: Tensor) -> None:
        """The anchors, (N,) bool. Raises ValueError for another number than `anchors_of` wants."""
        self.anchors.copy_(anchors)
        self._plan()

    def _plan(self) -> None:
        """Which tokens have a group of their own from the start, prefix tokens and anchors, and which group."""
        P, wanted, found = self.prefix, anchors_of(self.tokens - self.prefix), int(self.anchors.sum())
        if found != wanted:
            raise ValueError(f"{found} anchors, but {self.tokens - P} groups have {wanted}")
        fixed = torch.cat([self.anchors.new_ones(P), self.anchors])
        plan = dict(inside=P + self.anchors.nonzero().flatten(), fixed=fixed, own=fixed.cumsum(0) - 1)
        for name, value in plan.items():
            self.register_buffer(f"_{name}", value, persistent=False)

    @torch.no_grad()
    def bound(self, x: Tensor) -> Groups:
        """The groups of a batch of residual streams (B, T, E)."""
        P, A, groups = self.prefix, len(self._inside), self.tokens - self.prefix
        with torch.autocast(x.device.type, enabled=False):
            tiny = torch.finfo(x.dtype).tiny  # a token of zeros is like none, and no number divides by 0
            anchors = F.normalize(x.index_select(1, self._inside), dim=-1, eps=tiny)
            likeness, nearest = (x @ anchors.mT).max(-1)  # B T
            likeness = (likeness / x.norm(dim=-1).clamp_min(tiny)).masked_fill(self._fixed, torch.inf)
        alone = likeness.topk(groups - A, largest=False).indices
        owner = torch.where(self._fixed, self._own, P + nearest)
        owner = owner.scatter(1, alone, torch.arange(P + A, P + groups, device=x.device).expand(x.shape[0], -1))
        member = (owner[:, None] == torch.arange(P + groups, device=x.device)[:, None]).to(x.dtype)
        return Groups(owner, member, member.sum(-1, keepdim=True), P)


SKIPPED = -1
COMPRESSIONS = ("dense_merge", "content_merge", "lean_last")  # arguments of a model: how tokens are compressed


def evenly(patches: int, groups: int) -> Tensor:
    """Owners (N,) of `groups` runs of neighbours as equal as can be: a structure before any is chosen."""
    return torch.arange(patches) * groups // patches


class TokenMerge(nn.Module):
    """M and R whose rows have disjoint support: every patch is in one group, or skips the block.

    `owner` (N,) int64 is the token that a patch goes into, P <= owner < K, or SKIPPED; `merge` and `reconstruct` (N,)
    are its entries of M and R, `shortcut` (N,) bool its s. Entries outside that support do not exist, so finetuning
    cannot fill them.

    Without gradients M and R are gathers and one small product over the patches that are no group's first; with them,
    and where `way` says "products" (a counter shall see them), the two matrix products that they stand for.
    """

    bias: Tensor | None = None  # of attention's scores
    way: str | None = None
    hands_on: str = "everything"  # or its own "tokens", to a block that folds (`streamline_`)

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        patches = total - prefix
        self.register_buffer("folded", None, persistent=False)
        self.merge, self.reconstruct = (nn.Parameter(torch.empty(patches)) for _ in range(2))
        self.register_buffer("owner", torch.empty(patches, dtype=torch.int64))
        self.register_buffer("shortcut", torch.empty(patches, dtype=torch.bool))
        self.register_load_state_dict_post_hook(lambda module, _: module._plan())
        self.reset()

    def reset(self) -> None:
        """Means of evenly spread groups of neighbours."""
        if self.owner.is_meta:
            return
        owner = self.prefix + evenly(self.total - self.prefix, self.tokens - self.prefix).to(self.owner.device)
        sizes = torch.bincount(owner, minlength=self.tokens)
        self.set(owner, 1 / sizes[owner], torch.ones(len(owner)), owner == SKIPPED)

    @torch.no_grad()
    def set(self, owner: Tensor, merge: Tensor, reconstruct: Tensor, shortcut: Tensor) -> None:
        """The structure, all (N,). Raises ValueError for a token without patches, and where groups are divided about
        their shortcut."""
        for own, value in zip((self.owner, self.merge, self.reconstruct, self.shortcut),
                              (owner, merge, reconstruct, shortcut), strict=True):  # fmt: skip
            own.copy_(value)
        self._plan()

    def _plan(self) -> None:
        """Indices of the gathers, from the owners."""
        owner, shortcut, P = self.owner.cpu(), self.shortcut.cpu(), self.prefix
        skipped, rows = owner == SKIPPED, torch.arange(self.tokens)
        member = owner[:, None] == rows  # N K
        sizes, shortcuts = member.sum(0), (member & shortcut[:, None]).sum(0)
        if not (member.any(1) | skipped).all() or not sizes[P:].all() or sizes[:P].any() or not shortcut[skipped].all():
            raise ValueError(f"the owners of {len(owner)} patches are no {self.tokens - P} groups after {P} tokens")
        if not ((shortcuts == 0) | (shortcuts == sizes)).all():
            raise ValueError("some patches of a group have the shortcut and some have not")
        first = member[:, P:].int().argmax(0)
        rest = (~skipped).index_fill(0, first, False).nonzero().flatten()
        passing = skipped.nonzero().flatten()
        source = owner.index_copy(0, passing, self.tokens + torch.arange(len(passing)))
        prefix = torch.arange(P)
        plan = dict(
            first=first, firsts=torch.cat([prefix, P + first]), rest=rest, others=P + rest, belongs=member[rest].T,
            passing=P + passing, source=torch.cat([prefix, source]), weightless=skipped,
            divided=(shortcuts > 0)[:, None], shortcuts=torch.cat([prefix > P, shortcut]),
            belated=torch.cat([prefix > P, shortcut & ~skipped])[:, None],
        )  # fmt: skip
        for name, index in plan.items():
            self.register_buffer(f"_{name}", index.to(self.owner.device), persistent=False)
        self.pulls_back = bool(shortcuts.any())

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s): (K, T), (T, K) and (T,)."""
        rows = torch.arange(self.tokens, device=self.owner.device)
        member = self.owner[:, None] == rows  # N K
        untouched = torch.eye(self.prefix, self.tokens, device=rows.device, dtype=self.merge.dtype)
        M = torch.cat([untouched, self.merge[:, None] * member]).T
        R = torch.cat([untouched, self.reconstruct[:, None] * member])
        return M, R, self._shortcuts.to(M.dtype)

    @property
    def has_shortcut(self) -> bool:
        return self.pulls_back or len(self._passing) > 0

    @property
    def gathered(self) -> int:
        """Patches that are no group's first: columns of the product in `compress`."""
        return len(self._rest)

    def bound(self, _: Tensor) -> TokenMerge:
        """What compresses a batch: the same for all."""
        return self

    def _products(self) -> bool:
        return self.way == "products" or torch.is_grad_enabled()

    def compress(self, x: Tensor) -> Tensor:
        """M x: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            if self.folded is not None:
                return self.folded.to(x.dtype) @ x
            if self._products():
                return self.matrices()[0].to(x.dtype) @ x
            merge = self.merge.to(x.dtype)
            weight = torch.cat([merge.new_ones(self.prefix), merge[self._first]])
            z = x.index_select(1, self._firsts) * weight[:, None]
            if not len(self._rest):
                return z
            weight = (self._belongs * merge[self._rest]).expand(x.shape[0], -1, -1)
            return torch.baddbmm(z, weight, x.index_select(1, self._others))

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """R out + s x, less R z of groups with a shortcut: out, z (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            out = out.to(x.dtype)
            if self.hands_on == "tokens":
                return out
            if self.pulls_back:
                out = out - self._divided * z
            if self._products():
                _, R, s = (t.to(x.dtype) for t in self.matrices())
                return torch.baddbmm(s[:, None] * x, R.expand(x.shape[0], -1, -1), out)
            if len(self._passing):
                out = torch.cat([out, x.index_select(1, self._passing)], 1)
            weight = torch.where(self._weightless, 1, self.reconstruct.to(x.dtype))
            weight = torch.cat([weight.new_ones(self.prefix), weight])
            out = out.index_select(1, self._source) * weight[:, None]
            return torch.addcmul(out, x, self._belated) if self.pulls_back else out


class DenseTokenMerge(nn.Module):
    """M and R as the published code trains them: full matrices without a support to keep (`--dense_merge`).

    `skip` (T,) bool marks the patches that pass by.
    """

    bias: Tensor | None = None  # of attention's scores

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        self.merge_matrix = nn.Parameter(torch.empty(tokens, total))
        self.reconstruct_matrix = nn.Parameter(torch.empty(total, tokens))
        self.register_buffer("skip", torch.empty(total, dtype=torch.bool))
        self.reset()

    def reset(self) -> None:
        """Means of evenly spread groups of neighbours."""
        if not self.skip.is_meta:
            self.set(TokenMerge(self.tokens, self.total, self.prefix).to(self.skip.device))

    @torch.no_grad()
    def set(self, sparse: TokenMerge) -> None:
        """The matrices of a structure with support, in which only skipped patches have a shortcut."""
        M, R, s = sparse.matrices()
        self.merge_matrix.copy_(M)
        self.reconstruct_matrix.copy_(R)
        self.skip.copy_(s.bool())

    def bound(self, _: Tensor) -> DenseTokenMerge:
        """What compresses a batch: the same for all."""
        return self

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s): (K, T), (T, K) and (T,)."""
        return self.merge_matrix, self.reconstruct_matrix, self.skip.to(self.merge_matrix.dtype)

    def compress(self, x: Tensor) -> Tensor:
        """M x: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.merge_matrix.to(x.dtype) @ x

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """R out + s x: out (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            R, s = self.reconstruct_matrix.to(x.dtype), self.skip.to(x.dtype)
            return torch.baddbmm(s[:, None] * x, R.expand(x.shape[0], -1, -1), out.to(x.dtype))


def merging(tokens: int, total: int, prefix: int, kwargs: dict[str, Any]) -> nn.Module | None:
    """The compression of a block that computes on `tokens` of `total`, or None for all of them.

    kwargs: of the model; those of COMPRESSIONS say of which kind it is.
    """
    if tokens == total:
        return None
    if kwargs.get("content_merge"):
        return ContentMerge(tokens, total, prefix)
    return (DenseTokenMerge if kwargs.get("dense_merge") else TokenMerge)(tokens, total, prefix)


class Attention(nn.Module):
    """Multi-head self-attention with independent query/key and value widths.

    The softmax scale is the parent's (`parent_head_dim ** -0.5`), whatever qk remains. `way` is the route through the
    kernels (`models.attention`), None for the fastest; "fused" shows the bare architecture to a counter.
    """

    way: str | None = None

    def __init__(self, embed: int, dims: BlockDims, scale: float, qkv_bias: bool, proj_bias: bool,
                 attn_drop: float, proj_drop: float, head_norm: Any = nn.Identity) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.qk, self.v, self.scale = dims.heads, dims.qk, dims.v, scale
        self.qkv = nn.Linear(embed, dims.heads * (2 * dims.qk + dims.v), bias=qkv_bias)
        self.q_norm, self.k_norm = head_norm(dims.qk), head_norm(dims.qk)
        self.attn_drop = attn_drop
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
        return attend(q, k, v, self.scale, self.attn_drop if self.training else 0.0, self.way, bias)

    def forward(self, x: Tensor, queries: int | None = None, bias: Tensor | None = None) -> Tensor:
        """queries: only the first so many tokens ask, and are answered, None for all; bias: that of `mix`."""
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
    has refused any other value. read: how many of the first tokens ask, None for all; the others are keys alone, and
    come out as they went in, or with `alone` (`models.tokens.streamline_`) not at all.
    """

    read: int | None = None
    alone: bool = False

    def __init__(self, *, dims: BlockDims, scale: float, dim: int, norm_layer: Any, qkv_bias: bool = False,
                 proj_bias: bool = True, init_values: float | None = None, proj_drop: float = 0.0,
                 attn_drop: float = 0.0, drop_path: float = 0.0, act_layer: Any = nn.GELU, qk_norm: bool = False,
                 tokens: nn.Module | None = None, **_: Any) -> None:  # fmt: skip
        super().__init__()
        self.dims, self.tokens = dims, tokens
        if dims.heads:
            self.norm1 = norm_layer(dim)
            head_norm = partial(nn.LayerNorm, eps=self.norm1.eps) if qk_norm else nn.Identity
            self.attn = Attention(dim, dims, scale, qkv_bias, proj_bias, attn_drop, proj_drop, head_norm)
            self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
            self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if dims.mlp:
            self.norm2 = norm_layer(dim)
            self.mlp = Mlp(dim, dims.mlp, act_layer=act_layer, bias=proj_bias, drop=proj_drop)
            self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            out = self.branches(x)
        else:
            tokens = self.tokens.bound(x)
            z = tokens.compress(x)
            out = self.branches(z, tokens.bias)
            out = tokens.restore(out, z, x) if self.read is None else out  # prefix tokens are never merged
        if self.read is None or self.alone:
            return out
        return torch.cat([out.to(x.dtype), x[:, self.read :]], 1)

    def branches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention, its scores with a bias per key, and MLP, on all tokens or on those that compression leaves."""
        wanted = x if self.read is None else x[:, : self.read]
        if self.dims.heads:
            wanted = wanted + self.drop_path1(self.ls1(self.attn(self.norm1(x), self.read, bias)))
        if self.dims.mlp:
            wanted = wanted + self.drop_path2(self.ls2(self.mlp(self.norm2(wanted))))
        return wanted  # B N E


def build(config: dict[str, Any]) -> nn.Module:
    """The model that config.json describes, with fresh weights: timm's, but for the blocks."""
    blocks = [BlockDims(**block) for block in config["dims"]["blocks"]]
    left, kwargs = iter(blocks), dict(config["arch"]["kwargs"])
    ours = {name: kwargs.pop(name, False) for name in COMPRESSIONS}

    def block(**timm_kwargs: Any) -> Block:
        dims = next(left)
        tokens = merging(dims.tokens, config["tokens"], config["prefix_tokens"], ours)
        return Block(dims=dims, scale=config["scale"], tokens=tokens, **timm_kwargs)

    model = timm.create_model(
        config["arch"]["name"],
        **kwargs | dict(embed_dim=config["dims"]["embed"], depth=len(blocks)),
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        block_fn=block,
    )
    if ours["lean_last"] and blocks:
        model.blocks[-1].read = config["prefix_tokens"]
    return model


def load(folder: Path = HERE) -> nn.Module:
    """The model with its weights, in eval mode: images (B, 3, H, W) -> logits (B, classes)."""
    model = build(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def transform(folder: Path = HERE) -> Callable:
    """What prepares a PIL image for the model."""
    return create_transform(**json.loads((folder / "config.json").read_text())["preprocess"])
