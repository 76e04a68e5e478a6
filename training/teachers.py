"""Teachers see the batches of the student, normalised as their own weights expect; what that cannot give is said."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from loading.preparation import Preparation
from runtime.console import say
from training.full_model import FullModel, load_cnn_teacher, load_full_teacher
from training.parts import Data
from training.preparing import of_timm, of_weights, read_header, read_preparation
from training.sources import Checkpoint, Teacher


class Renormalized(nn.Module):
    """A teacher of other mean and std than the batches have, as `given` and `own` say."""

    def __init__(self, model: nn.Module, given: Preparation, own: Preparation) -> None:
        super().__init__()
        self.model = model
        (m, s), (mean, std) = (
            [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (p.mean, p.std)]
            for p in (given, own)
        )
        self.register_buffer("scale", (s / std).float())
        self.register_buffer("shift", ((m - mean) / std).float())

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """images: (B, 3, S, S), mixed ones too: a weighted mean of images stays one."""
        return self.model(images * self.scale + self.shift)


def adapt(teacher: nn.Module, name: str, own: Preparation, given: Preparation) -> nn.Module:
    """The teacher for batches of `given`; the same where mean and std are its own. Raises ValueError for a size.

    Training crops at random, so that a teacher's own crop and interpolation have no counterpart there: that is said.
    """
    if own.size != given.size:
        raise ValueError(
            f"{name} takes images of {own.size} pixels, the student {given.size}: both see the same batch, so give a "
            "teacher of that size"
        )
    differences = own.differences(given)
    if others := [f"{part} {mine}" for part, (mine, _) in differences.items() if part not in ("mean", "std")]:
        say(f"{name} expects {', '.join(others)}: in training it sees the student's random crops")
    if not {"mean", "std"} & set(differences):
        return teacher
    say(f"{name} is fed by its own mean {' '.join(map(str, own.mean))} and std {' '.join(map(str, own.std))}")
    device = next(teacher.parameters()).device
    return Renormalized(teacher, given, own).to(device).eval().requires_grad_(False)


def load_cnn(source: Teacher | None, data: Data, device: torch.device) -> nn.Module | None:
    """`load_cnn_teacher`, fed as its weights expect; images of another size than it was trained on are said."""
    if (teacher := load_cnn_teacher(source, data.classes, device)) is None:
        return None
    given, config, name = data.preparation, teacher.pretrained_cfg, f"teacher {source.model}"
    stem = getattr(teacher, "patch_embed", None)
    fixed = getattr(stem, "strict_img_size", False) and not getattr(teacher, "dynamic_img_size", False)
    size = stem.img_size[0] if fixed else given.size
    stored = read_preparation(read_header(source.path), source.path, size) if source.path else None
    trained = config["input_size"][-1]
    if not fixed and not source.path and trained != size:
        say(f"{name} was trained on images of {trained} pixels and sees {size}")
    return adapt(teacher, name, stored or of_timm(config, size, downloaded=not source.path), given)


def load_full(full: FullModel, data: Data, device: torch.device, parent: Checkpoint | None = None) -> nn.Module:
    """`load_full_teacher`, fed as its weights expect. parent: the checkpoint of the student, None for one of `full`."""
    teacher = load_full_teacher(full, device)
    if parent is None:  # the run prepares images for these very weights
        return teacher
    known = read_preparation(parent.content, parent.path, full.image_size)
    own = of_full_teacher(full, parent.origin, known)
    return adapt(teacher, f"teacher {full.path or full.arch.name}", own, data.preparation)


def of_full_teacher(full: FullModel, origin: str, known: Preparation) -> Preparation:
    """What a full model expects: what its file says, else `known` for the weights at `origin`, else timm's.

    Raises DataError.
    """
    is_origin = bool(full.path and origin) and Path(origin).resolve() == Path(full.path).resolve()
    return known if is_origin and not read_header(full.path).get("data_config") else of_weights(full)
