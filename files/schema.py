"""What files may hold, checked before anything is built or allocated from them: JSON of bounded size, plain values,
and the keys of a checkpoint. Widths are checked in `models.dims`, latency tables in `latency`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

MAX_VALUES = 200_000  # plain values in a JSON file or a checkpoint; real ones have at most a tenth
MAX_DEPTH = 30
MAX_WHOLE = 2**63
MAX_TEXT = 100_000  # characters of one string
BYTES_PER_VALUE = 50
MAX_WIDTH = 1_000_000  # of anything that a model is built with
# Arguments of timm that are not part of an architecture: they fetch or load files, or change what is built.
NOT_ARCHITECTURE = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir scriptable exportable no_jit "
    "features_only".split()
)


class SchemaError(ValueError):
    """A file with unexpected content; the message names what is wrong."""


def find_own(path: str | Path) -> str | Path:
    """A path as it is; where nothing is there, this project's own file of that relative path, if it has one."""
    own = Path(__file__).resolve().parents[1] / path
    return own if own.exists() and not Path(path).exists() else path


def read_json(path: str | Path, values: int = MAX_VALUES) -> Any:
    """Read a JSON file of at most `values` values. Raises SchemaError, which names the file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(values * BYTES_PER_VALUE + 1)
    except OSError as error:
        raise SchemaError(f"{path}: {error.strerror}") from None
    if len(raw) > values * BYTES_PER_VALUE:
        raise SchemaError(f"{path} is too large: at most {values * BYTES_PER_VALUE:,} bytes")
    try:
        return parse_json(raw.decode(), values)
    except SchemaError as error:
        raise SchemaError(f"{path} {error}") from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path} is not JSON: it is not a text file") from None


def parse_json(text: str, values: int = MAX_VALUES) -> Any:
    """Parse JSON without NaN, of at most `values` values. Raises SchemaError whose message follows a file's name."""
    if (count := sum(map(text.count, ",[{"))) > values:  # an upper bound, before anything is built from them
        raise SchemaError(f"holds about {count:,} values; at most {values:,} are allowed")
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise SchemaError(f"is not JSON: {error}") from None
    except RecursionError:
        raise SchemaError("is nested too deeply") from None
    except SchemaError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise SchemaError(f"is not JSON: {str(error)[:60]}") from None


def _no_number(word: str) -> None:
    raise SchemaError(f"holds {word}, which is not a number")


def check_plain(value: Any, where: str) -> None:
    """Raises SchemaError unless a value consists of finite plain values and tensors, of bounded size."""
    left, todo = MAX_VALUES, [(value, where, 0)]
    while todo:
        item, place, depth = todo.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise SchemaError(f"{where} holds more than {MAX_VALUES:,} values, or is nested too deeply")
        if isinstance(item, dict):
            if odd := next((key for key in item if not isinstance(key, str | int)), None):
                raise SchemaError(f"{place} has the key {str(odd)[:40]!r}, which is neither text nor a number")
            todo += [(child, f"{place}.{str(key)[:40]}", depth + 1) for key, child in item.items()]
        elif isinstance(item, list | tuple):
            todo += [(child, place, depth + 1) for child in item]
        elif problem := _why_odd(item):
            raise SchemaError(f"{place} is {problem}")


def _why_odd(item: Any) -> str:
    if isinstance(item, float) and not math.isfinite(item):
        return f"{item}, which is not finite"
    if isinstance(item, int) and abs(item) >= MAX_WHOLE:
        return "a number with more than 64 bits"
    if isinstance(item, str) and len(item) > MAX_TEXT:
        return f"a text of {len(item):,} characters"
    plain = item is None or isinstance(item, bool | int | float | str | torch.Tensor)
    return "" if plain else f"a {type(item).__name__}, which is not a plain value"


def check_arch(arch: Any) -> None:
    """Raises SchemaError unless `arch` is a timm name with arguments that describe an architecture and nothing else."""
    if not isinstance(arch, dict) or not isinstance(arch.get("name"), str) or not isinstance(arch.get("kwargs"), dict):
        raise SchemaError("arch must hold the name of a timm model and its kwargs")
    if not re.fullmatch(r"[\w.]{1,100}", arch["name"]):
        raise SchemaError(f"arch has the name {arch['name'][:60]!r}, which is not a timm name")
    check_kwargs(arch["kwargs"])


def check_kwargs(kwargs: dict[str, Any]) -> None:
    """Raises SchemaError for arguments that a file must not set, and for sizes that no model has."""
    check_plain(kwargs, "kwargs")
    if odd := sorted(str(key) for key in kwargs if key in NOT_ARCHITECTURE or not isinstance(key, str)):
        raise SchemaError(f"kwargs has {odd[0]!r}, which is not part of an architecture")
    for key, value in kwargs.items():
        most = 1_000 if key in ("depth", "depths") else MAX_WIDTH
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(n, int | float) and abs(n) > most for n in numbers):
            raise SchemaError(f"kwargs has {key}={str(value)[:40]}, more than {most:,}")


def _check_tensors(value: Any, where: str) -> None:
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SchemaError(f"{where} must hold tensors by name, not {str(name)[:60]!r}: {type(tensor).__name__}")


def _check_masks(masks: dict[str, Any]) -> None:
    _check_tensors(masks, "masks")
    if odd := [name for name, t in masks.items() if t.dtype != torch.bool or t.dim() != 1]:
        raise SchemaError(f"masks: {odd[0][:60]} is not a vector of booleans")


def _check_position(content: dict[str, Any]) -> None:
    for key in ("epoch", "step"):
        value = content[key]
        if value is not None and (type(value) is not int or not -1 <= value < 2**40):
            raise SchemaError(f"{key} must be a whole number, not {str(value)[:40]!r}")


DICTS = (
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
    "rng",
    "metrics",
    "args",
    "data_config",
)


def check_checkpoint(content: dict[str, Any]) -> None:
    """Check that every key of a checkpoint is None or has its type. Raises SchemaError naming what is wrong."""
    for key in DICTS:
        if (value := content.get(key)) is not None and not isinstance(value, dict):
            raise SchemaError(f"{key} must be a dict, not a {type(value).__name__}")
    _check_position(content)
    check_plain(content, "it")
    for key in ("model", "model_ema"):
        _check_tensors(content[key] or {}, key)
    if content["arch"] is not None:
        check_arch(content["arch"])
    _check_masks(content["masks"] or {})
