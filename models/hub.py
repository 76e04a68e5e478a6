"""A compact model as a folder that others read: config.json and model.safetensors, on disk or on the Hugging Face Hub.

config.json holds what checkpoints hold under `arch` and `dims`, and what a reader without this project needs besides:
the parent's softmax scale, the norms' epsilon, the tokens of an image, and how images are prepared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from files.atomic import write_atomically
from files.checkpoint import FORMAT, CheckpointError
from models.arch import Arch, Model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf-hub:"


def is_folder(path: str | Path) -> bool:
    """Whether `path` names an exported folder, or a repository of the Hub, and not a checkpoint file."""
    return str(path).startswith(HUB) or Path(path).is_dir()


def config_of(model: Model, **more: Any) -> dict[str, Any]:
    """What config.json says of a compact model; `more` are further plain values."""
    arch = Arch.of_model(model).without_drops
    common = dict(format=FORMAT, arch=arch.record, dims=model.dims.to_dict(), **more)
    if arch.is_swin:  # which only this project reads
        return common
    parent, prefix = arch.skeleton, arch.prefix
    block = parent.blocks[0]
    return common | dict(
        scale=block.attn.head_dim**-0.5,
        norm_eps=block.norm1.eps,
        tokens=parent.patch_embed.num_patches + prefix,
        prefix_tokens=prefix,
    )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    write_atomically(folder / CONFIG, lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))


def write_weights(folder: Path, model: Model) -> None:
    """Write model.safetensors."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda file: file.write(save(state, metadata=dict(format="pt"))))


def read_folder(path: str | Path) -> dict[str, Any]:
    """A folder's content under a checkpoint's keys arch, dims, masks, model, model_ema and data_config.

    path: a folder, or hf-hub:OWNER/NAME, with @REVISION where one is meant; a copy in the Hub's cache is taken where
    there is no network. Raises CheckpointError.
    """
    folder = _download(str(path).removeprefix(HUB)) if str(path).startswith(HUB) else Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        name = config["format"]["name"]
        found = dict(arch=config["arch"], dims=config["dims"], masks=None, model_ema=None)
        found["data_config"] = config.get("preprocess")
        if name != FORMAT["name"]:
            raise CheckpointError(f"{folder / CONFIG} is of {name}, not of {FORMAT['name']}")
        return found | dict(model=load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        found = sorted(p.name for p in folder.glob("*.pth") if ".older" not in p.name)
        hint = f"; for a checkpoint name the file: {', '.join(found)}" if found else ""
        raise CheckpointError(
            f"folder {path} is none that tools.export has written: no {_name(error)} in it{hint}"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model of this project: {error!r}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from None


def _name(error: FileNotFoundError) -> str:
    return Path(error.filename).name if error.filename else WEIGHTS


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only this needs it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    wanted = dict(revision=revision or None, allow_patterns=[CONFIG, WEIGHTS])
    try:
        return Path(snapshot_download(repository, **wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{HUB}{name} cannot be had from the Hugging Face Hub: {reason}") from None
