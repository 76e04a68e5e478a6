"""The architecture of a Vision Transformer as a value: every width of every block, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from timm.layers import GluMlp

from models.axes import USUAL, Axis, Dim, Structure, axes_of

MOST = 1_000_000  # of any width; what a model is built from never comes unchecked from a file
MOST_BLOCKS = 1_000


class DimsError(ValueError):
    """Widths that do not describe a model; the message names the block and the width."""


def _whole(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DimsError(f"{name} must be a whole number, not {repr(value)[:40]}")
    if value < minimum:
        raise DimsError(f"{name} must be at least {minimum}, not {value}")
    if value > MOST:
        raise DimsError(f"{name} must be at most {MOST:,}, not {str(value)[:40]}")
    return value


def _check_keys(data: Any, cls: type, what: str) -> None:
    names = [f.name for f in fields(cls) if f.default is MISSING]
    optional = {f.name for f in fields(cls) if f.compare} - set(names)
    if not isinstance(data, dict) or set(data) - optional != set(names):
        given = ", ".join(map(str, data))[:200] if isinstance(data, dict) else type(data).__name__
        raise DimsError(f"{what} needs exactly the keys {', '.join(names)}; found: {given}")


@dataclass(frozen=True)
class BlockDims:
    """Widths of one block. 0 heads: no attention branch; 0 mlp: no MLP branch.

    heads: attention heads; qk, v: query/key and value channels of one head; mlp: hidden channels of the MLP;
    tokens: tokens the block computes on, prefix tokens included; queries: how many of them ask and pass the MLP, the
    first ones, None for all (a last block whose other tokens the head does not read).
    """

    heads: int
    qk: int
    v: int
    mlp: int
    tokens: int
    queries: int | None = None

    def __post_init__(self) -> None:
        width = 1 if _whole("heads", self.heads, 0) else 0
        _whole("qk", self.qk, width)
        _whole("v", self.v, width)
        _whole("mlp", self.mlp, 0)
        _whole("tokens", self.tokens, 1)
        if self.queries is not None and _whole("queries", self.queries, 1) > self.tokens:
            raise DimsError(f"queries must be at most the {self.tokens} tokens, not {self.queries}")

    def to_dict(self) -> dict[str, int]:
        """Plain values; `queries` only where not every token is a query."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_FIELDS = ("heads", "qk", "v", "mlp", "tokens")  # of the published spelling, and the tokens, which it lacks
BLOCK_AXES = ("heads", "qk", "v", "mlp")


