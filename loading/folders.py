"""Image folders: one folder of images per class, without what file managers and notebooks leave in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading.images import CorruptImage, DataError, Notes, list_some, open_image
from runtime.console import complain, say
from runtime.run import current

EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".avif", ".apng", ".dib", ".jp2", ".pbm", ".pnm")
NOT_IMAGES = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}  # of file managers


@cache
def readable_extensions() -> frozenset[str]:
    """The endings of image files that the installed Pillow can read."""
    return frozenset(EXTENSIONS) & {
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a file manager's own."""
    return name.startswith(".") or name.lower() in NOT_IMAGES


def class_folders(split: Path) -> list[str]:
    """Names of the class folders of a split, in alphabetical order. Raises DataError."""
    if not split.is_dir():
        raise DataError(f"no {split.name}/ in {split.parent}; --data-path must hold train/ and val/ with class folders")
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not is_hidden(entry.name))
    if not classes:
        raise DataError(f"no class folders in {split}; it must hold one folder of images per class")
    return classes


class _Files:
    """Reads the images of `samples`, (path, target) each, with `transform`, `exif` and `notes` as of its classes."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        image, bits = open_image(path, self.exif)
        self.notes.add(index, bits)
        return (self.transform(image) if self.transform else image), target


class ClassFolders(_Files, ImageFolder):
    """torchvision's ImageFolder without hidden files, with more formats, and with a line about what it leaves out.

    exif: turn images as their EXIF orientation says. Raises DataError for a split without class folders, or with a
    class without images.
    """

    def __init__(self, split: Path, transform: Callable | None = None, exif: bool = True) -> None:
        self.exif, self.left_out = exif, Counter()
        super().__init__(split, transform=transform, is_valid_file=self._is_image, allow_empty=True)
        filled = set(self.targets)
        if empty := [name for i, name in enumerate(self.classes) if i not in filled]:
            raise DataError(
                f"class folders of {split} without images: {list_some(empty)}; each needs at least one image"
            )
        self.notes = Notes(len(self.samples), str(split))
        if self.left_out:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.most_common())
            say(f"{split}: files left out: {counts}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Class names and their indices, as torchvision asks for them. Raises DataError."""
        classes = class_folders(Path(directory))
        if hidden := sum(is_hidden(entry.name) for entry in os.scandir(directory)):
            self.left_out["hidden"] += hidden
        return classes, {name: i for i, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        relative = Path(path).relative_to(self.root)
        if any(map(is_hidden, relative.parts)):
            self.left_out["hidden"] += 1
        elif (ending := relative.suffix.lower()) not in readable_extensions():
            self.left_out[ending or "without an ending"] += 1
        else:
            return True
        return False


class Pictures(_Files, Dataset):
    """Every image in a folder and the folders in it, in the order of their paths, without classes: (image, -1).

    exif: turn images as their EXIF orientation says. Raises DataError for a folder without images.
    """

    def __init__(self, root: Path, transform: Callable | None = None, exif: bool = True) -> None:
        self.root, self.transform, self.exif = root, transform, exif
        if not root.is_dir():
            raise DataError(f"there is no folder {root}")
        inside = (path for path in root.rglob("*") if path.suffix.lower() in readable_extensions())
        shown = sorted(str(path) for path in inside if not any(map(is_hidden, path.relative_to(root).parts)))
        if not shown:
            raise DataError(f"{root} holds no images ({', '.join(sorted(readable_extensions()))})")
        self.samples, self.targets = [(path, -1) for path in shown], [-1] * len(shown)
        self.notes = Notes(len(shown), str(root))

    def __len__(self) -> int:
        return len(self.samples)


class Skipping(Dataset):
    """Skips images that cannot be read, names each one, and reports their number when the run ends.

    stand_in: the next readable image takes the place of a skipped one, so that batches keep their size; otherwise None
    does. Loader workers share what they find.
    """

    def __init__(self, dataset: ClassFolders | Pictures, stand_in: bool) -> None:
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
            f"{len(paths)} of {len(self)} images of {self.dataset.root} could not be read, {what}: {list_some(paths)}"
            if paths
            else ""
        )
