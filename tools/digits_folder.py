"""scikit-learn's handwritten digits as a folder of images: python -m tools.digits_folder DIR

DIR gets train/ and val/ with a folder of PNG files per class, the layout that --data-path takes: a data set to try
things on that needs no download. The split is that of --data-set DIGITS.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import options
from datasets import Digits
from runtime.console import say, say_next
from runtime.errors import BadArguments
from runtime.folders import make_folder
from runtime.script import run_script


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__, "example: python -m tools.digits_folder runs/digits --size 32", "tools.digits_folder"
    )
    parser.add_argument("output", metavar="DIR", type=Path, help="folder to write")
    parser.add_argument(
        "--size", metavar="PIXELS", type=int, default=16, help="side of the images (default: %(default)s)"
    )
    return parser


def write(split: str, data: Digits, output: Path, size: int) -> int:
    """Write one split; returns the number of images."""
    for i, (image, target) in enumerate(data):
        folder = output / split / data.classes[target]
        folder.mkdir(parents=True, exist_ok=True)
        image.resize((size, size)).save(folder / f"{i:04d}.png")
    return len(data)


def main(args: argparse.Namespace) -> None:
    if args.size < 1:
        raise BadArguments([f"--size must be at least 1, not {args.size}"])
    try:
        output = make_folder(args.output)
    except ValueError as error:
        raise BadArguments([str(error)]) from None
    counts = {split: write(split, Digits(split == "train"), output, args.size) for split in ("train", "val")}
    say_next(
        "finetune_dense.py --scratch --model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 "
        f"--data-path {shlex.quote(str(output))} --hflip 0 --kl_loss_coeff 0 --original_loss_coeff 1 "
        "--output_dir runs"
    )
    say(f"{output}: {counts['train']} training and {counts['val']} validation images of {args.size} x {args.size}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
