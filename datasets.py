"""Data sets and their transforms; flag names and augmentation are DeiT's.

`args` is a Namespace with DeiT's names. Images come out as float32 (3, S, S), as a `Preparation` says; targets are
class indices.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import InterpolationMode

from loading import inat, shards
from loading.folders import ClassFolders, Skipping, class_folders
from loading.images import DataError, list_some
from loading.preparation import SMALL, Preparation
from runtime.console import say

DATA_SETS = ("DIGITS", "CIFAR10", "CIFAR100", "CIFAR", "IMNET", "INAT", "INAT19")


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 grey), in memory: a fixed stratified split, 1,437 to 360."""

    def __init__(self, is_train: bool, transform: Callable[[Image.Image], Tensor] | None = None) -> None:
        from sklearn.datasets import load_digits  # takes a second to import: only for this data set
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = np.sort(split[0 if is_train else 1])
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 0 .. 16 in scikit-learn
        self.images = [Image.fromarray(image).convert("RGB") for image in pixels]
        self.targets: list[int] = digits.target[chosen].tolist()
        self.classes = [str(digit) for digit in digits.target_names]
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


def build_dataset(
    is_train: bool, args: Any, augment: bool = True, preparation: Preparation | None = None
) -> tuple[Dataset, int]:
    """The training or the validation split of `args.data_set`, and its number of classes.

    augment: False prepares training images as validation images; preparation: as of `build_transform`. Only the
    requested split has to exist: evaluation needs no training images. Raises DataError; reading an image may raise
    CorruptImage, or return None if args.bad_images is "skip" (`Skipping`).
    """
    transform = build_transform(is_train and augment, args, preparation)
    if args.data_set == "DIGITS":
        dataset = Digits(is_train, transform)
    elif args.data_set in ("CIFAR10", "CIFAR100", "CIFAR"):
        dataset = _cifar(is_train, args, transform)
    elif args.data_set == "IMNET":
        dataset = _image_folder(is_train, args, transform)
    elif args.data_set in inat.YEARS:
        dataset = _inat(is_train, args, transform)
    elif args.data_set.startswith(shards.PREFIX):
        dataset = shards.build(is_train, args, transform, reads_exif(args))
    else:
        raise DataError(_unknown(args.data_set))
    classes = len(dataset.classes)
    if classes < 2 and not getattr(args, "one_shot", False):  # which looks at no label
        raise DataError(f"the data has one class, {dataset.classes[0]}: there is nothing to tell apart")
    if isinstance(dataset, ClassFolders) and getattr(args, "bad_images", "error") == "skip":
        dataset = Skipping(dataset, stand_in=is_train)
    return dataset, classes


def _unknown(spec: str) -> str:
    """The message for an unknown data set, with the closest name."""
    source = spec.split("/")[0].lower()
    if source == "hfds":
        return (
            f"--data-set {spec} needs Hugging Face's package `datasets`, whose name a module of this project "
            "has: write its images to a folder, python -m tools.to_shards FOLDER DIR, and take wds/NAME"
        )
    if "/" in spec and difflib.get_close_matches(source, ["wds"], cutoff=0.5):
        return f"no data set {spec!r}; closest: {shards.PREFIX}{spec.split('/', 1)[1]}"
    closest = difflib.get_close_matches(spec.upper(), DATA_SETS, n=1, cutoff=0.7)
    hint = f"closest: {closest[0]}; " if closest else ""
    return f"no data set {spec!r}; {hint}--data-set is one of {', '.join(DATA_SETS)} or wds/NAME"


def reads_exif(args: Any) -> bool:
    """Whether images are turned as their EXIF orientation says."""
    return getattr(args, "exif", True)  # benchmarks have no flag for it


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
    remedy = f"put the extracted {kind.base_folder} folder under DATA_PATH; this project downloads no data"
    if not (root / kind.base_folder).is_dir():
        raise DataError(f"no {kind.base_folder} in {root}: {remedy}")
    try:
        return kind(root, train=is_train, transform=transform, download=False)
    except RuntimeError:
        raise DataError(f"files of {root / kind.base_folder} are missing or damaged: {remedy}") from None


def _inat(is_train: bool, args: Any, transform: Callable) -> Dataset:
    root, year = _data_folder(args), inat.YEARS[args.data_set]
    try:
        return inat.INaturalist(root, is_train, year, args.inat_category, transform, reads_exif(args))
    except ValueError as error:
        raise DataError(str(error)) from None


def _image_folder(is_train: bool, args: Any, transform: Callable) -> Dataset:
    root = _data_folder(args)
    split, other = (root / name for name in (("train", "val") if is_train else ("val", "train")))
    classes = class_folders(split)
    if other.is_dir():
        others = class_folders(other)
        odd = [
            f"only in {here.name}/: {list_some(sorted(set(mine) - set(theirs)))}"
            for here, mine, theirs in ((split, classes, others), (other, others, classes))
            if set(mine) - set(theirs)
        ]
        if odd:
            raise DataError(f"train/ and val/ of {root} must hold the same class folders; {'; '.join(odd)}")
    return ClassFolders(split, transform, reads_exif(args))


def build_transform(
    is_train: bool, args: Any, preparation: Preparation | None = None
) -> Callable[[Image.Image], Tensor]:
    """PIL image to normalised float32 (3, S, S). preparation: `Preparation.usual` of args.input_size by default.

    Validation: timm's transform of the preparation. Training: timm's pipeline with args.aa, color_jitter, hflip,
    train_interpolation (None for the preparation's), reprob, remode and recount; up to 32 pixels a padded random crop
    replaces the random resized crop, as in DeiT. DIGITS use their own: a small rotation, scaling and shift, no flip (a
    mirrored digit is another sign), and none of those flags. Raises DataError for a policy (args.aa) that timm does not
    know.
    """
    preparation = preparation or Preparation.usual(args.input_size)
    if not is_train:
        return preparation.eval_transform()
    if args.data_set == "DIGITS":
        say("DIGITS have their own augmentation: --aa, --color-jitter and --reprob have no effect on them")
        size = preparation.size
        return transforms.Compose(
            [
                _resize(size),
                transforms.RandomAffine(degrees=10, scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR),
                transforms.RandomCrop(size, padding=max(1, size // 8)),
                transforms.ToTensor(),
                transforms.Normalize(preparation.mean, preparation.std),
            ]
        )
    return _timm_transform(args, preparation)


def _resize(side: int) -> transforms.Resize:
    return transforms.Resize(side, interpolation=InterpolationMode.BICUBIC)  # images of that size pass unchanged


def _posterize(image: Image.Image, bits_to_keep: int, **hparams: Any) -> Image.Image:
    """timm's function, also for 0 bits, which RandAugment asks for at full strength and Pillow 13 refuses."""
    return auto_augment.posterize(image, bits_to_keep, **hparams) if bits_to_keep else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _posterize


def _timm_transform(args: Any, preparation: Preparation) -> transforms.Compose:
    policy = args.aa if args.aa and args.aa.lower() != "none" else None
    try:
        transform = create_transform(
            input_size=preparation.size,
            is_training=True,
            hflip=args.hflip,
            color_jitter=args.color_jitter or None,
            auto_augment=policy,
            interpolation=args.train_interpolation or preparation.interpolation,
            mean=preparation.mean,
            std=preparation.std,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"--aa {policy}: timm knows no such policy ({error}); e.g. rand-m9-mstd0.5-inc1") from None
    if preparation.size <= SMALL:
        transform.transforms[:1] = [_resize(preparation.size), transforms.RandomCrop(preparation.size, padding=4)]
    return transform
