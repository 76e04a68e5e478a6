"""Seconds per block of pricing widths, over depth: python -m benchmarks.depth_scaling [--depths 6 12 24 40]

Random weights and images: the time does not depend on them. Depths take turns and the median of the rounds counts. The
last column compares a block of each depth with one of the first. `--pricing measured` is quadratic in depth.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from models import build_vit
from pruning.config import PruningConfig
from pruning.one_shot import PRICING
from runtime.console import table
from runtime.device import device_name


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 40], help="blocks (default: 6 12 24 40)")
    parser.add_argument("--embed-dim", type=int, default=128, help="width of the model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=128, help="calibration images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each depth (default: %(default)s)")
    parser.add_argument("--pricing", choices=tuple(PRICING), default="gradient", help="default: %(default)s")
    return parser


@torch.no_grad()
def main(args: argparse.Namespace) -> list[float]:
    """Prints the table; returns the seconds per block."""
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=4, embed_dim=args.embed_dim, num_heads=4, num_classes=10)
    models = [
        build_vit("vit_tiny_patch16_224", depth=depth, **size).eval().requires_grad_(False) for depth in args.depths
    ]
    images = torch.randn(args.images, 3, 32, 32)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(args.rounds):
        for model, times in zip(models, seconds, strict=True):
            begin = time.perf_counter()
            PRICING[args.pricing](model, images, PruningConfig().group_sizes(model.dims), args.batch_size)
            times.append((time.perf_counter() - begin) / len(model.blocks))
    medians = [statistics.median(times) for times in seconds]
    rows = []
    for depth, times, median in zip(args.depths, seconds, medians, strict=True):
        spread = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
        rows.append([str(depth), f"{1e3 * median:.0f}", spread, f"{median / medians[0]:.2f}"])
    print(f"{args.pricing} pricing, {device_name('cpu')}, {torch.get_num_threads()} threads, {args.images} images")
    print(table(["blocks", "ms per block", "lowest to highest", "over the first"], rows))
    return medians


if __name__ == "__main__":
    main(get_args_parser().parse_args())
