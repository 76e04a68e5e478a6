"""Prune and Merge: speed over keep rates, and accuracy beside ToMe-style merging at equal latency.

    python -m benchmarks.tokens speed [--models deit_tiny_patch16_224 …] [--batch-size 16] [--device cuda --dtype bf16]
    python -m benchmarks.tokens accuracy --initial-checkpoint FILE --bench FOLDER --rows FILE

`speed` prints dense over compressed time, interleaved, fused attention on both sides, a tenth of the patches skipped.
`accuracy` compresses the CIFAR-10 base, one-shot and after the shared recovery recipe of the folder --bench
(equal_footing.py); rows that --rows holds already are not repeated. `tome` is bipartite matching written from the paper
(Bolya et al., arXiv 2210.09461), with as many merged as come nearest to the latency of --equal_to.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rows import append, read, spread
from benchmarks.tome import ToMeBlock, tome
from latency.measure import DTYPES, interleaved, ratio, settle_allocator
from latency.whole import build_random, random_images
from models import Arch, Masks, TokenLogits, ViTDims, build_vit, skeleton
from models.pretrained import load_initial_, read_initial
from models.tokens import layers, streamline_
from pruning import pm_vit, token_merging
from pruning.refit import refit_
from pruning.token_counts import choose_counts
from runtime.console import table
from runtime.device import device_name

PROBED = 256  # images
ASKED = ("keep_rate", "prune_rate", "depth_factor", "epochs", "per_class")  # flags that a row belongs to
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
METHODS = {  # mode of scoring, then how patches are merged
    "attn": ("attn", token_merging.Merging()),
    "attn, raster": ("attn", token_merging.Merging(where="raster")),
    "attn, as published": ("attn", token_merging.Merging("raster", published=True, shortcut=False)),
    "attn, without shortcut": ("attn", token_merging.Merging(shortcut=False)),
    "attn, compensated": ("attn", token_merging.Merging()),
    "head_entropy": ("head_entropy", token_merging.Merging()),
    "probe": ("probe", token_merging.Merging()),
    "attn, content": ("attn", token_merging.Merging(where="content")),
    "probe, content": ("probe", token_merging.Merging(where="content")),
    "probe, content, compensated": ("probe", token_merging.Merging(where="content")),
    "random": ("random", token_merging.Merging()),
    "seq": ("seq", token_merging.Merging()),
    "tome": (),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "accuracy"), help="what to measure")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["deit_tiny_patch16_224", "deit_small_patch16_224"],
        help="timm names, of `speed`",
    )
    parser.add_argument("--keep_rates", type=float, nargs="+", default=KEEP, help="of `speed`")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of interleaved measurements (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="`speed` under torch.compile (default: eager)")
    parser.add_argument("--initial-checkpoint", help="dense weights")
    parser.add_argument("--bench", type=Path, help="folder of equal_footing.py")
    parser.add_argument("--rows", type=Path, help="results, one row a line")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="rows of the table")
    parser.add_argument(
        "--equal_to",
        choices=[m for m in METHODS if m != "tome"],
        metavar="METHOD",
        help="whose latency tome takes (default: that of the first of --methods)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="rows of each method")
    parser.add_argument(
        "--keep_rate", type=float, default=0.6, help="share of patches that stay (default: %(default)s)"
    )
    parser.add_argument("--prune_rate", type=float, default=0.1, help="share that is skipped (default: %(default)s)")
    parser.add_argument("--depth_factor", type=float, default=pm_vit.DEPTH_FACTOR, help="as main_pm_vit.py takes it")
    parser.add_argument("--batches", type=int, default=80, help="of 64 images, to score on")
    parser.add_argument("--calib", type=int, default=1024, help="images to compensate on")
    parser.add_argument("--epochs", type=int, default=2, help="of recovery")
    parser.add_argument("--per-class", type=int, default=1000, help="training images a class for recovery")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after so many")
    return parser


# --------------------------------------------------------------------------------------------------------------- speed
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


def speed(args: argparse.Namespace) -> None:
    """A line per model and keep rate."""
    device = torch.device(args.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    how = "compiled" if args.compile else "eager"
    print(f"batch {args.batch_size}, {args.dtype}, {how}, {device_name(device).removesuffix(threads)}{threads}")
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


# ------------------------------------------------------------------------------------------------------------ accuracy
def compress(
    args: argparse.Namespace, method: str, seed: int, base: nn.Module, data: tuple[Tensor, Tensor], normalise: Any
) -> nn.Module:
    """The base compressed by one of our methods, scored on images that the seed chooses."""
    mode, merging = METHODS[method]
    content = merging.where == token_merging.CONTENT
    prune_rate = 0.0 if content else args.prune_rate
    where, grid = range(len(base.blocks)), base.patch_embed.grid_size
    generator = torch.Generator().manual_seed(seed)
    if mode == "probe":
        pick = torch.randperm(len(data[0]), generator=generator)
        total, _ = pm_vit.budget(len(where), grid[0] * grid[1], 0.0, args.keep_rate)
        chosen = choose_counts(base, where, normalise(data[0][pick[:PROBED]]), total, 64, content)
        small = token_merging.compress(base, chosen, merging)
        return compensate(args, method, base, small, normalise(data[0][pick[: args.calib]]))
    if mode in ("random", "seq"):
        shape = len(where), grid[0] * grid[1]
        ranks = torch.rand(shape, generator=generator) if mode == "random" else pm_vit.even_ranks(where, grid)
        structure = pm_vit.choose_centres(ranks, where, prune_rate, args.keep_rate)
        return token_merging.compress(base, replace(structure, weights=torch.ones_like(ranks)), merging)
    pick = torch.randperm(len(data[0]), generator=generator)[: 64 * args.batches]
    batches = [(normalise(data[0][i]), data[1][i]) for i in pick.split(64)]

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(sum(TokenLogits(base)(images)) / 2, targets)

    ranks = pm_vit.comparable(pm_vit.measure_importance(base, where, batches, loss, mode), where, args.depth_factor)
    small = token_merging.compress(base, pm_vit.choose_centres(ranks, where, prune_rate, args.keep_rate), merging)
    return compensate(args, method, base, small, normalise(data[0][pick[: args.calib]]))


def compensate(args: argparse.Namespace, method: str, base: nn.Module, small: nn.Module, images: Tensor) -> nn.Module:
    """`small`, refitted in place where the method says so."""
    if method.endswith("compensated"):
        refit_(base, small, Masks(base.dims), images, 64)
    return small


def nearest_tome(ef: Any, base: nn.Module, target: nn.Module) -> nn.Module:
    """ToMe whose latency is nearest to that of `target`, measured side by side: by bisection over the tokens that it
    merges in all, of which the first blocks merge one more than the last where blocks do not divide them."""
    merging, target = len(base.blocks) - 1, served(target)

    def made(total: int) -> tuple[float, nn.Module]:
        model = tome(base, [*(total // merging + (i < total % merging) for i in range(merging)), None])
        return ef.latency_ratio(target, model, rounds=25)[0], model

    low, high = 0, base.patch_embed.num_patches - 1  # merged in all: too slow, too fast
    candidates = {low: made(low), high: made(high)}
    while high - low > 1:
        middle = (low + high) // 2
        candidates[middle] = made(middle)
        low, high = (middle, high) if candidates[middle][0] > 1 else (low, middle)
    return min((candidates[low], candidates[high]), key=lambda pair: abs(1 - pair[0]))[1]


def count_merged(model: nn.Module) -> list[int]:
    """Of every block, how many tokens it merges of those that come in."""
    if isinstance(model.blocks[0], ToMeBlock):
        return [block.r or 0 for block in model.blocks]
    return [max(b.tokens for b in model.dims.blocks) - b.tokens for b in model.dims.blocks]


def served(model: nn.Module) -> nn.Module:
    """As it would be deployed to classify."""
    return model if isinstance(model.blocks[0], ToMeBlock) else streamline_(copy.deepcopy(model))


def load_base(path: str) -> nn.Module:
    arch, kwargs, state = read_initial(path)
    model = build_vit(arch, **kwargs)
    load_initial_(model, state, path)
    return model.eval()


def accuracy(args: argparse.Namespace) -> None:
    """A row per method and seed, appended as it is made."""
    sys.path.insert(0, str(args.bench))
    import equal_footing as ef

    settle_allocator()
    begin = time.monotonic()
    rows = read(args.rows)
    asked = {name: getattr(args, name) for name in ASKED}
    done = {(row["method"], row["seed"]) for row in rows if asked.items() <= row.items()}
    train, val = ef.load_split("train", args.per_class), ef.load_split("val")
    base, dense = load_base(args.initial_checkpoint), ef.load_base(args.initial_checkpoint)
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) in done or time.monotonic() - begin > 60 * args.minutes:
                continue
            torch.manual_seed(seed)
            like = args.equal_to or args.methods[0]
            ours = compress(args, like if method == "tome" else method, seed, base, train, ef.normalise)
            model = nearest_tome(ef, base, ours) if method == "tome" else ours
            latency = ef.latency_ratio(dense, served(model))[0]
            row = dict(method=method, seed=seed, latency=latency) | asked
            row |= dict(oneshot=ef.top1(model, *val), merged=count_merged(model))
            ef.finetune(model.requires_grad_(True), dense, *train, args.epochs, seed=seed)
            row |= dict(finetuned=ef.top1(model, *val))
            rows.append(row)
            append(args.rows, row)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Mean and spread over seeds of every method, as asked for."""
    lines, kinds = [], [(row["method"], *map(row.get, ASKED)) for row in rows]
    for kind in dict.fromkeys(kinds):
        ours = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
        columns = (("latency", 3), ("oneshot", 2), ("finetuned", 2))
        cells = [spread([row[key] for row in ours], digits) for key, digits in columns]
        lines.append([*map(str, kind), str(len(ours)), *cells])
    print(table(["", *ASKED, "seeds", "latency of dense", "top-1 one-shot", "after recovery"], lines))


def main(args: argparse.Namespace) -> None:
    dict(speed=speed, accuracy=accuracy)[args.what](args)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
