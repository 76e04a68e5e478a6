"""Importance of a model's units as files: safetensors for the numbers, JSON for what they are of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from files import schema
from files.atomic import write_atomically
from models import ViTDims
from pruning.gates import COMPONENTS, axes_of_component
from pruning.savit import Importance
from runtime.folders import write_json
from training.sources import structural_kwargs

FORMAT = {"name": "vit-importance", "version": 1}
TENSORS, DESCRIPTION = "importance.safetensors", "importance.json"
HINT = "published pickles are converted by python -m tools.convert_importance"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def model_record(model: nn.Module) -> dict[str, Any]:
    """What importance files must agree with: timm's name and arguments, widths, weights."""
    return dict(
        arch=model.arch,
        kwargs=structural_kwargs(model.arch_kwargs),
        classes=model.num_classes,
        dims=model.dims.with_queries(None).to_dict(),
        weights=weights_digest(model),
    )


def save(folder: Path, importance: Importance, model: dict[str, Any], data: dict[str, Any]) -> None:
    """Write both files. model: see `model_record`, weights None where unknown; data: the pass, in plain values."""
    tensors = {f"score/{axis}": t for axis, t in importance.scores.items()}
    tensors |= {f"gradient/{axis}": t for axis, t in importance.gradients.items()}
    tensors |= {f"fisher/{axis}": t for axis, t in importance.fisher.items()}
    if importance.hessian is not None:
        tensors |= dict(hessian=importance.hessian, hessian_error=importance.error)
    content = safetensors.torch.save({name: t.clone() for name, t in tensors.items()})
    write_atomically(folder / TENSORS, lambda file: file.write(content))
    write_json(
        folder / DESCRIPTION,
        dict(format=FORMAT, model=model, data=data, components=list(importance.components), method=importance.method),
    )


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"importance file {path}: No such file or directory; {HINT}")
    try:
        described = schema.read_json(path)
    except schema.SchemaError as error:
        raise ValueError(f"importance file {error}") from None
    keys = ("format", "model", "data", "components", "method")
    if not isinstance(described, dict) or any(key not in described for key in keys):
        raise ValueError(f"importance file {path} needs the keys {', '.join(keys)}")
    if described["format"] != FORMAT:
        raise ValueError(f"importance file {path} has format {str(described['format'])[:60]}, not {FORMAT}")
    named = described["components"]
    if not isinstance(named, list) or not named or any(name not in COMPONENTS for name in named):
        raise ValueError(f"importance file {path}: components must be some of {', '.join(COMPONENTS)}")
    if not isinstance(described["data"], dict):
        raise ValueError(f"importance file {path}: data must be an object")
    return described


def _check_model(path: Path, given: Any, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        theirs = given.get(key) if isinstance(given, dict) else None
        if theirs == value or key == "weights" and theirs is None:
            continue
        if key in ("dims", "weights"):
            raise ValueError(f"importance files {path} are of another model: its {key} differ")
        raise ValueError(f"importance files {path} are of another model: {key} {theirs!r}, not {value!r}")


def load(folder: str | Path, model: dict[str, Any], data_set: str, method: int) -> Importance:
    """Importance from a folder that `save` wrote, for that model and data set. Raises ValueError where it is not."""
    folder = Path(folder)
    described = _describe(folder)
    _check_model(folder, described["model"], model)
    if (theirs := described["data"].get("data_set")) != data_set:
        raise ValueError(f"importance files {folder} are of the data set {theirs}, not {data_set}")
    if described["method"] != method:
        raise ValueError(f"importance files {folder} are of --pruning_method {described['method']}, not {method}")
    try:
        tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    except OSError as error:
        raise ValueError(f"importance file {folder / TENSORS}: {error.strerror}") from None
    except SafetensorError as error:
        raise ValueError(f"importance file {folder / TENSORS} is no safetensors file: {error}") from None
    components = tuple(described["components"])
    dims = ViTDims.from_dict(model["dims"])
    axes = [axis for c in components for axis in axes_of_component(dims, c)]
    units = [
        {axis: _vector(tensors, f"{kind}/{axis}", dims.sizes()[axis], folder) for axis in axes}
        for kind in ("score", "gradient", "fisher")
    ]
    square = [_interactions(tensors, name, len(components), folder) for name in ("hessian", "hessian_error")]
    return Importance(components, method, *units, *square)


def _vector(tensors: dict[str, Tensor], name: str, length: int, folder: Path) -> Tensor:
    values = tensors.get(name)
    if values is None or values.shape != (length,):
        shape = None if values is None else tuple(values.shape)
        raise ValueError(f"importance file {folder / TENSORS}: {name} has shape {shape}, not ({length},)")
    return _finite(values, name, folder).double()


def _interactions(tensors: dict[str, Tensor], name: str, count: int, folder: Path) -> Tensor | None:
    if (values := tensors.get(name)) is None:
        return None
    if values.shape != (count, count):
        raise ValueError(
            f"importance file {folder / TENSORS}: {name} has shape {tuple(values.shape)}, not ({count}, {count})"
        )
    if name == "hessian_error" and values.is_floating_point() and values.isnan().all():
        return values  # converted files do not know it
    return _finite(values, name, folder)


def _finite(values: Tensor, name: str, folder: Path) -> Tensor:
    if not values.is_floating_point() or not values.isfinite().all():
        raise ValueError(f"importance file {folder / TENSORS}: {name} holds values that are not finite numbers")
    return values


def read_for(args: Any, model: nn.Module) -> Importance:
    """What a run with --pruning_pickle_from goes by, of its components. Raises ValueError."""
    folder = args.pruning_pickle_from
    importance = load(folder, model_record(model), args.data_set, args.pruning_method).only(args.pruning_layers)
    if args.need_hessian and importance.hessian is None:
        raise ValueError(f"--need_hessian: {folder} holds no interactions")
    return importance.without_interactions() if args.need_hessian is False else importance
