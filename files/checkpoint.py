"""Checkpoints: one schema for every stage, of tensors and plain values, written atomically and loaded without code.

A checksum over names, values and tensors detects damage that torch's own format misses. It is not a signature: whoever
can write the file can write the checksum.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import archive, kinds, schema
from files.atomic import write_atomically

FORMAT = {"name": "vit-compression", "version": 1}
KEYS = (
    "format",
    "arch",
    "dims",
    "dim",
    "masks",
    "model",
    "model_ema",
    "optimizer",
    "lr_scheduler",
    "scaler",
    "pruner",
    "epoch",
    "step",
    "rng",
    "metrics",
    "args",
    "data_config",
)
ADDED = {"data_config"}  # keys that older files lack
_SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = [  # numpy's numbers, which training scripts store as accuracies and learning rates
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdFD"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class CheckpointError(ValueError):
    """A file that is not a complete, safe checkpoint of this project; the message says why and what would help."""


class DamagedError(CheckpointError):
    """A checkpoint that is missing or damaged: the previous one may be intact."""


def _canonical(value: Any, place: str = "it") -> Any:
    """The same values in a form whose file depends on nothing else: compact storages and interned strings.

    Raises TypeError for anything that is not a plain value.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return value if value.untyped_storage().nbytes() == value.numel() * value.itemsize else value.clone()
    if isinstance(value, dict):
        return {_canonical(key): _canonical(child, f"{place}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)([_canonical(child, place) for child in value])
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return sys.intern(str(value))
    if value is None:
        return None
    raise TypeError(f"a checkpoint holds tensors and plain values: {place} is a {type(value).__name__}")


def digest(value: Any) -> str:
    """SHA-256 of tensors and plain values, including their names and types."""
    sha = hashlib.sha256()

    def take(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            flat = item.detach().cpu().contiguous().view(-1)
            sha.update(flat.view(torch.uint8).numpy())
        elif isinstance(item, dict):
            sha.update(b"dict%d" % len(item))
            for key, child in item.items():
                take(key)
                take(child)
        elif isinstance(item, list | tuple):
            sha.update(f"{type(item).__name__}{len(item)}".encode())
            for child in item:
                take(child)
        else:
            text = repr(item).encode()
            sha.update(b"%d:" % len(text) + text)

    take(value)
    return sha.hexdigest()


def not_finite(tensors: dict[str, Any] | None) -> str:
    """The name of the first tensor with a value that is not finite, '' if there is none."""
    floating = ((n, t) for n, t in (tensors or {}).items() if isinstance(t, torch.Tensor) and t.is_floating_point())
    return next((name for name, t in floating if not torch.isfinite(t).all()), "")


def save(path: str | Path, keep_older: bool = False, **state: Any) -> None:
    """Write a checkpoint. All KEYS are stored, as None where the stage has no such state.

    arch is {"name": timm name, "kwargs": {...}}; masks are bool tensors per axis, True is keep. keep_older: see
    `write_atomically`. Equal states make equal files. Raises OSError, and CheckpointError for weights that are not
    finite.
    """
    if unknown := set(state) - set(KEYS):
        raise ValueError(f"a checkpoint has no keys {sorted(unknown)}")
    content = _canonical({key: state.get(key) for key in KEYS} | dict(format=FORMAT))
    for key in ("model", "model_ema"):
        if name := not_finite(content[key]):
            raise CheckpointError(f"{key}: {name} is not finite, so {path} is not written")
    content["format"]["sha256"] = digest(content)
    write_atomically(path, lambda file: torch.save(content, file), keep_older)


def read(path: str | Path) -> dict[str, Any]:
    """The tensors and plain values of a torch or safetensors file, as a dict on the CPU; of a folder, of its weights.

    An argparse.Namespace, which many training scripts store, comes as a SimpleNamespace. Raises CheckpointError; never
    runs code.
    """
    path = Path(path)
    if not path.exists():
        raise DamagedError(f"checkpoint {path} does not exist")
    try:
        path = kinds.weights_in(path) if path.is_dir() else path
        if kinds.is_safetensors(path):
            return kinds.read_safetensors(path)
        header = archive.header(path)
        if not isinstance(header, dict):
            raise CheckpointError(f"checkpoint {path} holds a {type(header).__name__.lstrip('_')}, not a dict")
        _check(header)
        with torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace"), *NUMBERS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except kinds.NotWeights as error:
        raise DamagedError(f"checkpoint {path} {error}") from None
    except archive.Damaged as error:
        raise DamagedError(f"checkpoint {path} {kinds.why_unreadable(path) or error}") from None
    except (archive.ArchiveError, schema.SchemaError) as error:
        raise CheckpointError(f"checkpoint {path} {error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch's readers raise a dozen types
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DamagedError(f"checkpoint {path} is truncated or not a torch file ({line})") from None


def _check(header: dict[str, Any]) -> None:
    """Check what a file claims to hold before its tensors are read. Raises SchemaError."""
    if is_ours(header) and not set(KEYS) - ADDED - set(header):
        try:
            schema.check_checkpoint(header)
        except schema.SchemaError as error:
            raise schema.SchemaError(f"does not have the form this project writes: {error}") from None
    elif isinstance(header.get("kwargs"), dict):
        try:
            schema.check_kwargs(header["kwargs"])
        except schema.SchemaError as error:
            raise schema.SchemaError(f"does not describe a model: {error}") from None


def is_ours(content: dict[str, Any]) -> bool:
    """Whether the content of a file says that this project wrote it."""
    return isinstance(content.get("format"), dict) and content["format"].get("name") == FORMAT["name"]


def load(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project. Raises CheckpointError for anything else."""
    return checked(read(path), path)


def checked(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Check that what `read` returned for `path` is a checkpoint of this project. Raises CheckpointError."""
    path = Path(path)
    if not is_ours(content):
        raise CheckpointError(
            f"checkpoint {path} was not written by this project (keys {', '.join(map(str, list(content)[:6]))}); "
            "a plain timm state dict starts a run through --initial-checkpoint"
        )
    form = dict(content["format"])
    if not isinstance(version := form.get("version", 0), int) or version > FORMAT["version"]:
        raise CheckpointError(f"checkpoint {path} was written by a newer version of this project")
    if missing := [key for key in KEYS if key not in content and key not in ADDED]:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)}")
    checksum = form.pop("sha256", None)
    if set(form) != set(FORMAT) or checksum not in (None, digest(content | dict(format=form))):
        raise DamagedError(f"checkpoint {path} is damaged: its checksum does not match its content")
    for key in ("model", "model_ema"):
        if name := not_finite(content[key]):
            raise CheckpointError(f"checkpoint {path} cannot be used: {name} in its {key} is not finite")
    content = dict.fromkeys(ADDED) | content
    return content | dict(args=_with_absolute_origin(content["args"], path.parent))


def load_model(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint that a model can be built from. Raises CheckpointError."""
    return with_model(load(path), path)


def with_model(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Check that what `load` returned for `path` describes a model. Raises CheckpointError."""
    if missing := [key for key in ("arch", "dims", "model") if content[key] is None]:
        raise CheckpointError(f"checkpoint {path} holds no model: it lacks {', '.join(missing)}")
    return content


def _with_absolute_origin(args: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Make the path of the dense weights, which is stored relative to the checkpoint's folder, absolute."""
    args = args or {}
    origin = args.get("initial_checkpoint")
    if not isinstance(origin, str) or not origin:
        return args
    return args | dict(initial_checkpoint=os.path.normpath(folder.resolve() / origin))
