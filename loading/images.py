"""Image files: read, refused by name, or left out and counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from runtime.console import complain
from runtime.errors import RunFailed
from runtime.run import current


class DataError(ValueError):
    """Data that is not there or does not fit the arguments; one line: what is wrong, and what would be right."""


class CorruptImage(RunFailed):
    """An image file that cannot be read; its message is one line with the file's path.

    A DataLoader re-raises what a worker process raised with the whole traceback as the only argument. The traceback's
    last line is the message, so that is what is kept: the error reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Skipping(Dataset):
    """Leaves out images that cannot be read, names each, and says at the run's end how many they were.

    stand_in: the next image that can be read takes the place, so that batches keep their size; else None does. What is
    found is shared with the processes that read.
    """

    def __init__(self, dataset: ImageFolder, stand_in: bool) -> None:
        self.dataset, self.stand_in = dataset, stand_in
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        current.say_at_end(self.summary)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        for number in range(len(self)):
            image = (index + number) % len(self)
            if not self.unreadable[image]:
                try:
                    return self.dataset[image]
                except CorruptImage as error:
                    self.unreadable[image] = True
                    complain("warning", f"{error}: left out")
            if not self.stand_in:
                return None
        raise CorruptImage(f"no image of {self.dataset.root} can be read")

    def __len__(self) -> int:
        return len(self.dataset)

    def summary(self) -> str:
        """A line for the run's end, '' where every image could be read."""
        paths = [self.dataset.samples[i][0] for i in self.unreadable.nonzero().flatten().tolist()]
        what = "another stood in for each" if self.stand_in else "evaluation left them out"
        return (
            f"{len(paths)} of {len(self)} images of {self.dataset.root} could not be read, {what}: {_some(paths)}"
            if paths
            else ""
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_image(path: str) -> Image.Image:
    """The file as an RGB image. Raises CorruptImage, which names the path."""
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:  # Pillow reads a file in dozens of small pieces
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds, from OSError to struct.error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorruptImage(f"cannot read image {path} ({reason})") from None
