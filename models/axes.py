"""Which axes every parameter of a timm ViT carries: the one table that masks, saliency, compaction, counts read.

An *axis* is a set of units that are removed together wherever they appear: `embed` (one for the whole model) and
`heads`, `qk`, `v`, `mlp` of each block, written `blocks.3.qk`. A *segment* is a product of axes, the outer one first:
("heads", "qk") is timm's row order (h q). A dimension of a parameter is the concatenation of its segments; a dimension
with none is never cut.

A Swin Transformer has these axes in every stage, `layers.2.embed` and `layers.2.blocks.0.qk`, as timm names parameters.
The downsampling that begins a stage reads four patches side by side: four times the embedding of the stage before.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Segment = tuple[str, ...]
Dim = tuple[Segment, ...]

FIXED: Dim = ()
EMBED: Dim = (("embed",),)
QKV: Dim = (("heads", "qk"), ("heads", "qk"), ("heads", "v"))  # fused rows: q of all heads, k of all, v of all
HEADS_V: Dim = (("heads", "v"),)
MLP: Dim = (("mlp",),)
PAIRS: Dim = (("mlp",), ("mlp",))  # of a gated MLP packed into one layer: the gates of all units and their values
MERGED: Dim = (("before",),) * 4  # the embedding of the stage before, of a patch and its three neighbours

OUTSIDE: dict[str, tuple[Dim, ...]] = {
    "patch_embed.proj.weight": (EMBED, FIXED, FIXED, FIXED),
    "patch_embed.proj.bias": (EMBED,),
    "cls_token": (FIXED, FIXED, EMBED),
    "dist_token": (FIXED, FIXED, EMBED),
    "reg_token": (FIXED, FIXED, EMBED),
    "pos_embed": (FIXED, FIXED, EMBED),
    **{
        f"{norm}.{p}": (EMBED,)
        for norm in ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
        for p in ("weight", "bias")
    },
    "head.weight": (FIXED, EMBED),
    "head.bias": (FIXED,),
    "head_dist.weight": (FIXED, EMBED),
    "head_dist.bias": (FIXED,),
    "attn_pool.latent": (FIXED, FIXED, FIXED),  # of a pool by attention only what reads the embedding
    "attn_pool.kv.weight": (FIXED, EMBED),
    **{f"attn_pool.{layer}.weight": (FIXED, FIXED) for layer in ("q", "proj", "mlp.fc1", "mlp.fc2")},
    **{f"attn_pool.{layer}.bias": (FIXED,) for layer in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")},
    "attn_pool.norm.weight": (FIXED,),
}
BEHIND_POOL: dict[str, tuple[Dim, ...]] = {"head.weight": (FIXED, FIXED)}
SWIN_OUTSIDE: dict[str, tuple[Dim, ...]] = {
    **{f"patch_embed.proj.{p}": OUTSIDE[f"patch_embed.proj.{p}"] for p in ("weight", "bias")},
    **{f"{norm}.{p}": (EMBED,) for norm in ("patch_embed.norm", "norm") for p in ("weight", "bias")},
    "head.fc.weight": (FIXED, EMBED),
    "head.fc.bias": (FIXED,),
}
DOWNSAMPLE: dict[str, tuple[Dim, ...]] = {
    **{f"downsample.norm.{p}": (MERGED,) for p in ("weight", "bias")},
    "downsample.reduction.weight": (EMBED, MERGED),
}
BLOCK: dict[str, tuple[Dim, ...]] = {
    **{f"{norm}.{p}": (EMBED,) for norm in ("norm1", "norm2") for p in ("weight", "bias")},
    "attn.qkv.weight": (QKV, EMBED),
    "attn.qkv.bias": (QKV,),
    "attn.relative_position_bias_table": (FIXED, (("heads",),)),  # Swin's alone
    **{f"attn.{norm}.{p}": (FIXED,) for norm in ("q_norm", "k_norm") for p in ("weight", "bias")},  # over all of qk
    **{f"attn.norm.{p}": (HEADS_V,) for p in ("weight", "bias")},  # over what all heads pass on
    "attn.proj.weight": (EMBED, HEADS_V),
    "attn.proj.bias": (EMBED,),
    "ls1.gamma": (EMBED,),
    "mlp.fc1.weight": (MLP, EMBED),
    "mlp.fc1.bias": (MLP,),
    **{f"mlp.{layer}.weight": (MLP, EMBED) for layer in ("fc1_g", "fc1_x")},  # of a gated MLP in two layers
    **{f"mlp.{layer}.bias": (MLP,) for layer in ("fc1_g", "fc1_x")},
    **{f"mlp.norm.{p}": (MLP,) for p in ("weight", "bias")},
    "mlp.fc2.weight": (EMBED, MLP),
    "mlp.fc2.bias": (EMBED,),
    "ls2.gamma": (EMBED,),
    **{f"tokens.{p}": (FIXED,) for p in ("merge", "reconstruct")},
    **{f"tokens.{p}": (FIXED, FIXED) for p in ("merge_matrix", "reconstruct_matrix")},
}
PACKED: dict[str, tuple[Dim, ...]] = {"mlp.fc1.weight": (PAIRS, EMBED), "mlp.fc1.bias": (PAIRS,)}
KINDS = ("embed", "heads", "qk", "v", "mlp", "tokens")
BRANCH = dict(norm1="heads", attn="heads", ls1="heads", norm2="mlp", mlp="mlp", ls2="mlp")
_PLACE = re.compile(r"(?:layers\.(\d+)\.)?(?:blocks\.(\d+)\.)?(.+)")


def _take_apart(name: str) -> tuple[int | None, int | None, str]:
    """(stage, block, the rest) of the name of an axis or a parameter; None for what it does not name."""
    stage, block, local = _PLACE.fullmatch(name).groups()
    return stage and int(stage), block and int(block), local


class Structure(NamedTuple):
    """What decides which axes a plain ViT's parameters carry, where their names do not.

    packed: `mlp.fc1` holds two rows of every MLP unit, one of which gates the other; pooled: the classifier reads a
    pool by attention, which has a width of its own.
    """

    packed: bool = False
    pooled: bool = False


USUAL = Structure()


class Axis(NamedTuple):
    """The parts of an axis's name; `str` gives the name (`embed`, `blocks.3.qk`, `layers.2.blocks.0.qk`).

    kind: embed, heads, qk, v, mlp or tokens; block: counted within the stage, None for an embedding; stage: None in a
    plain ViT.
    """

    kind: str
    block: int | None = None
    stage: int | None = None

    @classmethod
    def parse(cls, name: str) -> Axis:
        """The inverse of `str`. Raises ValueError for what is not the name of an axis."""
        match = _PLACE.fullmatch(name)
        if not match or match[3] not in KINDS or (match[3] == "embed") != (match[2] is None):
            raise ValueError(f"{name!r} is not the name of an axis")
        stage, block, kind = _take_apart(name)
        return cls(kind, block, stage)

    def __str__(self) -> str:
        stage = "" if self.stage is None else f"layers.{self.stage}."
        return f"{stage}{self.kind}" if self.block is None else f"{stage}blocks.{self.block}.{self.kind}"


def local_name(parameter: str) -> str:
    """A parameter's name within its block (`attn.qkv.weight`) or stage, or its whole name."""
    return _take_apart(parameter)[2]


