"""An architecture as a value, and plain Vision Transformers and Swin Transformers under one name for what both have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from models import count, parents, swin, vit
from models.dims import ViTDims
from models.parents import ModelError
from models.swin_dims import Dims, SwinDims
from models.tokens import COMPRESSIONS

Model = VisionTransformer | SwinTransformer
MERGES = dict(place="", dense="dense_merge", content="content_merge")  # and the argument by which files call each


@dataclass(frozen=True)
class Arch:
    """timm's model by name and arguments, and how this project compresses its tokens: everything but the widths.

    arguments: timm's own, as canonical JSON; merge: how blocks of fewer tokens merge them (a key of MERGES); lean:
    whether the last block computes only what the head reads. Equal architectures are equal values.
    """

    name: str
    arguments: str = "{}"
    merge: str = "place"
    lean: bool = False

    @classmethod
    def of(cls, name: str, **kwargs: Any) -> Arch:
        """From timm's name and arguments, among them dense_merge, content_merge and lean_last as files hold them.

        Raises ModelError for arguments that are not plain values.
        """
        own = {key: kwargs.pop(key, False) for key in COMPRESSIONS}
        merge = next((merge for merge, key in MERGES.items() if key and own[key]), "place")
        try:
            return cls(name, json.dumps(kwargs, sort_keys=True), merge, bool(own["lean_last"]))
        except TypeError as error:
            raise ModelError(f"{name}: model arguments must be plain values ({error})") from None

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Arch:
        """From what checkpoints hold under `arch`."""
        return cls.of(record["name"], **record["kwargs"])

    @classmethod
    def of_model(cls, model: Model) -> Arch:
        """That of a model of this project."""
        return cls.of(model.arch, **model.arch_kwargs)

    @property
    def timm_kwargs(self) -> dict[str, Any]:
        """timm's own arguments."""
        return json.loads(self.arguments)

    @property
    def kwargs(self) -> dict[str, Any]:
        """timm's arguments and ours, as `build_vit` takes them and files hold them."""
        own = {key: True for merge, key in MERGES.items() if key and merge == self.merge}
        return self.timm_kwargs | own | (dict(lean_last=True) if self.lean else {})

    @property
    def record(self) -> dict[str, Any]:
        """As checkpoints hold it under `arch`."""
        return dict(name=self.name, kwargs=self.kwargs)

    def with_kwargs(self, **kwargs: Any) -> Arch:
        """With other arguments, of timm's or as `of` takes them; None leaves one to its default."""
        return Arch.of(self.name, **{k: v for k, v in (self.kwargs | kwargs).items() if v is not None})

    @property
    def plain(self) -> Arch:
        """timm's own model, without compression of tokens."""
        return Arch(self.name, self.arguments)

    @property
    def without_drops(self) -> Arch:
        """Without rates of dropout and stochastic depth, which a run chooses and a model does not have."""
        return self.with_kwargs(
            **{name: None for name in self.timm_kwargs if "drop" in name and name.endswith("_rate")}
        )

    @property
    def is_swin(self) -> bool:
        """Whether it is a Swin Transformer."""
        return is_swin(self.name)

    @property
    def merges_tokens(self) -> bool:
        """Whether its blocks can compute on fewer tokens."""
        return not self.is_swin

    @property
    def skeleton(self) -> Model:
        """timm's model at full width without storage: `skeleton`. Raises ModelError."""
        return skeleton(self.name, **self.timm_kwargs)

    @property
    def dims(self) -> Dims:
        """Widths of the full-size model, in which every token is a query."""
        return dims_of(self.skeleton)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return getattr(self.skeleton, "num_prefix_tokens", 0)

    @property
    def left_alone(self) -> dict[str, str]:
        """Axes that cannot be pruned (`qk`, in every block), each with the reason."""
        return {} if self.is_swin else parents.left_alone(self.name, **self.timm_kwargs)

    def build(self, dims: Dims | None = None, **kwargs: Any) -> Model:
        """The model with the widths `dims`, by default its own: `build_vit`. kwargs: further ones of timm."""
        return build_vit(self.name, dims, **self.kwargs | kwargs)

    def _parent_and_dims(self, dims: Dims | None) -> tuple[Model, Dims]:
        """A full-width model of as many blocks as `dims`, and the dims with their queries."""
        if self.is_swin:
            parent = self.skeleton
            if dims is not None:
                swin.check_fits(self.name, parent, dims)
            return parent, dims or dims_of(parent)
        deep = self if dims is None else self.with_kwargs(depth=max(1, len(dims.blocks)))
        parent = deep.skeleton
        return parent, vit.settle(self.name, dims or dims_of(parent), deep.kwargs)[0]

    def params(self, dims: Dims | None = None) -> int:
        """Trainable parameters of `build(dims)`."""
        return count.params(*self._parent_and_dims(dims), self.kwargs)

    def macs_formula(self, dims: ViTDims) -> count.MacsFormula:
        """MACs of a plain ViT as a function of its widths; of `dims` only depth, tokens and queries count."""
        return count.MacsFormula.of(*self._parent_and_dims(dims), by_content=self.merge == "content")

    def macs_by_part(self, dims: Dims | None = None) -> dict[str, int]:
        """What `macs` sums: patch_embed, attention, mlp, classifier, and tokens (their compression) or downsampling."""
        return count.macs_by_part(*self._parent_and_dims(dims), by_content=self.merge == "content")

    def macs(self, dims: Dims | None = None) -> int:
        """Multiply-accumulates of one image through `build(dims)`; see `models.count.MacsFormula`."""
        return sum(self.macs_by_part(dims).values())


