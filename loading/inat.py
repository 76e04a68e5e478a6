"""iNaturalist 2018 and 2019 as distributed, with classes at any level of the taxonomy, as in DeiT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from loading.images import Notes, open_image

YEARS = dict(INAT=2018, INAT19=2019)
CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


class INaturalist(Dataset):
    """Transformed images and class indices of a split; classes: the names at the chosen level, in alphabetical order.

    The folder must hold train2018.json, val2018.json, categories.json, and the images under the paths in these files.
    Raises ValueError otherwise.
    """

    def __init__(
        self,
        root: Path,
        is_train: bool,
        year: int,
        category: str,
        transform: Callable,
        exif: bool = True,
    ) -> None:
        split = _read(root / f"{'train' if is_train else 'val'}{year}.json")
        training = split if is_train else _read(root / f"train{year}.json")
        try:
            level = {entry["id"]: str(entry[category]) for entry in _read(root / "categories.json")}
            category_of = {entry["image_id"]: level[entry["category_id"]] for entry in split["annotations"]}
            self.classes = sorted({level[entry["category_id"]] for entry in training["annotations"]})
            index = {name: i for i, name in enumerate(self.classes)}
            self.samples = [
                (str(root / image["file_name"]), index[category_of[image["id"]]]) for image in split["images"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the iNaturalist files of {root} are inconsistent: {error!r} is missing") from None
        self.targets = [target for _, target in self.samples]
        self.transform, self.exif = transform, exif
        self.notes = Notes(len(self.samples), str(root))

    def __getitem__(self, number: int) -> tuple[Any, int]:
        path, target = self.samples[number]
        image, bits = open_image(path, self.exif)
        self.notes.add(number, bits)
        return self.transform(image), target

    def __len__(self) -> int:
        return len(self.samples)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError:
        raise ValueError(f"no {path.name} in {path.parent}, where the iNaturalist files belong") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
