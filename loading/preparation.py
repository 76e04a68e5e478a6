"""How images are prepared for a model: size, crop, interpolation and normalisation, as one value that travels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from torch import Tensor

from loading.images import DataError

SMALL = 32  # pixels: up to this side, images are not cropped for evaluation, and padded and cropped for training
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "box", "hamming", "nearest")
CROP_MODES = ("center", "squash", "border")
LEAST_STD = 0.001  # of pixels in [0, 1]
MOST_CROP = 2.0  # timm has models of up to 1.15
FLAGS = ("mean", "std", "crop_pct", "interpolation")  # that override a part of it

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preparation:
    """From a PIL image to a model's input: float32 (3, size, size), (pixel - mean) / std of pixels in [0, 1].

    crop_pct: share of the resized image's side that evaluation keeps; crop_mode, interpolation: timm's names.
    """

    size: int
    mean: Channels = IMAGENET_DEFAULT_MEAN
    std: Channels = IMAGENET_DEFAULT_STD
    crop_pct: float = 224 / 256
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    @classmethod
    def usual(cls, size: int) -> Preparation:
        """DeiT's, for every model: what files mean that do not say how their images were prepared."""
        return cls(size, crop_pct=1.0 if size <= SMALL else 224 / 256)

    @classmethod
    def of_timm(cls, pretrained_cfg: dict[str, Any], size: int) -> Preparation:
        """What timm says of weights, by their `pretrained_cfg`, for images of `size`; small ones are not cropped."""
        config = resolve_data_config(dict(img_size=size), pretrained_cfg)
        found = cls.of_record(config, size)
        return replace(found, crop_pct=1.0) if size <= SMALL else found

    @classmethod
    def of_record(cls, record: Any, size: int) -> Preparation:
        """From what files hold, for images of `size`. Raises DataError, whose message follows the file's name."""
        try:
            channels = {name: tuple(map(_number, record[name])) for name in ("mean", "std")}
            crop_pct, crop_mode, interpolation = (record[name] for name in ("crop_pct", "crop_mode", "interpolation"))
            crop_pct = _number(crop_pct)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"data_config is incomplete ({type(error).__name__}: {error})") from None
        if any(len(values) != 3 for values in channels.values()) or min(channels["std"]) < LEAST_STD:
            raise DataError(f"data_config must hold three means and three standard deviations from {LEAST_STD} up")
        if not 0 < crop_pct <= MOST_CROP or crop_mode not in CROP_MODES or interpolation not in INTERPOLATIONS:
            parts = ", ".join(str(part)[:20] for part in (crop_pct, crop_mode, interpolation))
            raise DataError(f"data_config has a crop or an interpolation that is not known: {parts}")
        return cls(size, **channels, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)

    @property
    def record(self) -> dict[str, Any]:
        """As files hold it, and as `timm.data.create_transform` takes it."""
        return dict(
            input_size=(3, self.size, self.size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def with_flags(self, args: Any) -> Preparation:
        """With what --mean, --std, --crop_pct and --interpolation say."""
        flags = dict(mean=args.mean, std=args.std, crop_pct=args.crop_pct, interpolation=args.interpolation)
        return replace(self, **{name: value for name, value in flags.items() if value is not None})

    def differences(self, other: Preparation) -> dict[str, tuple[str, str]]:
        """The parts that differ, by name: how they read in this one and in the other."""
        names = (*FLAGS, "crop_mode", "size")
        return {
            name: (_shown(mine), _shown(theirs))
            for name in names
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        }

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's transform of validation images: a PIL image to (3, size, size)."""
        return create_transform(**self.record)

    def __str__(self) -> str:
        crop = f"crop {self.crop_pct}" + ("" if self.crop_mode == "center" else f" ({self.crop_mode})")
        return f"mean {_shown(self.mean)}, std {_shown(self.std)}, {crop}, {self.interpolation}, {self.size} pixels"


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:20]!r} is not a number")
    return float(value)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