@dataclass(frozen=True)
class ViTDims:
    """Widths of a whole model. embed: the residual width, shared by every block.

    structure: which axes parameters carry (`models.axes`); it belongs to the architecture, whose model gives it, and
    is neither stored nor compared.
    """

    embed: int
    blocks: tuple[BlockDims, ...]
    structure: Structure = field(default=USUAL, compare=False, repr=False)

    def __post_init__(self) -> None:
        _whole("embed", self.embed, 1)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if odd := [b for b in self.blocks if not isinstance(b, BlockDims)]:
            raise DimsError(f"blocks must be BlockDims, not {odd[0]!r}")

    @classmethod
    def of(cls, model: Any) -> ViTDims:
        """Widths of a model of this project, or of a plain timm `VisionTransformer`."""
        if isinstance(getattr(model, "dims", None), cls):
            return model.dims
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        blocks = (
            BlockDims(b.attn.num_heads, b.attn.head_dim, b.attn.head_dim, b.mlp.fc2.in_features, tokens)
            for b in model.blocks
        )
        structure = Structure(
            packed=any(isinstance(b.mlp, GluMlp) for b in model.blocks), pooled=model.attn_pool is not None
        )
        return cls(model.embed_dim, tuple(blocks), structure)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and `dims.json`."""
        return dict(embed=self.embed, blocks=[b.to_dict() for b in self.blocks])

    @classmethod
    def from_dict(cls, data: Any) -> ViTDims:
        """The inverse of `to_dict`. Raises DimsError naming what is missing, unknown or out of range."""
        _check_keys(data, cls, "dims")
        if not isinstance(data["blocks"], list | tuple):
            raise DimsError("dims: blocks must be a list")
        if len(data["blocks"]) > MOST_BLOCKS:
            raise DimsError(f"dims: at most {MOST_BLOCKS:,} blocks, not {len(data['blocks']):,}")
        blocks = []
        for i, block in enumerate(data["blocks"]):
            _check_keys(block, BlockDims, f"dims: block {i}")
            try:
                blocks.append(BlockDims(**block))
            except DimsError as error:
                raise DimsError(f"dims: block {i}: {error}") from None
        return cls(data["embed"], tuple(blocks))

    def to_dim(self) -> dict[str, Any]:
        """The published NViT spelling, which lacks token counts."""
        lists = dict(head="heads", QK="qk", V="v", MLP="mlp")
        return dict(EMB=self.embed) | {k: [getattr(b, f) for b in self.blocks] for k, f in lists.items()}

    @classmethod
    def from_dim(cls, dim: Any, tokens: int | Sequence[int]) -> ViTDims:
        """From the published spelling {"EMB": int, "head": [...], "QK": [...], "V": [...], "MLP": [...]}.

        `tokens` is one count for every block, or one per block.
        """
        lists = ("head", "QK", "V", "MLP")
        if not isinstance(dim, dict) or set(dim) != {"EMB", *lists}:
            raise DimsError(f"dim needs exactly the keys EMB, {', '.join(lists)}")
        if not all(isinstance(dim[k], list | tuple) for k in lists):
            raise DimsError(f"dim: {', '.join(lists)} must be lists, one entry per block")
        counts = {k: len(dim[k]) for k in lists}
        if len(set(counts.values())) != 1:
            raise DimsError(f"dim: lists of different lengths: {counts}")
        tokens = [tokens] * counts["head"] if isinstance(tokens, int) else list(tokens)
        if len(tokens) != counts["head"]:
            raise DimsError(f"dim has {counts['head']} blocks but {len(tokens)} token counts")
        widths = [dict(zip(_FIELDS, w, strict=True)) for w in zip(*(dim[k] for k in lists), tokens, strict=True)]
        return cls.from_dict(dict(embed=dim["EMB"], blocks=widths))

    def sizes(self) -> dict[str, int]:
        """Units of every axis, by the axis names of `models.axes`."""
        named = dict(embed=self.embed)
        for i, b in enumerate(self.blocks):
            named |= {str(Axis(kind, i)): getattr(b, kind) for kind in BLOCK_AXES}
        return named

    def resized(self, sizes: dict[str, int]) -> ViTDims:
        """These dims with other widths on the axes that `sizes` has. Raises DimsError."""
        widths: dict[int, dict[str, int]] = {}
        for name, units in sizes.items():
            axis = self._parse(name)
            if axis.block is not None:
                widths.setdefault(axis.block, {})[axis.kind] = units
        blocks = (replace(b, **widths[i]) if i in widths else b for i, b in enumerate(self.blocks))
        return replace(self, embed=sizes.get("embed", self.embed), blocks=tuple(blocks))

    def width(self, axis: str) -> int:
        """Units of one axis; of `blocks.3.tokens`, the tokens."""
        kind, block, _ = self._parse(axis)
        return self.embed if block is None else getattr(self.blocks[block], kind)

    @staticmethod
    def _parse(axis: str) -> Axis:
        """An axis by its name. Raises DimsError for one of a Swin Transformer, which names its stage."""
        parts = Axis.parse(axis)
        if parts.stage is not None:
            raise DimsError(f"{axis} is an axis of a Swin Transformer, not of a plain ViT")
        return parts

    def with_queries(self, queries: int | None) -> ViTDims:
        """These dims with `queries` queries in the last block; None makes every token a query."""
        blocks = [replace(block, queries=None) for block in self.blocks]
        blocks[-1:] = [replace(block, queries=queries) for block in blocks[-1:]]
        return replace(self, blocks=tuple(blocks))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of each stage's axes begin with."""
        return ("",)

    @property
    def stages(self) -> tuple[ViTDims, ...]:
        """What shares one embedding: a plain ViT is one stage, a Swin Transformer has several (`SwinDims`)."""
        return (self,)

    def with_stages(self, stages: Sequence[ViTDims]) -> ViTDims:
        """Dims of this kind, of these stages."""
        return stages[0]

    def axes_of(self, parameter: str) -> tuple[Dim, ...]:
        """Axes of each dimension of a parameter of such a model (`models.axes`)."""
        return axes_of(parameter, structure=self.structure)
