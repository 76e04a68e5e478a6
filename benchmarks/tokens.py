"""Prune and Merge: speed over keep rates.

    python -m benchmarks.tokens [--models deit_tiny_patch16_224 …] [--batch-size 16] [--device cuda --dtype bf16]

Prints dense over compressed time, interleaved, fused attention on both sides, a tenth of the patches skipped. What it
costs in accuracy is on `benchmarks.leaderboard`.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from latency.measure import DTYPES, interleaved, ratio
from latency.whole import build_random, random_images
from models import Arch, ViTDims, skeleton
from models.tokens import layers, streamline_
from pruning import pm_vit, token_merging
from runtime.console import table
from runtime.device import device_name

KEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["deit_tiny_patch16_224", "deit_small_patch16_224"],
        help="timm names",
    )
    parser.add_argument("--keep_rates", type=float, nargs="+", default=KEEP, help="shares of patches that stay")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of interleaved measurements (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="under torch.compile (default: eager)")
    return parser


def by_content(arch: str, keep_rate: float, device: torch.device) -> nn.Module:
    """A model with random weights, the same share of patches left in every block, merged by content."""
    dims = token_merging.uniform(ViTDims.of(parent := skeleton(arch)), keep_rate, parent.num_prefix_tokens)
    return streamline_(build_random(Arch.of(arch, content_merge=True), dims, device))


def with_structure(arch: str, keep_rate: float, device: torch.device, route: str | None = None) -> nn.Module:
    """A model with random weights and scores, a tenth of its patches skipped."""
    parent = skeleton(arch)
    prefix, patches, depth = parent.num_prefix_tokens, parent.patch_embed.num_patches, len(parent.blocks)
    ranks = torch.rand(1, patches, generator=torch.Generator().manual_seed(0)).expand(depth, -1)
    structure = pm_vit.choose_centres(ranks, range(depth), min(0.1, 1 - keep_rate), keep_rate)
    dims = token_merging.dims_after(ViTDims.of(parent), structure, prefix)
    model = build_random(Arch.of(arch), dims, device)
    for i, tokens in layers(model):
        assignment = token_merging.assign_patches(
            structure, i, parent.patch_embed.grid_size, prefix, token_merging.Merging()
        )
        tokens.set(*(t.to(device) for t in assignment))
        tokens.route = route
    return streamline_(model)


def main(args: argparse.Namespace) -> None:
    """A line per model and keep rate."""
    device = torch.device(args.device)
    how = "compiled" if args.compile else "eager"
    print(f"batch {args.batch_size}, {args.dtype}, {how}, {device_name(device)}")
    for arch in args.models:
        images = random_images(Arch.of(arch), args.batch_size, device)
        models = {f"{k:g}": with_structure(arch, k, device) for k in args.keep_rates}
        models |= {"0.6 as products": with_structure(arch, 0.6, device, route="products")}
        models |= {f"{k:g} by content": by_content(arch, k, device) for k in args.keep_rates}
        timings = interleaved(
            dict(dense=build_random(Arch.of(arch), None, device)) | models,
            images,
            args.rounds,
            dtype=args.dtype,
            compiled=args.compile,
        )
        lines = []
        for name in models:
            speedup = ratio(timings["dense"], timings[name])
            lines.append(
                [
                    name,
                    f"{args.batch_size / timings[name].median:,.0f}",
                    f"{speedup.median:.2f}x",
                    f"{speedup.q1:.2f} to {speedup.q3:.2f}",
                ]
            )
        print(f"{arch}: dense {args.batch_size / timings['dense'].median:,.0f} images/s")
        print(table(["keep rate", "images/s", "speed-up", "quartiles"], lines), flush=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
