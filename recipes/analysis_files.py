"""analysis.safetensors: what one-shot pruning knows of a model before it is given a target, to prune to others later.

Tensors are the aligned weights; the file's metadata is JSON: the architecture, the price of every width, and what the
analysis was made from. Calibration images are not in it: they are read again, and must be the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from files.atomic import write_atomically
from files.schema import SchemaError, parse_json
from models.arch import Arch
from pruning.one_shot import Analysis
from pruning.probe import Curve, Prices

NAME = "analysis.safetensors"
FORMAT = 1


def write(path: Path, analysis: Analysis, made_from: dict[str, Any]) -> None:
    """Write an analysis. made_from: plain values that another run must share to use it."""
    blocks, embed = analysis.prices
    facts = dict(
        format=FORMAT,
        arch=Arch.of_model(analysis.dense).without_drops.record,
        groups=analysis.groups,
        prices=dict(blocks=blocks, embed=embed),
        made_from=made_from,
    )
    tensors = {name: value.contiguous() for name, value in analysis.dense.state_dict().items()}
    content = save(tensors, metadata=dict(analysis=json.dumps(facts)))
    write_atomically(path, lambda file: file.write(content))


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Every error of a file as one ValueError that names it."""
    try:
        yield
    except (OSError, SafetensorError, SchemaError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--analysis {path} is no analysis that --one_shot has written: {reason}") from None
    except ValueError as error:
        raise ValueError(f"--analysis {path}: {error}") from None


def _facts(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return parse_json((file.metadata() or {})["analysis"])


def check_file(path: str, arch: Arch, groups: dict[str, int], made_from: dict[str, Any]) -> None:
    """Raises ValueError where the file is no analysis, or was made from something else; weights are not read."""
    with _explained(path):
        check(_facts(path), arch, groups, made_from)


def read(path: str, model: nn.Module) -> Prices:
    """Prices of an analysis; its aligned weights go into `model`. Raises ValueError."""
    with _explained(path):
        curves = _facts(path)["prices"]
        prices = Prices([{a: _curve(c) for a, c in b.items()} for b in curves["blocks"]], _curve(curves["embed"]))
        if len(prices.blocks) != len(model.blocks):
            raise ValueError(f"prices of {len(prices.blocks)} blocks, but the model has {len(model.blocks)}")
        model.load_state_dict(load_file(path))
    return prices


def check(facts: dict[str, Any], arch: Arch, groups: dict[str, int], made_from: dict[str, Any]) -> None:
    """Raises ValueError naming what an analysis was made from and this run does not have."""
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']} is not {FORMAT}, the one this version reads")
    if Arch.of_record(facts["arch"]) != arch.without_drops:
        raise ValueError(
            f"it is of {facts['arch']['name']} {facts['arch']['kwargs']}, not of {arch.name} {arch.kwargs}"
        )
    for name, value in made_from.items():
        if facts["made_from"].get(name) != value:
            theirs = facts["made_from"].get(name)
            digests = isinstance(value, str) and len(value) == 64
            raise ValueError(f"it was made with other {name}" + ("" if digests else f": {theirs}, not {value}"))
    if facts["groups"] != groups:
        raise ValueError("it was made with other group sizes (--pruning_config, --width_multiple)")


def _curve(data: dict[str, float]) -> Curve:
    return {int(width): float(price) for width, price in data.items()}
