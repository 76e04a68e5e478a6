"""Which preparation of images a run takes: that of the weights it starts from, as the flags override it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import options
from files import archive, checkpoint, schema
from files.atomic import older
from loading.images import DataError
from loading.preparation import SMALL, Preparation
from models import hub
from runtime.console import say, warn
from training.full_model import FullModel
from training.sources import Checkpoint


def read_preparation(content: dict[str, Any], path: str | Path, size: int) -> Preparation | None:
    """What a file's content says for images of `size`, None where it says nothing. Raises DataError.

    A checkpoint of this project that does not say is from before preparations were stored: `Preparation.usual`.
    """
    if not (record := content.get("data_config")):
        return Preparation.usual(size) if checkpoint.is_ours(content) else None
    try:
        return Preparation.of_record(record, size)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def read_header(path: str | Path) -> dict[str, Any]:
    """What a checkpoint, or a folder that tools.export wrote, holds beside its tensors.

    {} for a file that is missing, damaged or of another form: what reads its weights says so.
    """
    try:
        if not Path(path).is_dir():
            content = archive.header(path)
            return content if isinstance(content, dict) else {}
        config = schema.read_json(Path(path) / hub.CONFIG)
        return dict(format=config["format"], data_config=config["preprocess"])
    except (OSError, ValueError, TypeError, KeyError):  # ArchiveError and SchemaError are ValueErrors
        return {}


def of_timm(pretrained_cfg: dict[str, Any], size: int, downloaded: bool) -> Preparation:
    """What weights expect that do not say it themselves: timm's of the model and its tag.

    timm has no weights for images of up to 32 pixels: those not downloaded from it are prepared as ever.
    """
    if size <= SMALL and not downloaded:
        return Preparation.usual(size)
    return Preparation.of_timm(pretrained_cfg, size)


def of_weights(full: FullModel) -> Preparation:
    """What the weights of a full-size model expect. Raises DataError."""
    content = full.start.content if full.start else read_header(full.path) if full.path else {}
    stored = read_preparation(content, full.path, full.image_size)
    return stored or of_timm(_timm_config(full), full.image_size, full.pretrained)


def settle(args: Any, full: FullModel, parent: Checkpoint | None = None, resumed: Path | None = None) -> Preparation:
    """The preparation of a run, for images of the full-size model's size; what is assumed or overridden is said.

    parent: the checkpoint it starts from, where that is not in `full`; resumed: the one that it resumes, which
    `resuming.read` compares with the flags. Raises DataError.
    """
    size, start = full.image_size, parent or full.start
    for path in (resumed, older(resumed)) if resumed else ():
        if found := read_preparation(read_header(path), path, size):
            return found.with_flags(args)
    path = start.path if start else full.path
    content = start.content if start else read_header(path) if path else {}
    stored, expected = read_preparation(content, path, size), of_timm(_timm_config(full), size, full.pretrained)
    chosen = (stored or expected).with_flags(args)
    if path and (differing := chosen.differences(stored or expected)):
        named = (f"{options.flag(name)} is {now}, not {before}" for name, (now, before) in differing.items())
        warn(f"images are prepared otherwise than for {path}: {'; '.join(named)}")
    elif path and stored is None:
        say(
            f"{path} does not say how its images were prepared; assumed, as for {_source(full)}: {chosen} "
            "(--mean, --std, --crop_pct and --interpolation override it)"
        )
    elif path and not content.get("data_config") and stored != expected:
        say(f"{path} is from before the preparation of images was kept; as then: {chosen}; timm has {expected}")
    return chosen


def _timm_config(full: FullModel) -> dict[str, Any]:
    return full.arch.skeleton.pretrained_cfg


def _source(full: FullModel) -> str:
    """Where `of_timm` takes the preparation from."""
    if full.image_size <= SMALL and not full.pretrained:
        return f"all images of up to {SMALL} pixels"
    name, tag = full.arch.name.partition(".")[0], _timm_config(full).get("tag")
    return f"timm's {name}.{tag}" if tag else f"timm's {name}"
