"""From files to models: this project's checkpoints, and the dense weights a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from files import checkpoint, schema
from files.checkpoint import CheckpointError
from models import hub
from models.arch import Arch, Model
from models.axes import Axis
from models.compact import compact
from models.dims import DimsError
from models.masks import Masks
from models.parents import ModelError
from models.swin_dims import Dims, dims_from_dict
from models.tokens import train_matrices_


def _fill(model: Model, state: dict[str, torch.Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"the weights of {path} do not fit its architecture: {' '.join(lines[1:3])[:300]}"
        ) from None


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
        grid = student.patch_embed.grid_size if has_tokens(content["masks"]) and not arch.is_swin else None
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


def read_initial(path: str | Path) -> tuple[str | None, dict[str, Any], dict[str, torch.Tensor]]:
    """(timm name or None, its kwargs, state dict) of a dense starting point.

    Accepts {"arch", "kwargs", "model"}, DeiT's {"model": state dict} and a bare state dict. Raises CheckpointError.
    """
    content = checkpoint.read(path)
    arch, kwargs = content.get("arch"), content.get("kwargs", {})
    if isinstance(arch, dict):  # a checkpoint of this project: full-width ones can start a run
        if content.get("masks") is not None:
            raise CheckpointError(f"{path} is a pruned checkpoint; give it to finetune_dense.py --finetune")
        arch, kwargs = arch.get("name"), arch.get("kwargs", {})
    state = content.get("model", content)
    tensors = isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not isinstance(kwargs, dict) or not isinstance(arch, str | None):
        raise CheckpointError(f"{path} holds no state dict: expected the keys arch, kwargs and model, or model alone")
    if name := checkpoint.not_finite(state):
        raise CheckpointError(f"{path} cannot be used: {name} is not finite")
    return arch, kwargs, state


def check_initial(arch: Arch, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises CheckpointError where the model that was named is larger than the weights, classifiers aside."""
    named = arch.skeleton.named_parameters()
    expected = sum(p.numel() for name, p in named if not name.startswith("head"))
    _check_size(state, expected, path)


def load_initial_(model: Model, state: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Load a dense state dict into a full-width model; returns the classifier weights left fresh: other classes.

    Raises CheckpointError when anything but the classifier does not fit.
    """
    own = model.state_dict()
    fresh = [k for k in state if k.startswith("head") and k in own and own[k].shape != state[k].shape]
    _fill(model, {k: own[k] if k in fresh else v for k, v in state.items()}, path)
    return fresh


def read_dims(path: str) -> Dims:
    """Widths from a `dims.json`. Raises ValueError."""
    try:
        return dims_from_dict(schema.read_json(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}").lstrip(": ")
        raise ValueError(f"{path} is no dims.json: {reason}") from None
