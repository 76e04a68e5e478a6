"""Image files as RGB pictures: turned as their EXIF says, scaled from 16 and 32 bits, and named where unreadable."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from runtime.errors import RunFailed
from runtime.run import current

TURNED, SCALED = 1, 2  # what was done to an image, as bits
RANGE_16_BIT = 65_535
RANGE_32_BIT = 2**31 - 1


class DataError(ValueError):
    """Data that is missing or does not fit the arguments; one line says what is wrong and what would help."""


class CorruptImage(RunFailed):
    """An image file that cannot be read; the message is one line with the file's path.

    A DataLoader re-raises an error of a worker with the whole traceback as its argument. Only the last line of that is
    kept, so that the error reads the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Notes:
    """What was done to the images of a data set, shared with the loader workers and reported when the run ends."""

    def __init__(self, images: int, where: str) -> None:
        self.bits, self.where = torch.zeros(images, dtype=torch.uint8).share_memory_(), where
        current.say_at_end(lambda: self.summary(TURNED, "turned as their EXIF orientation says (--no-exif: as stored)"))
        current.say_at_end(lambda: self.summary(SCALED, "scaled to 8 bits from a wider type"))

    def add(self, index: int, bits: int) -> None:
        """Note what was done to an image."""
        if bits:
            self.bits[index] |= bits

    def summary(self, bit: int, what: str) -> str:
        """A line for the end of the run, '' if nothing of the kind was done."""
        count = int((self.bits & bit).count_nonzero())
        return f"{count} of {len(self.bits)} images of {self.where} were {what}" if count else ""


def list_some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def to_rgb(image: Image.Image, exif: bool = True) -> tuple[Image.Image, int]:
    """A picture as 8-bit RGB, and what was done to it (TURNED, SCALED).

    exif: turn it as its EXIF orientation says. Wider greyscale is scaled by the range of its type: 16 bits by 65,535,
    32-bit integers by that too unless a value exceeds it, floating point from 0 to 1. Raises ValueError for negative
    integers and for floating point outside that range.
    """
    bits = 0
    if exif and image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        image, bits = ImageOps.exif_transpose(image), TURNED
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, bits = _to_8_bits(image), bits | SCALED
    return image.convert("RGB"), bits


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    lowest, highest = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"floating-point values from {lowest:g} to {highest:g}, expected 0 to 1")
        largest = 1
    elif lowest < 0:
        raise ValueError(f"negative values, down to {lowest:g}")
    else:
        largest = RANGE_16_BIT if highest <= RANGE_16_BIT else RANGE_32_BIT
    return Image.fromarray(np.rint(values * (255 / largest)).astype(np.uint8))


def open_image(path: str, exif: bool = True) -> tuple[Image.Image, int]:
    """An image file as 8-bit RGB, and what was done to it (`to_rgb`). Raises CorruptImage, which names the path."""
    content = b""
    try:
        content = Path(path).read_bytes()  # Pillow would read the file in dozens of small pieces
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image, exif)
    except UnidentifiedImageError:
        reason = "not an image that Pillow knows" if content else "the file is empty"
    except Exception as error:  # Pillow's decoders raise a dozen types, from OSError to struct.error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise CorruptImage(f"cannot read image {path} ({reason})")


def read_image(path: str, exif: bool = True) -> Image.Image:
    """An image file as 8-bit RGB. Raises CorruptImage, which names the path."""
    return open_image(path, exif)[0]
