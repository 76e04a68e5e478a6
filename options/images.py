"""Flags that say how images are prepared, where the weights' own way is not meant."""

from __future__ import annotations

import argparse
from typing import Any

from loading.preparation import INTERPOLATIONS
from options.ranges import SHARE, SHARE_ABOVE_0, STD


class PerChannel(argparse.Action):
    """`--mean 0.5 0.4 0.3`, or `--mean 0.5 all`: three numbers."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            first, *more = values
            numbers = (float(first),) * 3 if more == ["all"] else tuple(map(float, values))
        except ValueError:
            numbers = ()
        if len(numbers) != 3:
            typed = " ".join(values)
            parser.error(f"{option} takes three numbers, or one for every channel as in {option} 0.5 all, not {typed}")
        setattr(namespace, self.dest, numbers)


def add_preparation_args(group: Any) -> None:
    """What overrides the preparation that belongs to the weights; a resumed run is compared by what came of it."""
    own = "(default: as the checkpoint has it, else as timm has it for the weights of --model)"
    group.add_argument(
        "--mean",
        metavar="F",
        nargs="+",
        action=PerChannel,
        default=None,
        help="what is subtracted from pixels in [0, 1]: a number for each of red, green and blue, or one and the word "
        f"all {own}",
        check=SHARE,
        may_differ=True,
    )
    group.add_argument(
        "--std",
        metavar="F",
        nargs="+",
        action=PerChannel,
        default=None,
        help=f"what pixels are then divided by, in the same form {own}",
        check=STD,
        may_differ=True,
    )
    group.add_argument(
        "--crop_pct",
        metavar="SHARE",
        type=float,
        default=None,
        help=f"share of the resized image's side that evaluation keeps {own}",
        check=SHARE_ABOVE_0,
        may_differ=True,
    )
    group.add_argument(
        "--interpolation",
        choices=INTERPOLATIONS,
        default=None,
        help=f"how evaluation resizes images, and training too unless --train-interpolation says otherwise {own}",
        may_differ=True,
    )
