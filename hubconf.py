"""torch.hub entries: torch.hub.load("OWNER/REPO", "prune")(model, images, latency=0.5), and others."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from latency.table import LatencyTable
from models.pretrained import load_dense
from recipes.api import Study
from recipes.api import analyse as _analyse
from recipes.api import load as _load
from recipes.api import measure_table as _measure_table
from recipes.api import prune as _prune
from recipes.api import save as _save

dependencies = ["torch", "timm", "numpy", "scipy", "safetensors", "PIL", "platformdirs", "tqdm"]


def vit_from_checkpoint(path: str, device: str = "cpu") -> nn.Module:
    """A checkpoint of this project as a compact model in eval mode (see `models.load_dense`).

    path: a checkpoint, a folder that tools.export has written, or hf-hub:OWNER/NAME. Raises CheckpointError.
    """
    return load_dense(path, device)


def prune() -> Callable[..., nn.Module]:
    """The function `recipes.api.prune`: a compact copy of a model that takes at most a share of its latency."""
    return _prune


def analyse() -> Callable[..., Study]:
    """The function `recipes.api.analyse`: one analysis of a model, from which every size follows."""
    return _analyse


def measure_table() -> Callable[..., LatencyTable]:
    """The function `recipes.api.measure_table`: a coarse latency table of a model on this device."""
    return _measure_table


def load() -> Callable[..., nn.Module]:
    """The function `recipes.api.load`: a compact model from a checkpoint, an exported folder or the Hub."""
    return _load


def save() -> Callable[..., Path]:
    """The function `recipes.api.save`: a compact model as config.json and model.safetensors."""
    return _save
