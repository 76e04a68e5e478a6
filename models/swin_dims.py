"""The architecture of a Swin Transformer as a value: stages, each with the widths of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from models.axes import Axis, Dim, axes_of
from models.dims import MOST_BLOCKS, BlockDims, DimsError, ViTDims

MOST_STAGES = 16


@dataclass(frozen=True)
class SwinDims:
    """Widths of a whole model. stages: embedding and blocks of each; a block's `tokens` are the stage's height x width.

    Has what pruning asks of a `ViTDims`: `sizes`, `resized`, `stages`, `with_stages`, `axes_of`, and all `blocks`.
    """

    stages: tuple[ViTDims, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if odd := [s for s in self.stages if not isinstance(s, ViTDims)]:
            raise DimsError(f"stages must be ViTDims, not {odd[0]!r}")
        if not 1 <= len(self.stages) <= MOST_STAGES:
            raise DimsError(f"dims: 1 to {MOST_STAGES} stages, not {len(self.stages):,}")
        if any(block.queries is not None for block in self.blocks):
            raise DimsError("a block of a Swin Transformer takes no `queries`: every token is one")

    @classmethod
    def of(cls, model: Any) -> SwinDims:
        """Widths of a model of this project, or of a timm `SwinTransformer`."""
        if isinstance(getattr(model, "dims", None), cls):
            return model.dims

        def block(b: Any) -> BlockDims:
            heads, (height, width) = b.attn.num_heads, b.input_resolution
            channels = b.attn.qkv.out_features // (3 * heads)
            return BlockDims(heads, channels, channels, b.mlp.fc1.out_features, height * width)

        return cls(tuple(ViTDims(stage.blocks[0].dim, tuple(map(block, stage.blocks))) for stage in model.layers))

    @property
    def blocks(self) -> tuple[BlockDims, ...]:
        """The blocks of all stages."""
        return tuple(chain.from_iterable(stage.blocks for stage in self.stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and `dims.json`."""
        return dict(stages=[stage.to_dict() for stage in self.stages])

    @classmethod
    def from_dict(cls, data: Any) -> SwinDims:
        """The inverse of `to_dict`. Raises DimsError naming what is missing, unknown or out of range."""
        stages = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(stages, list | tuple) or set(data) != {"stages"}:
            raise DimsError("dims of a Swin Transformer need exactly the key stages, a list")
        if len(stages) > MOST_STAGES:
            raise DimsError(f"dims: 1 to {MOST_STAGES} stages, not {len(stages):,}")
        parsed = []
        for i, stage in enumerate(stages):
            try:
                parsed.append(ViTDims.from_dict(stage))
            except DimsError as error:
                raise DimsError(f"stage {i}: {error}") from None
        if (blocks := sum(len(stage.blocks) for stage in parsed)) > MOST_BLOCKS:
            raise DimsError(f"dims: at most {MOST_BLOCKS:,} blocks, not {blocks:,}")
        return cls(tuple(parsed))

    def to_dim(self) -> dict[str, Any]:
        """The published NViT spelling with one entry, a number or a list, for each stage."""
        dims = [stage.to_dim() for stage in self.stages]
        return {key: [dim[key] for dim in dims] for key in dims[0]}

    def sizes(self) -> dict[str, int]:
        """Units of every axis, by the axis names of `models.axes`: `layers.0.embed`, `layers.0.blocks.1.heads`."""
        stages = zip(self.prefixes, self.stages, strict=True)
        return {prefix + axis: n for prefix, stage in stages for axis, n in stage.sizes().items()}

    def resized(self, sizes: dict[str, int]) -> SwinDims:
        """These dims with other widths on the axes that `sizes` has. Raises DimsError."""
        parts: list[dict[str, int]] = [{} for _ in self.stages]
        for name, units in sizes.items():
            axis = Axis.parse(name)
            parts[axis.stage][str(axis._replace(stage=None))] = units
        stages = (stage.resized(part) if part else stage for stage, part in zip(self.stages, parts, strict=True))
        return SwinDims(tuple(stages))

    def width(self, axis: str) -> int:
        """Units of one axis."""
        parts = Axis.parse(axis)
        return self.stages[parts.stage].width(str(parts._replace(stage=None)))

    def with_queries(self, queries: None) -> SwinDims:
        """These dims, in which every token is a query."""
        return self

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of each stage's axes begin with: `layers.0.`, …"""
        return tuple(f"layers.{i}." for i in range(len(self.stages)))

    def with_stages(self, stages: Sequence[ViTDims]) -> SwinDims:
        """Dims of this kind, of these stages."""
        return SwinDims(tuple(stages))

    def axes_of(self, parameter: str) -> tuple[Dim, ...]:
        """Axes of each dimension of a parameter of such a model (`models.axes`)."""
        return axes_of(parameter, len(self.stages))


Dims = ViTDims | SwinDims


def dims_from_dict(data: Any) -> Dims:
    """Dims as `to_dict` makes them, of either kind. Raises DimsError."""
    swin = isinstance(data, dict) and "stages" in data
    return SwinDims.from_dict(data) if swin else ViTDims.from_dict(data)