def is_swin(arch: str) -> bool:
    """Whether timm's model of that name is a Swin Transformer (the first version)."""
    return timm.is_model(arch) and timm.model_entrypoint(arch).__module__ == swin.MODULE


def skeleton(arch: str, **kwargs: Any) -> Model:
    """timm's model at full width without storage (meta device), cached: for names, shapes and counts.

    Raises ModelError for a name timm does not know and for a model that is neither a plain ViT nor a Swin Transformer.
    """
    if is_swin(arch):
        return swin.swin_skeleton(arch, **kwargs)
    if timm.is_model(arch) and (module := timm.model_entrypoint(arch).__module__).startswith(swin.MODULE):
        raise ModelError(f"{arch} is not a Swin Transformer of the first version: it is built by {module}")
    return parents.skeleton(arch, **kwargs)


def build_vit(arch: str, dims: Dims | None = None, **kwargs: Any) -> Model:
    """timm's model `arch` with the widths `dims` (default: its own): `models.vit.build_vit`, `models.swin.build_swin`.

    Raises ModelError.
    """
    kind = SwinDims if is_swin(arch) else ViTDims
    if dims is not None and not isinstance(dims, kind):
        raise ModelError(f"{arch} takes {kind.__name__}, not {type(dims).__name__}")
    return swin.build_swin(arch, dims, **kwargs) if kind is SwinDims else vit.build_vit(arch, dims, **kwargs)


@torch.no_grad()
def build_empty(arch: Arch, dims: Dims | None, device: torch.device) -> Model:
    """`arch.build(dims)` without timm's initialisation, which takes longer than the rest: parameters hold anything."""
    with torch.device("meta"):
        model = arch.build(dims)
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return model


def dims_of(model: Model) -> Dims:
    """Widths of a model of this project, or of one of timm's."""
    return SwinDims.of(model) if isinstance(model, SwinTransformer) else ViTDims.of(model)


def left_alone(arch: str, **kwargs: Any) -> dict[str, str]:
    """Axes of a model that cannot be pruned: `Arch.left_alone`."""
    return Arch.of(arch, **kwargs).left_alone


def params(arch: str, dims: Dims | None = None, **kwargs: Any) -> int:
    """Trainable parameters of `build_vit(arch, dims, **kwargs)`."""
    return Arch.of(arch, **kwargs).params(dims)


def macs(arch: str, dims: Dims | None = None, **kwargs: Any) -> int:
    """Multiply-accumulates of one image through `build_vit(arch, dims, **kwargs)`; see `models.count.MacsFormula`."""
    return Arch.of(arch, **kwargs).macs(dims)
