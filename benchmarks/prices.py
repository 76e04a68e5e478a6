"""Prices of widths by the second order against measured ones, and what each takes.

    python -m benchmarks.prices --initial-checkpoint cifar10_deit.pth --bench FOLDER --table T

For every seed, which chooses the calibration images: the correlation of the logarithms, and quantiles of the ratio.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.footing import BATCH, Bench
from pruning.align import align_
from pruning.config import PruningConfig
from pruning.one_shot import PRICING
from pruning.probe import Prices
from runtime.device import device_name

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-checkpoint", required=True, help="the dense CIFAR-10 model")
    parser.add_argument("--bench", type=Path, default=Path("../shared/bench"), help="folder of equal_footing.py")
    parser.add_argument("--table", required=True, help="latency table of the model")
    parser.add_argument("--calib", type=int, default=1024, help="calibration images (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of images (default: 0 1 2)")
    return parser


def flat(prices: Prices) -> dict[tuple, float]:
    """Prices above 0 by (block, axis, width); of the embedding, block None."""
    blocks = {(i, a, w): v for i, curves in enumerate(prices.blocks) for a, c in curves.items() for w, v in c.items()}
    return {key: v for key, v in (blocks | {(None, "embed", w): v for w, v in prices.embed.items()}).items() if v > 0}


def compare(found: Prices, expected: Prices) -> tuple[int, float, np.ndarray]:
    """(prices that both have, correlation of their logarithms, quantiles of found over expected)."""
    mine, theirs = flat(found), flat(expected)
    keys = [key for key in theirs if key in mine]
    a, b = (np.log([prices[key] for key in keys]) for prices in (mine, theirs))
    return len(keys), float(np.corrcoef(a, b)[0, 1]), np.exp(np.quantile(a - b, QUANTILES))


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    bench = Bench(args.initial_checkpoint, args.bench, args.table, args.calib)
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, fp32, {args.calib} images")
    for seed in args.seeds:
        model = bench.model().requires_grad_(False)
        images = bench.images(seed)
        align_(model, images.split(BATCH))
        groups, prices, seconds = PruningConfig().group_sizes(model.dims), {}, {}
        for name, price in PRICING.items():
            begin = time.perf_counter()
            prices[name] = price(model, images, groups, BATCH)
            seconds[name] = time.perf_counter() - begin
        count, correlation, quantiles = compare(prices["gradient"], prices["measured"])
        print(
            f"seed {seed}: {count} prices, correlation {correlation:.4f}, ratio "
            f"{' '.join(f'{q:.2f}' for q in quantiles)} (lowest, tenths, median, highest); "
            f"{seconds['gradient']:.1f} s, measured {seconds['measured']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
