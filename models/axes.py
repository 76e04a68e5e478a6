"""Which axes every parameter of a plain timm ViT carries: the one table that masks, saliency, compaction, counts read.

An *axis* is a set of units that are removed together wherever they appear: `embed` (one for the whole model) and
`heads`, `qk`, `v`, `mlp` of each block, written `blocks.3.qk`. A *segment* is a product of axes, the outer one first:
("heads", "qk") is timm's row order (h q). A dimension of a parameter is the concatenation of its segments; a dimension
with none is never cut.
"""
from __future__ import annotations

import re

Segment = tuple[str, ...]
Dim = tuple[Segment, ...]

FIXED: Dim = ()
EMBED: Dim = (("embed",),)
QKV: Dim = (("heads", "qk"), ("heads", "qk"), ("heads", "v"))  # fused rows: q of all heads, k of all, v of all
HEADS_V: Dim = (("heads", "v"),)
MLP: Dim = (("mlp",),)

OUTSIDE: dict[str, tuple[Dim, ...]] = {
    "patch_embed.proj.weight": (EMBED, FIXED, FIXED, FIXED),
    "patch_embed.proj.bias": (EMBED,),
    "cls_token": (FIXED, FIXED, EMBED),
    "dist_token": (FIXED, FIXED, EMBED),
    "reg_token": (FIXED, FIXED, EMBED),
    "pos_embed": (FIXED, FIXED, EMBED),
    **{f"{norm}.{p}": (EMBED,) for norm in ("norm_pre", "norm", "fc_norm") for p in ("weight", "bias")},
    "head.weight": (FIXED, EMBED),
    "head.bias": (FIXED,),
    "head_dist.weight": (FIXED, EMBED),
    "head_dist.bias": (FIXED,),
}
BLOCK: dict[str, tuple[Dim, ...]] = {
    **{f"{norm}.{p}": (EMBED,) for norm in ("norm1", "norm2") for p in ("weight", "bias")},
    "attn.qkv.weight": (QKV, EMBED),
    "attn.qkv.bias": (QKV,),
    **{f"attn.{norm}.{p}": (FIXED,) for norm in ("q_norm", "k_norm") for p in ("weight", "bias")},  # over all of qk
    "attn.proj.weight": (EMBED, HEADS_V),
    "attn.proj.bias": (EMBED,),
    "ls1.gamma": (EMBED,),
    "mlp.fc1.weight": (MLP, EMBED),
    "mlp.fc1.bias": (MLP,),
    "mlp.fc2.weight": (EMBED, MLP),
    "mlp.fc2.bias": (EMBED,),
    "ls2.gamma": (EMBED,),
    **{f"tokens.{p}": (FIXED,) for p in ("merge", "reconstruct")},
    **{f"tokens.{p}": (FIXED, FIXED) for p in ("merge_matrix", "reconstruct_matrix")},
}
BRANCH = dict(norm1="heads", attn="heads", ls1="heads", norm2="mlp", mlp="mlp", ls2="mlp")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def axes_of(parameter: str) -> tuple[Dim, ...]:
    """Axes of each dimension of a parameter, by its timm name. Raises KeyError for a name that no plain ViT has."""
    if not (match := _IN_BLOCK.fullmatch(parameter)):
        return OUTSIDE[parameter]
    block, local = match.groups()

    def name(axis: str) -> str:
        return axis if axis == "embed" else f"blocks.{block}.{axis}"

    return tuple(tuple(tuple(map(name, segment)) for segment in dim) for dim in BLOCK[local])


def branch_of(parameter: str) -> str | None:
    """The axis whose emptiness removes this parameter's whole branch (`blocks.3.heads`); None where there is none."""
    match = _IN_BLOCK.fullmatch(parameter)
    branch = match and BRANCH.get(match[2].split(".")[0])  # token compression stays when both branches go
    return branch and f"blocks.{match[1]}.{branch}"
