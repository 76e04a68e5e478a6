"""Checkpoints: one schema for every stage, tensors and plain values only, written atomically, loaded without code."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = {"name": "vit-compression", "version": 1}
KEYS = (
    "format", "arch", "dims", "dim", "masks", "model", "model_ema", "optimizer", "lr_scheduler", "scaler", "pruner",
    "epoch", "step", "rng", "metrics", "args",
)  # fmt: skip


os.umask(_UMASK := os.umask(0))  # temporary files are private; finished ones get the mode that open() would give


class CheckpointError(ValueError):
    """A file that is not a whole, safe checkpoint of this project; the message says why and what would be right."""


def write_atomically(path: str | Path, write: Any) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk and rename it: whole or not there."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_UMASK)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def save(path: str | Path, **state: Any) -> None:
    """Write a checkpoint. Every key of KEYS is stored, None where this stage has no such state.

    arch is {"name": timm name, "kwargs": {...}}; masks are bool tensors per axis, True is keep.
    """
    if unknown := set(state) - set(KEYS):
        raise ValueError(f"a checkpoint has no keys {sorted(unknown)}")
    content = dict.fromkeys(KEYS) | state | dict(format=FORMAT)
    write_atomically(path, lambda file: torch.save(content, file))


def read(path: str | Path) -> dict[str, Any]:
    """Tensors and plain values of a file, as a dict on the CPU. Raises CheckpointError; never runs code."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "GLOBAL" in str(error):
            reason = "needs unpickling of code, which could run anything: only tensors and plain values are read"
        else:
            reason = f"is truncated or not a torch file ({str(error).splitlines()[0][:80]})"
        raise CheckpointError(f"checkpoint {path} {reason}") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"checkpoint {path} is truncated or not a torch file ({line})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not a dict")
    return content


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project. Raises CheckpointError for anything else."""
    content = read(path)
    if not isinstance(content.get("format"), dict) or content["format"].get("name") != FORMAT["name"]:
        raise CheckpointError(
            f"checkpoint {path} was not written by this project (keys {', '.join(map(str, list(content)[:6]))}); "
            "a plain timm state dict starts a run through --initial-checkpoint"
        )
    if content["format"].get("version", 0) > FORMAT["version"]:
        raise CheckpointError(f"checkpoint {path} is of a newer version than this code")
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)}")
    return content


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return dict(
        python=[version, list(internal), gauss],
        numpy=[kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        torch=torch.get_rng_state(),
        cuda=cuda,
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator of this process where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
