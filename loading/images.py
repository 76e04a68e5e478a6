"""Image files: read them, name those that cannot be read, or skip and count them."""

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
    """Data that is missing or does not fit the arguments; one line says what is wrong and what would help."""


class CorruptImage(RunFailed):
    """An image file that cannot be read; the message is one line with the file's path.

    A DataLoader re-raises an error of a worker with the whole traceback as its argument. Only the last line of that is
    kept, so that the error reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Skipping(Dataset):
    """Skips images that cannot be read, names each one, and reports their number when the run ends.

    stand_in: the next readable image takes the place of a skipped one, so that batches keep their size; otherwise None
    does. Loader workers share what they find.
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
                    complain("warning", f"{error}: skipped")
            if not self.stand_in:
                return None
        raise CorruptImage(f"no image of {self.dataset.root} can be read")

    def __len__(self) -> int:
        return len(self.dataset)

    def summary(self) -> str:
        """A line for the end of the run, '' if every image could be read."""
        paths = [self.dataset.samples[i][0] for i in self.unreadable.nonzero().flatten().tolist()]
        what = "others replaced them" if self.stand_in else "evaluation skipped them"
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
        with Image.open(
            io.BytesIO(Path(path).read_bytes())
        ) as image:  # Pillow would read the file in dozens of small pieces
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types, from OSError to struct.error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorruptImage(f"cannot read image {path} ({reason})") from None
