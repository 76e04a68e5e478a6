"""Calibration images, and what follows from them without labels or gradients: alignment, and compensation of a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from datasets import build_dataset
from loading.preparation import Preparation
from models import Masks, compact
from models.compact import expand_
from pruning.align import align_
from pruning.refit import refit_, unseen_of
from runtime.console import say
from runtime.ranks import rank, world_size

LEAST_IMAGES = 64  # per process, of which a sixteenth judge what a width is worth
WHEN = ("event", "end")


def check(args: Any, images: int) -> None:
    """Raises ValueError where --calib_images is more than the `images` there are, or too few for the processes."""
    if args.calib_images > images:
        raise ValueError(f"--calib_images {args.calib_images} is more than the {images} training images")
    if (share := args.calib_images // world_size()) < LEAST_IMAGES:
        raise ValueError(f"--calib_images must be at least {LEAST_IMAGES} for each process, not {share}")


def _share(args: Any, count: int, of: int) -> list[int]:
    """Places among `count` training images of the calibration images of process `of`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    return order[of : args.calib_images : world_size()][: args.calib_images // world_size()].tolist()


def batches_of(args: Any, preparation: Preparation) -> Iterator[Tensor]:
    """Endless batches of this process's training images, some mirrored (--hflip), without labels: (B, 3, S, S).

    The calibration images that judge a refit (`pruning.refit.unseen_of`) are not among them, on any process.
    """
    dataset, _ = build_dataset(True, args, augment=False, preparation=preparation)
    places = range(len(dataset))
    kept = {*places} - {i for r in range(world_size()) for i in unseen_of(_share(args, len(dataset), r))}
    generator = torch.Generator().manual_seed(args.seed * world_size() + rank())
    loader = DataLoader(
        Subset(dataset, sorted(kept)[rank() :: world_size()]),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=len(kept) >= args.batch_size * world_size(),
        num_workers=args.num_workers,
        generator=generator,
    )
    while True:
        for images, _ in loader:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < args.hflip
            yield torch.where(mirrored, images.flip(-1), images)


def images_of(args: Any, preparation: Preparation, dataset: Dataset | None = None) -> Tensor:
    """This process's share of --calib_images training images, as validation sees them: (n, 3, S, S).

    The seed chooses them, the same ones for any number of processes; labels are not looked at. dataset: what to choose
    from, None for the run's training images.
    """
    if dataset is None:
        dataset, _ = build_dataset(True, args, augment=False, preparation=preparation)
    loader = DataLoader(
        Subset(dataset, _share(args, len(dataset), rank())),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        generator=torch.Generator(),
    )
    return torch.cat([images for images, _ in loader])


def _agree(model: nn.Module) -> None:
    """The main rank's weights, to the last bit: other machines may round a decomposition differently."""
    if world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def align(model: nn.Module, images: Tensor, batch: int, embedding: bool = True) -> str:
    """Align a full-size model in place (`pruning.align`); returns what was not rotated, or that all was."""
    device, mode = next(model.parameters()).device, model.training
    left = align_(model.eval(), [part.to(device) for part in images.split(batch)], embedding)
    model.train(mode)
    _agree(model)
    return "; ".join(left) or "every axis"


def prepare(args: Any, setup: Any) -> Tensor | None:
    """This process's calibration images where training needs them; with --align the dense model is aligned."""
    if args.one_shot or not args.pruning or not (args.align or args.compensate):
        return None
    images = images_of(args, setup.data.preparation)
    if args.align:
        changes = align(setup.model.to(setup.device), images, args.batch_size, embedding=args.align == "all")
        say(f"aligned on {args.calib_images} images: {changes}")
    return images


def compensate_(dense: nn.Module, small: nn.Module, masks: Masks, images: Tensor, batch: int) -> None:
    """Refit `small`, cut from `dense` by `masks`, in place (`pruning.refit`), and say how far it is from it."""
    divergence = refit_(dense, small, masks, images, batch)
    _agree(small)
    say(f"compensated: divergence {divergence:.2e} nats on held-out images")


class Compensation:
    """After a cut, the survivors take over what the removed units carried, by a refit of the whole model.

    when: `event`, to the student before every pruning event; `end`, to the dense model after the last; None, never.
    dense: full-size, in eval mode, in the student's coordinates; images: this process's share, read `batch` at a time.
    """

    def __init__(self, when: str | None, dense: nn.Module, images: Tensor | None, batch: int) -> None:
        self.when, self.dense, self.images, self.batch = when, dense, images, batch
        self._before: nn.Module | None = None

    def remember(self, model: nn.Module) -> None:
        """The student, masked, as it is before an event."""
        if self.when == "event":
            self._before = copy.deepcopy(model).eval()

    def apply_(self, model: nn.Module, masks: Masks, full: Masks, last: bool) -> None:
        """Refit the masked student after an event; full: its masks over the dense model; last: no event follows."""
        reference, kept = (self.dense, full) if self.when == "end" and last else (self._before, masks)
        self._before = None
        if reference is None:
            return
        small = compact(model, masks).eval()
        compensate_(reference, small, kept, self.images, self.batch)
        expand_(model, masks, small)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The dense model where it is needed at the end: another run could not align it the same to the last bit."""
        return self.dense.state_dict() if self.when == "end" else None

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        if state is not None:
            self.dense.load_state_dict(state)
