"""timm's Swin Transformers with free widths in every stage and block.

timm builds the model; its blocks, LayerNorms and the layers between stages are put in anew at their widths. Parameter
names and the fused qkv row order are timm's. Legend: B images, n windows of an image, N tokens of a window, E embed,
H heads.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from timm.layers import ClassifierHead, Mlp
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
)
from torch import Tensor, nn

from models.attention import by_kernel
from models.dims import MOST_BLOCKS, BlockDims
from models.norms import LayerNorm
from models.parents import ModelError
from models.swin_dims import MOST_STAGES, SwinDims
from models.vit import Attention

MODULE = "timm.models.swin_transformer"
MOST_BUFFERS = 100_000_000  # values: the masks and indices of windows grow with sizes that no weight tells


class ShiftedAttention(Attention):
    """Attention inside windows with a bias by relative position, of independent query/key and value widths."""

    def __init__(self, embed: int, dims: BlockDims, parent: WindowAttention) -> None:
        super().__init__(
            embed, dims, parent.scale, parent.qkv.bias is not None, True, parent.attn_drop.p, parent.proj_drop.p
        )
        self.window_size = height, width = parent.window_size
        table = torch.empty((2 * height - 1) * (2 * width - 1), dims.heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", None, persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute what follows from the window."""
        device = self.relative_position_bias_table.device
        self.relative_position_index = get_relative_position_index(*self.window_size, device=device)

    def bias(self, mask: Tensor | None) -> Tensor:
        """What is added to the scores: (1, H, N, N), or (1, n H, N, N) under a mask of (n, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # H N N
        if mask is None:
            return bias.unsqueeze(0).contiguous()
        return (bias + mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B n, N, E), mask: 0 and -100, (n, N, N) or None -> (B n, N, E)."""
        rows, N, _ = x.shape
        H, qk, width = self.num_heads, self.qk, self.v
        windows = 1 if mask is None else len(mask)

        def split(t: Tensor) -> Tensor:
            return t.reshape(-1, windows, N, H, t.shape[-1] // H).transpose(2, 3).flatten(1, 2)  # B nH N d

        q, k, v = map(split, self.qkv(x).split([H * qk, H * qk, H * width], dim=-1))
        dropout = self.attn_drop if self.training else 0.0
        out = by_kernel(q, k, v, self.scale, dropout, self.bias(mask).to(q.dtype), padded=self.route != "fused")
        out = out.unflatten(1, (windows, H)).transpose(2, 3)  # B n N H v
        return self.proj_drop(self.proj(out.reshape(rows, N, H * width)))


class Block(SwinTransformerBlock):
    """timm's block with the widths of `dims`. A branch of width 0 is not built.

    parent: the full-width block, for everything that is no width. Changes construction, and `forward` to leave out a
    branch.
    """

    def __init__(self, embed: int, dims: BlockDims, parent: SwinTransformerBlock) -> None:
        nn.Module.__init__(self)
        for name in (
            "input_resolution",
            "target_shift_size",
            "always_partition",
            "dynamic_mask",
            "window_size",
            "shift_size",
            "window_area",
            "mlp_ratio",
        ):
            setattr(self, name, getattr(parent, name))
        self.dim, self.dims = embed, dims
        norm = partial(LayerNorm, eps=parent.norm1.eps)
        drops = [copy.deepcopy(drop) for drop in (parent.drop_path1, parent.drop_path2)]
        self.register_buffer("attn_mask", None, persistent=False)
        if dims.heads:
            self.norm1, self.drop_path1 = norm(embed), drops[0]
            self.attn = ShiftedAttention(embed, dims, parent.attn)
        if dims.mlp:
            self.norm2, self.drop_path2 = norm(embed), drops[1]
            self.mlp = Mlp(embed, dims.mlp, act_layer=type(parent.mlp.act), drop=parent.mlp.drop1.p)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the mask between what the shift brings together."""
        if self.dims.heads and not self.dynamic_mask:
            weight = self.norm1.weight
            self.attn_mask = self.get_attn_mask(device=weight.device, dtype=weight.dtype)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        raise ModelError("the image size of a model of pruned widths is that of its checkpoint")

    def forward(self, x: Tensor) -> Tensor:
        if self.dims.heads:
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        if self.dims.mlp:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x  # B height width E


def _why_not_swin(model: nn.Module) -> str | None:
    """What keeps a timm model from being pruned by width here, or None."""
    if type(model) is not SwinTransformer:
        return f"it is a {type(model).__name__}"
    if any(not len(stage.blocks) for stage in model.layers):
        return "a stage of it has no blocks"
    if (buffers := sum(b.numel() for b in model.buffers())) > MOST_BUFFERS:
        return f"the masks of its windows hold {buffers:,} values, of at most {MOST_BUFFERS:,}"
    dims = SwinDims.of(model)
    for name, _ in model.named_parameters():
        try:
            dims.axes_of(name)
        except KeyError:
            return f"its parameter {name} is not part of a Swin Transformer"
    return None


def _timm(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without the dropout behind a position embedding, which a Swin Transformer has none of."""
    return {k: v for k, v in kwargs.items() if k != "pos_drop_rate"}


@lru_cache(maxsize=32)
def _skeleton(arch: str, kwargs_json: str) -> SwinTransformer:
    try:
        with torch.device("meta"):
            model = timm.create_model(arch, **json.loads(kwargs_json))
        reason = _why_not_swin(model)
    except (TypeError, AssertionError, RuntimeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ModelError(f"timm cannot build {arch} with {kwargs_json}: {error}") from error
    if reason:
        raise ModelError(f"{arch} is not a Swin Transformer that can be pruned: {reason}")
    return model


def swin_skeleton(arch: str, **kwargs: Any) -> SwinTransformer:
    """As `models.parents.skeleton`, of a Swin Transformer."""
    depths = kwargs.get("depths", ())
    whole = isinstance(depths, list | tuple) and all(isinstance(n, int) for n in depths)
    if not whole or len(depths) > MOST_STAGES or sum(depths) > MOST_BLOCKS:  # before timm builds them
        raise ModelError(
            f"{arch}: depths must be up to {MOST_STAGES} whole numbers, of {MOST_BLOCKS:,} blocks in all, "
            f"not {str(depths)[:60]}"
        )
    try:
        return _skeleton(arch, json.dumps(_timm(kwargs), sort_keys=True))
    except TypeError as error:
        raise ModelError(f"{arch}: model arguments must be plain values ({error})") from None


def check_fits(arch: str, parent: SwinTransformer, dims: SwinDims) -> None:
    """Raises ModelError where `dims` have other stages, blocks or resolutions than the full-width model."""
    own, given = ([[b.tokens for b in stage.blocks] for stage in d.stages] for d in (SwinDims.of(parent), dims))
    if own == given:
        return
    depths = [[len(stage) for stage in d] for d in (own, given)]
    if depths[0] != depths[1]:
        raise ModelError(f"{arch} has stages of {depths[0]} blocks, the dims have {depths[1]}")
    raise ModelError(f"the dims are of {arch} at another image size: blocks of {given[0][0]} tokens, not {own[0][0]}")


def stem_of(parent: SwinTransformer, embed: int) -> nn.Module:
    """The patch embedding of a full-width model at another width: images -> (B, height, width, E)."""
    stem, proj = copy.deepcopy(parent.patch_embed), parent.patch_embed.proj
    stem.proj = nn.Conv2d(proj.in_channels, embed, proj.kernel_size, proj.stride, bias=proj.bias is not None)
    stem.norm = LayerNorm(embed, eps=parent.patch_embed.norm.eps)
    return stem


def tail_of(parent: SwinTransformer, embed: int) -> tuple[nn.Module, nn.Module]:
    """The last norm and the classifier of a full-width model at another width: (B, height, width, E) -> logits."""
    head = ClassifierHead(
        embed,
        parent.num_classes,
        pool_type=parent.global_pool,
        drop_rate=parent.head.drop.p,
        input_fmt=parent.output_fmt,
    )
    return LayerNorm(embed, eps=parent.norm.eps), head


def build_swin(arch: str, dims: SwinDims | None = None, **kwargs: Any) -> SwinTransformer:
    """timm's model `arch` with the widths `dims` (default: its own), initialised as timm does.

    As `models.vit.build_vit`: kwargs are timm's and describe the parent, whose head widths set the softmax scales, and
    the result carries `dims`, `arch` and `arch_kwargs`. Raises ModelError.
    """
    pretrained = kwargs.pop("pretrained", False)
    parent = swin_skeleton(arch, **kwargs)
    dims = dims or SwinDims.of(parent)
    check_fits(arch, parent, dims)
    model, norm = copy.deepcopy(parent), partial(LayerNorm, eps=parent.norm.eps)
    embeds = [stage.embed for stage in dims.stages]
    model.patch_embed = stem_of(parent, embeds[0])
    for i, (stage, widths, info) in enumerate(zip(model.layers, dims.stages, model.feature_info, strict=True)):
        stage.dim = embeds[max(0, i - 1)]
        if i:
            stage.downsample = PatchMerging(embeds[i - 1], embeds[i], norm)
        blocks = zip(widths.blocks, parent.layers[i].blocks, strict=True)
        stage.blocks = nn.Sequential(*(Block(embeds[i], b, of) for b, of in blocks))
        info["num_chs"] = embeds[i]
    model.norm, model.head = tail_of(parent, embeds[-1])
    model.embed_dim, model.num_features = embeds[0], embeds[-1]
    model.head_hidden_size = embeds[-1] * model.head.global_pool.feat_mult()
    model.init_weights(needs_reset=False)
    if pretrained:
        model.load_state_dict(timm.create_model(arch, pretrained=True, **_timm(kwargs)).state_dict())
    model.dims, model.arch, model.arch_kwargs = dims, arch, kwargs
    return model
