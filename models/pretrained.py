"""From files to models: this project's checkpoints, and the dense weights a run starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from files import checkpoint, schema
from files.checkpoint import CheckpointError
from models import foreign, hub
from models.arch import Arch, Model
from models.axes import Axis
from models.compact import compact
from models.dims import DimsError
from models.masks import Masks
from models.parents import ModelError
from models.swin_dims import Dims, dims_from_dict
from models.tokens import train_matrices_


def _fill(model: Model, state: dict[str, torch.Tensor], path: str | Path) -> None:
    if reason := foreign.mismatch(model.state_dict(), state):
        raise CheckpointError(f"the weights of {path} do not fit its architecture: {reason}")
    model.load_state_dict(state)


def _check_size(weights: dict[str, torch.Tensor], expected: int, path: str | Path) -> None:
    """Raises CheckpointError where a described model is larger than the weights: it must not be built first."""
    if (count := sum(t.numel() for t in weights.values())) < expected:
        raise CheckpointError(
            f"the weights of {path} do not fit its architecture: it has {expected:,} parameters, they are {count:,}"
        )


def full_dims(dims: Dims, masks: dict[str, torch.Tensor], total: int) -> Dims:
    """Widths before pruning, from the lengths of the masks: the model that was pruned may have been a compact one.

    A block whose tokens have a mask had all `total` of them.
    """
    tokens = {axis: total for axis in (str(Axis("tokens", i)) for i in range(len(dims.blocks))) if axis in masks}
    return dims.resized({axis: len(masks[axis]) for axis in dims.sizes()} | tokens)


def has_tokens(masks: dict[str, torch.Tensor]) -> bool:
    """Whether masks of a checkpoint are over tokens too."""
    return any(axis.endswith(".tokens") for axis in masks)


def from_checkpoint(content: dict[str, Any], path: str | Path, ema: bool = False, **overrides: Any) -> Model:
    """The compact model of a loaded checkpoint; ema: its moving average; `overrides` are timm kwargs (drop rates)."""
    weights = content["model_ema" if ema else "model"]
    if weights is None:
        raise CheckpointError(f"checkpoint {path} holds no moving average of the weights")
    try:
        arch = Arch.of_record(content["arch"]).with_kwargs(**overrides)
        dims = dims_from_dict(content["dims"])
        if content["masks"] is None:
            _check_size(weights, arch.params(dims), path)
            model = arch.build(dims)
            _fill(model, weights, path)
            return model
        total = arch.skeleton.patch_embed.num_patches + arch.prefix
        parent = full_dims(dims, content["masks"], total)
        _check_size(weights, arch.params(parent), path)
        student = arch.build(parent)
        grid = student.patch_embed.grid_size if has_tokens(content["masks"]) and arch.merges_tokens else None
        masks = Masks(student.dims, grid=grid)
        masks.load_state_dict(content["masks"])
        masks.install_tokens_(student)
        _fill(student, weights, path)
        if masks.dims.with_queries(None) != dims.with_queries(None):  # older files do not hold queries
            raise CheckpointError(f"checkpoint {path} contradicts itself: its masks keep other widths than its dims")
        masks.install_(student)
        small = compact(student, masks)
        train_matrices_(small)  # frozen only while the structure may still change
        return small
    except CheckpointError:
        raise
    except (DimsError, ModelError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} describes no model that can be built: {error}") from None


def load_dense(path: str | Path, device: torch.device | str = "cpu", ema: bool = False) -> Model:
    """Any checkpoint of this project as a compact model in eval mode; `model.dims` is its ViTDims or SwinDims.

    `model.data_config` says how its images are prepared, as `timm.data.create_transform` takes it; None in older files.
    A pruned checkpoint is compacted first; ema takes the moving average of the weights. `path` may also be a folder
    that tools.export has written, or hf-hub:OWNER/NAME. Raises CheckpointError.
    """
    content = hub.read_folder(path) if hub.is_folder(path) else checkpoint.load_model(path)
    model = from_checkpoint(content, path, ema).to(device).eval()
    model.data_config = content.get("data_config")
    return model


@dataclass(frozen=True)
class Initial:
    """A dense starting point: timm's name or None, timm's arguments, weights, and what was done to them, as sentences.

    classes: the names of the classes that it was trained on, where the file holds them.
    """

    arch: str | None
    kwargs: dict[str, Any]
    state: dict[str, torch.Tensor] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def find_initial(path: str | Path, ema: bool = False) -> Initial:
    """A dense starting point, of this project or as other programs save it: `models.foreign`. Raises CheckpointError.

    ema: its moving average of the weights.
    """
    content, notes = checkpoint.read(path), []
    arch, kwargs = content.get("arch"), content.get("kwargs", {})
    if isinstance(arch, dict):  # a checkpoint of this project: full-width ones can start a run
        if content.get("masks") is not None:
            raise CheckpointError(f"{path} is a pruned checkpoint; give it to finetune_dense.py --finetune")
        arch, kwargs = arch.get("name"), arch.get("kwargs", {})
        state = content.get("model_ema" if ema else "model")
        if ema and state is None:
            raise CheckpointError(f"--use-ema: {path} holds no moving average of the weights")
        if not foreign.is_state(state):
            raise CheckpointError(f"{path} holds no state dict under model")
    else:
        if "kwargs" not in content:  # other programs have names that are not timm's
            arch = arch if isinstance(arch, str) and timm.is_model(arch) else None
        state, notes = foreign.extract(content, str(path), ema)
    if not isinstance(kwargs, dict) or not isinstance(arch, str | None):
        raise CheckpointError(f"{path} describes no model: arch must be a timm name, and kwargs its arguments")
    if name := checkpoint.not_finite(state):
        raise CheckpointError(f"{path} cannot be used: {name} is not finite")
    args = content.get("args") if checkpoint.is_ours(content) else None
    return Initial(arch, kwargs, state, notes, list((args or {}).get("class_names") or []))


def read_initial(path: str | Path) -> tuple[str | None, dict[str, Any], dict[str, torch.Tensor]]:
    """(timm name or None, its kwargs, state dict) of a dense starting point: `find_initial`."""
    initial = find_initial(path)
    return initial.arch, initial.kwargs, initial.state


def check_initial(arch: Arch, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises CheckpointError where the model that was named is larger than the weights, classifiers aside."""
    skeleton = arch.skeleton
    expected = sum(p.numel() for name, p in skeleton.named_parameters() if not name.startswith("head"))
    try:
        _check_size(state, expected, path)
    except CheckpointError as error:
        own = {name: t for name, t in skeleton.state_dict().items() if not name.startswith("head")}
        raise CheckpointError(f"{error}; {foreign.mismatch(own, state)}") from None


def load_initial_(model: Model, state: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Load a dense state dict into a full-width model; returns the classifier weights left fresh: none, or others.

    Raises CheckpointError when anything but the classifier does not fit.
    """
    own = model.state_dict()
    fresh = [k for k in own if k.startswith("head") and (k not in state or own[k].shape != state[k].shape)]
    _fill(model, state | {k: own[k] for k in fresh}, path)
    return fresh


def read_dims(path: str) -> Dims:
    """Widths from a `dims.json`. Raises ValueError."""
    try:
        return dims_from_dict(schema.read_json(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}").lstrip(": ")
        raise ValueError(f"{path} is no dims.json: {reason}") from None