def axes_of(parameter: str, stages: int = 0, structure: Structure = USUAL) -> tuple[Dim, ...]:
    """Axes of each dimension of a parameter, by its timm name; stages: of a Swin Transformer, 0 for a plain ViT.

    structure: a plain ViT's. Raises KeyError for a name that no such model has.
    """
    stage, block, local = _take_apart(parameter)
    if block is not None:
        dims = PACKED[local] if structure.packed and local in PACKED else BLOCK[local]
    elif stage is not None:
        dims = DOWNSAMPLE[local]
    elif structure.pooled and parameter in BEHIND_POOL:
        dims = BEHIND_POOL[parameter]
    else:
        dims = (SWIN_OUTSIDE if stages else OUTSIDE)[parameter]
        stage = None if not stages else 0 if parameter.startswith("patch_embed.") else stages - 1

    def name(kind: str) -> str:
        if kind == "before":
            return str(Axis("embed", stage=stage - 1))
        return str(Axis(kind, None if kind == "embed" else block, stage))

    return tuple(tuple(tuple(map(name, segment)) for segment in dim) for dim in dims)


def branch_of(parameter: str) -> str | None:
    """The axis whose emptiness removes this parameter's whole branch (`blocks.3.heads`); None where there is none."""
    stage, block, local = _take_apart(parameter)
    kind = BRANCH.get(local.split(".")[0])  # token compression stays when both branches go
    return None if block is None or kind is None else str(Axis(kind, block, stage))
