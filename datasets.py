"""Data sets, their transforms and their loaders; flag names and augmentation are DeiT's.

`args` is a Namespace with DeiT's names. Images come out as float32 (3, S, S), S = args.input_size, normalised with
ImageNet's mean and standard deviation; targets are class indices.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import InterpolationMode

from utils import RunFailed, say

DATA_SETS = ("DIGITS", "CIFAR10", "CIFAR100", "CIFAR", "IMNET")
SMALL = 32  # pixels: up to this side, images are padded and cropped, not resized at random


class DataError(ValueError):
    """Data that is not there or does not fit the arguments; one line: what is wrong, and what would be right."""


class CorruptImage(RunFailed):
    """An image file that cannot be read; its message is one line with the file's path.

    A DataLoader re-raises what a worker process raised with the whole traceback as the only argument. The traceback's
    last line is the message, so that is what is kept: the error reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 grey), in memory: a fixed stratified split, 1,437 to 360."""

    def __init__(self, is_train: bool, transform: Callable[[Image.Image], Tensor] | None = None) -> None:
        from sklearn.datasets import load_digits  # takes a second to import: only where these digits are used
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = np.sort(split[0 if is_train else 1])
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 0 .. 16 as delivered
        self.images = [Image.fromarray(image).convert("RGB") for image in pixels]
        self.targets: list[int] = digits.target[chosen].tolist()
        self.classes = [str(digit) for digit in digits.target_names]
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


class ShardSampler(Sampler[int]):
    """Samples rank, rank + world_size, …: every sample on exactly one process, with no padding."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class RepeatedAugSampler(RepeatAugSampler):
    """timm's (three augmented views of a third of the images per epoch), in an order that the seed changes as well."""

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int) -> None:
        rounding = 256 if len(dataset) >= 256 else 0  # older timm would round a smaller data set to nothing
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, selected_round=rounding)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


def build_dataset(is_train: bool, args: Any) -> tuple[Dataset, int]:
    """The training or the validation split of `args.data_set`, and its number of classes.

    Only the split asked for has to be there: validation images are enough to evaluate. Raises DataError; reading an
    image from the result may raise CorruptImage.
    """
    transform = build_transform(is_train, args)
    if args.data_set == "DIGITS":
        dataset = Digits(is_train, transform)
    elif args.data_set in ("CIFAR10", "CIFAR100", "CIFAR"):
        dataset = _cifar(is_train, args, transform)
    elif args.data_set == "IMNET":
        dataset = _image_folder(is_train, args, transform)
    else:
        raise DataError(f"no data set {args.data_set!r}; --data-set is one of {', '.join(DATA_SETS)}")
    return dataset, len(dataset.classes)


def _data_folder(args: Any) -> Path:
    if not args.data_path:
        raise DataError(f"--data-set {args.data_set} needs --data-path, the folder that holds the data")
    root = Path(args.data_path)
    if not root.is_dir():
        raise DataError(f"no data folder {root}; --data-path must name an existing folder")
    return root


def _cifar(is_train: bool, args: Any, transform: Callable) -> Dataset:
    if args.data_set == "CIFAR" and is_train:
        say("--data-set CIFAR is CIFAR-100, as in DeiT; CIFAR10 is the one with 10 classes")
    kind = CIFAR10 if args.data_set == "CIFAR10" else CIFAR100
    root = _data_folder(args)
    remedy = f"put the extracted {kind.base_folder} folder under DATA_PATH; nothing is downloaded"
    if not (root / kind.base_folder).is_dir():
        raise DataError(f"no {kind.base_folder} in {root}: {remedy}")
    try:
        return kind(root, train=is_train, transform=transform, download=False)
    except RuntimeError:
        raise DataError(f"files of {root / kind.base_folder} are missing or damaged: {remedy}") from None


def _class_folders(split: Path) -> list[str]:
    if not split.is_dir():
        raise DataError(f"no {split.name}/ in {split.parent}; --data-path must hold train/ and val/ with class folders")
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir())
    if not classes:
        raise DataError(f"no class folders in {split}; it must hold one folder of images per class")
    return classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _image_folder(is_train: bool, args: Any, transform: Callable) -> Dataset:
    root = _data_folder(args)
    split, other = (root / name for name in (("train", "val") if is_train else ("val", "train")))
    classes = _class_folders(split)
    if other.is_dir():
        others = _class_folders(other)
        odd = [f"only in {here.name}/: {_some(sorted(set(mine) - set(theirs)))}"
               for here, mine, theirs in ((split, classes, others), (other, others, classes))
               if set(mine) - set(theirs)]  # fmt: skip
        if odd:
            raise DataError(f"train/ and val/ of {root} must hold the same class folders; {'; '.join(odd)}")
    dataset = ImageFolder(split, transform=transform, loader=read_image, allow_empty=True)
    filled = set(dataset.targets)
    if empty := [name for i, name in enumerate(dataset.classes) if i not in filled]:
        raise DataError(f"class folders of {split} without images: {_some(empty)}; each needs at least one image")
    return dataset


