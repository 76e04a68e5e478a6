"""Streaming: webdataset shards through timm's reader, divided among processes and loader workers.

A folder of shards has _info.json as timm reads it (`splits`: `train` and `val`, each with num_samples, filenames and
shard_lengths) and in it also `classes`, their names; `python -m tools.to_shards` writes such a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from loading.images import to_rgb
from runtime.console import warn
from runtime.errors import RunFailed

PREFIX = "wds/"
INFO = "_info.json"
KEYS = "jpg;jpeg;png;webp;gif;bmp;tif;avif"  # of the image in a sample


class ShardError(ValueError):
    """Shards that are missing, or too few; one line says what is wrong and what would help."""


def read_info(root: Path) -> dict[str, Any]:
    """_info.json of a folder of shards, checked. Raises ShardError."""
    if importlib.util.find_spec("webdataset") is None:
        raise ShardError('--data-set wds/… needs webdataset: pip install ".[streaming]"')
    remedy = "python -m tools.to_shards FOLDER DIR writes shards with it"
    if not (root / INFO).is_file():
        missing = f"no {INFO} in {root}" if root.is_dir() else f"no folder {root}"
        raise ShardError(f"{missing}: {remedy}")
    try:
        info = json.loads((root / INFO).read_text())
        for split in info["splits"].values():
            lengths = dict(zip(split["filenames"], split["shard_lengths"], strict=True))
            if sum(lengths.values()) != split["num_samples"]:
                raise ShardError(
                    f"{root / INFO}: {split['num_samples']} samples, but its shards have {sum(lengths.values())}"
                )
            if gone := [name for name in lengths if not (root / name).is_file()]:
                raise ShardError(f"{root / INFO} names {gone[0]}, which does not exist")
        return info | dict(classes=list(info["classes"]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ShardError(f"{root / INFO} is incomplete ({error!r}): {remedy}") from None
    except ValueError as error:
        raise ShardError(f"{root / INFO}: {error}") from None


def check_indexed(args: Any, what: str) -> None:
    """Raises ShardError if the data are shards, from which `what` cannot draw images by index."""
    if args.data_set.startswith(PREFIX):
        raise ShardError(f"{what} draws images by index, which shards do not allow: use a folder of images")


class _Prepare:
    """The transform of an image as it comes out of a shard; a class, so that loader workers can be sent it."""

    def __init__(self, transform: Callable, exif: bool) -> None:
        self.transform, self.exif = transform, exif

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(to_rgb(image, self.exif)[0])


def build(is_train: bool, args: Any, transform: Callable, exif: bool = True) -> IterableDataset:
    """A split of args.data_set (wds/NAME) under args.data_path, with `classes` and `fingerprint`. Raises ShardError.

    exif: turn images as their EXIF orientation says.
    """
    if not args.data_path:
        raise ShardError(f"--data-set {args.data_set} needs --data-path, the folder that holds the shards")
    root, split = Path(args.data_path), "train" if is_train else "val"
    info = read_info(root)
    if split not in info["splits"]:
        raise ShardError(f"{root / INFO} has no split {split}, only {', '.join(info['splits'])}")
    dataset = create_dataset(
        args.data_set,
        root=str(root),
        split=split,
        is_training=is_train,
        seed=args.seed,
        batch_size=args.batch_size,
        input_key=KEYS,
        input_img_mode="",
    )
    dataset.transform, dataset.classes = _Prepare(transform, exif), info["classes"]
    names = hashlib.sha256(repr((info["splits"][split], info["classes"])).encode()).hexdigest()
    dataset.fingerprint = dict(images=info["splits"][split]["num_samples"], names=names)
    return dataset


class ShardLoader:
    """Batches of images (B, 3, S, S) and targets (B,) from shards, as `loaders.build_loader` gives them from folders.

    Training: shards and images are shuffled by seed and epoch, each process and worker has its own shards, and all of
    them have equally many full batches; with shards of unequal length some images come twice and some not at all.
    Resuming inside an epoch reads and drops what was seen before. Validation: each image once, on every process, or
    on one of them with args.dist_eval.
    """

    def __init__(self, dataset: IterableDataset, args: Any, is_train: bool, rank: int, world_size: int) -> None:
        self.dataset, self.is_train, self.seed = dataset, is_train, args.seed
        self.batch_size = args.batch_size if is_train else int(1.5 * args.batch_size)
        self.epoch = self.skip = 0
        reader = dataset.reader
        names, sharers = list(reader.split_info.filenames), world_size if is_train or args.dist_eval else 1
        if len(names) < sharers:
            raise ShardError(
                f"{len(names)} shards of {reader.split_info.name} are too few for {sharers} processes: write more "
                "(tools.to_shards --images-per-shard)"
            )
        workers = min(args.num_workers, len(names) // sharers)
        if workers < args.num_workers:
            warn(
                f"{len(names)} shards of {reader.split_info.name}: {workers} loader processes instead of "
                f"{args.num_workers}"
            )
        if is_train:
            reader.dist_rank, reader.dist_num_replicas = rank, world_size
        else:
            self._keep_own(names, rank if sharers > 1 else 0, sharers)
        dataset.set_loader_cfg(num_workers=workers)
        self.loader = DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=workers,
            drop_last=is_train,
            pin_memory=args.pin_mem and torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        self.samples = len(dataset)
        if is_train and not len(self):
            raise ShardError(
                f"{self.samples} training images per process are fewer than one batch of {self.batch_size}"
            )

    def _keep_own(self, names: list[str], rank: int, sharers: int) -> None:
        """Keep this process's share of validation shards: timm's own division repeats images to make shares equal."""
        reader = self.dataset.reader
        lengths = dict(zip(names, reader.split_info.shard_lengths, strict=True))
        own = names[rank::sharers]
        reader.split_info.filenames, reader.num_samples = tuple(own), sum(lengths[name] for name in own)
        reader.dist_rank, reader.dist_num_replicas = 0, 1

    def start_epoch(self, epoch: int, skip: int) -> None:
        """Make the next pass that of `epoch`, without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.samples // self.batch_size if self.is_train else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.dataset.set_epoch(self.epoch)
        self.loader.generator.manual_seed(self.seed + self.epoch)  # seeds the workers, and so their augmentation
        if self.is_train:
            yield from islice(self.loader, self.skip, len(self))
            return
        seen = 0
        for images, targets in self.loader:
            seen += len(targets)
            yield images, targets
        if seen != self.samples:
            raise RunFailed(
                f"{seen} of {self.samples} validation images could be read from the shards of "
                f"{self.dataset.reader.root}"
            )
