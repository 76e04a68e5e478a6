"""What one-shot pruning costs: seconds of aligning, pricing widths, allocating and refitting, with random weights.

    python -m benchmarks.one_shot_cost [--model deit_small_patch16_224] [--images 256] [--pricing measured]

The time does not depend on what the weights are. Seconds in the table stand for multiply-accumulates: measuring a real
one is not counted here.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch

from latency.table import LatencyTable
from models import Masks, ViTDims, build_vit, compact
from pruning.align import align_
from pruning.allocation import allocate
from pruning.config import PruningConfig
from pruning.pricing import price
from pruning.probe import measure_prices
from pruning.refit import refit_
from runtime.device import device_name

PRICING = dict(gradient=price, measured=measure_prices)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="deit_small_patch16_224",
        help="timm name of the dense model (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per call (default: %(default)s)")
    parser.add_argument(
        "--target", type=float, default=0.5, help="ratio of the dense model's seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--pricing", choices=tuple(PRICING), default="gradient", help="how widths are priced (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser


def table_of_macs(dims: ViTDims) -> LatencyTable:
    """A table whose seconds follow the widths."""
    block, tokens = dims.blocks[0], dims.blocks[0].tokens
    points = dict(e=(1, dims.embed), h=(1, block.heads), q=(1, block.qk), v=(1, block.v), m=(1, block.mlp))
    seconds = {
        f"attention/EMB_{e}/QK_{h}_{q}/V_{v}": 1e-9 * h * (q + v) * (2 * e + tokens)
        for e, h, q, v in product(*(points[k] for k in "ehqv"))
    }
    seconds |= {f"mlp/EMB_{e}/MLP_{m}": 2e-9 * e * m for e, m in product(points["e"], points["m"])}
    return LatencyTable.of_parts(seconds | {f"overhead/EMB_{e}": 1e-9 * e for e in points["e"]}, {})


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = build_vit(args.model).to(args.device).eval().requires_grad_(False)
    print(f"{args.model}, {args.images} images, {device_name(args.device)}")
    images = torch.randn(args.images, 3, *model.patch_embed.img_size)
    groups, table = PruningConfig().group_sizes(model.dims), table_of_macs(model.dims)
    clock = [time.perf_counter()]

    def lap(stage: str) -> None:
        clock.append(time.perf_counter())
        print(f"{stage}: {clock[-1] - clock[-2]:.1f} s", flush=True)

    align_(model, [part.to(args.device) for part in images.split(args.batch_size)])
    lap("align")
    curves = PRICING[args.pricing](model, images, groups, args.batch_size)
    lap("price every width")
    (dims, _), *_ = allocate(table, model.dims, groups, *curves, args.target)
    lap("allocate")
    masks = Masks.first(model.dims, dims, args.device)
    refit_(model, compact(model, masks), masks, images, args.batch_size)
    lap("refit")
    print(f"in all: {clock[-1] - clock[0]:.1f} s")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