def read_image(path: str) -> Image.Image:
    """The file as an RGB image. Raises CorruptImage, which names the path."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds, from OSError to struct.error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorruptImage(f"cannot read image {path} ({reason})") from None


def build_transform(is_train: bool, args: Any) -> Callable[[Image.Image], Tensor]:
    """PIL image to normalised float32 (3, S, S).

    Validation: bicubic resize of the shorter side to S * 256 / 224 and centre crop; up to 32 pixels, to S itself.
    Training: timm's pipeline with args.aa, color_jitter, train_interpolation, reprob, remode, recount; up to 32 pixels
    a padded random crop stands in for the random resized one, as in DeiT. DIGITS have their own: a small rotation,
    scaling and shift, no flip (a mirrored digit is another sign), and none of those flags. Raises DataError for a
    policy (args.aa) that timm does not know.
    """
    size = args.input_size
    if not is_train:
        return transforms.Compose([
            _resize(size if size <= SMALL else size * 256 // 224), transforms.CenterCrop(size), *_normalised(),
        ])  # fmt: skip
    if args.data_set == "DIGITS":
        say("DIGITS have their own augmentation: --aa, --color-jitter and --reprob have no effect on them")
        return transforms.Compose([
            _resize(size),
            transforms.RandomAffine(degrees=10, scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR),
            transforms.RandomCrop(size, padding=max(1, size // 8)),
            *_normalised(),
        ])  # fmt: skip
    return _timm_transform(args)


def _resize(side: int) -> transforms.Resize:
    return transforms.Resize(side, interpolation=InterpolationMode.BICUBIC)  # images of that size pass unchanged


def _normalised() -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def _timm_transform(args: Any) -> transforms.Compose:
    policy = args.aa if args.aa and args.aa.lower() != "none" else None
    try:
        transform = create_transform(
            input_size=args.input_size,
            is_training=True,
            color_jitter=args.color_jitter or None,
            auto_augment=policy,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"--aa {policy}: timm knows no such policy ({error}); e.g. rand-m9-mstd0.5-inc1") from None
    if args.input_size <= SMALL:
        crop = transforms.RandomCrop(args.input_size, padding=4)
        transform.transforms[:1] = [_resize(args.input_size), crop]
    return transform


def build_loader(
    dataset: Dataset, args: Any, is_train: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of images (B, 3, S, S) and targets (B,) for one of `world_size` processes.

    Training: shuffled, shared out among the processes, only whole batches of args.batch_size; repeated augmentation
    with several processes and args.repeated_aug. Call `start_epoch` before each epoch. Validation: in order, 1.5 times
    the batch, every sample once: on each process, or with args.dist_eval on one of them. Raises DataError when a
    process has fewer training images than one batch.
    """
    batch = args.batch_size if is_train else int(1.5 * args.batch_size)
    sampler = (_train_sampler if is_train else _val_sampler)(dataset, args, rank, world_size)
    if is_train and len(sampler) < batch:
        raise DataError(f"{len(sampler)} training images per process are fewer than one batch of {batch}; "
                        f"--batch-size can be at most {len(sampler)}")  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        drop_last=is_train,
        generator=torch.Generator(),  # its own, so that loading never draws from the global one in this process
    )
    if is_train:
        start_epoch(loader, 0)
    return loader


def _train_sampler(dataset: Dataset, args: Any, rank: int, world_size: int) -> Sampler[int]:
    if args.repeated_aug and world_size > 1:
        return RepeatedAugSampler(dataset, world_size, rank, args.seed)
    return DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)


def _val_sampler(dataset: Dataset, args: Any, rank: int, world_size: int) -> Sampler[int]:
    return ShardSampler(len(dataset), rank, world_size) if args.dist_eval else ShardSampler(len(dataset), 0, 1)


def start_epoch(loader: DataLoader, epoch: int) -> None:
    """Make a training loader's next pass that of `epoch`, whatever it has read before: what resuming a run rests on.

    The order becomes a function of (seed, epoch) and what worker processes draw one of (seed, epoch, rank, worker).
    Without workers, transforms draw from this process's global generators, whose states the caller must restore.
    """
    sampler = loader.sampler
    sampler.set_epoch(epoch)
    mixed = np.random.SeedSequence((sampler.seed % 2**32, epoch, sampler.rank)).generate_state(1)
    loader.generator.manual_seed(int(mixed[0]))  # workers are seeded from it when the pass begins; so none persists
