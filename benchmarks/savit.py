"""SAViT's scoring against the published schedule.

    python -m benchmarks.savit --initial-checkpoint FILE [--batch-size 32] [--batches 156]

Prints the time of one pass by the published schedule (nine double backward passes on every batch, here with gate
gradients only, which spares it the weights' gradients that it also took) and by ours, and the memory of each form of
the interactions. What SAViT costs in accuracy is on `benchmarks.leaderboard`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import build_vit
from models.pretrained import load_initial_, read_initial
from pruning.gates import COMPONENTS, Gates, axes_of_component
from pruning.interaction import SampledMean, component_hessian
from pruning.savit import Scores
from recipes.savit_scoring import GROUP
from runtime.device import device_name

THREE = COMPONENTS[:3]
PUBLISHED_SAMPLE = 16  # batches on which the published schedule is timed


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-checkpoint", default="", help="dense weights")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name, where there is no checkpoint")
    parser.add_argument("--batch-size", type=int, default=32, help="images per call (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=156, help="of the scoring pass")
    parser.add_argument(
        "--hessian_error", type=float, default=0.1, help="relative error of every interaction (default: %(default)s)"
    )
    return parser


def _model(args: argparse.Namespace) -> nn.Module:
    if not args.initial_checkpoint:
        return build_vit(args.model).eval().requires_grad_(False)
    arch, kwargs, state = read_initial(args.initial_checkpoint)
    model = build_vit(arch, **kwargs)
    load_initial_(model, state, args.initial_checkpoint)
    return model.eval().requires_grad_(False)


def published_batch(gates: Gates, loss: Callable[[], Tensor]) -> None:
    """Scores and nine sampled entries, each a double backward pass between the gates of one pair of blocks."""
    model = gates.model
    sizes, axes = model.dims.sizes(), [axes_of_component(model.dims, c) for c in THREE]
    gates.values = {axis: torch.ones(1, sizes[axis], requires_grad=True) for group in axes for axis in group}
    names = list(gates.values)
    with sdpa_kernel(SDPBackend.MATH):
        gradients = dict(
            zip(names, torch.autograd.grad(loss(), list(gates.values.values()), create_graph=True), strict=True)
        )
        last = int(torch.randint(len(model.blocks), ()))
        for i, j in ((i, j) for i in range(3) for j in range(3)):
            row = axes[i][0 if i == 2 else last]
            highest = 0 if i == 2 or j == 2 else last
            column = axes[j][int(torch.randint(highest + 1, ()))]
            torch.autograd.grad(gradients[row].sum(), gates.values[column], retain_graph=True, allow_unused=True)


def _batches(model: nn.Module, args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Random images with the model's own predictions as labels: curvature like a trained model's."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = [torch.randn(shape, generator=generator) for _ in range(args.batches)]
    with torch.no_grad():
        return [(x, torch.multinomial(model(x).softmax(1), 1, generator=generator).flatten()) for x in images]


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = _model(args)
    data = _batches(model, args)
    scores, sampled, ours = Scores(model.dims, THREE, 2), SampledMean(3), 0.0
    with Gates(model).attach() as gates:

        def loss(t: int) -> Callable[[], Tensor]:
            return lambda: F.cross_entropy(model(data[t][0]), data[t][1])

        published = [_seconds(lambda t=t: published_batch(gates, loss(t))) for t in range(PUBLISHED_SAMPLE + 1)][1:]
        for t in range(args.batches):
            begin = time.perf_counter()
            scores.add(scores.measure(gates, args.batch_size, loss(t)))
            if t % GROUP == 0:
                wanted = sampled.largest_error > args.hessian_error
            if wanted:
                sampled.merge(SampledMean.pack(component_hessian(gates, THREE, loss(t))))
            ours += time.perf_counter() - begin
    theirs = statistics.mean(published) * args.batches
    print(f"{args.batches} batches of {args.batch_size}, {device_name(torch.device('cpu'))}, fp32")
    print(
        f"published schedule {theirs:.1f} s ({len(published)} batches timed), ours {ours:.1f} s: {ours / theirs:.3f} "
        f"of it; interactions from {sampled.count} batches, largest error {sampled.largest_error:.3f}"
    )
    peaks = {form: _peak(args, form) for form in ("published", "exact", "finite", "scores")}
    for form, peak in peaks.items():
        share = peak / max(peaks["published"], 1)
        print(f"memory of a batch, {form}: {peak / 2**20:.0f} MiB, {share:.3f} of published")


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _peak(args: argparse.Namespace, form: str) -> int:
    """Bytes that one batch adds to the peak of a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (args, form))


def _measure_peak(args: argparse.Namespace, form: str) -> int:
    model = _model(args)
    ((images, targets),) = _batches(model, argparse.Namespace(**vars(args) | dict(batches=1)))
    before = _high_water()
    with Gates(model).attach() as gates:

        def loss() -> Tensor:
            return F.cross_entropy(model(images), targets)

        if form == "published":
            published_batch(gates, loss)
        elif form == "scores":
            Scores(model.dims, THREE, 2).measure(gates, len(images), loss)
        else:
            component_hessian(gates, THREE, loss, form)
    return _high_water() - before


def _high_water() -> int:
    """Peak resident bytes of this process (Linux)."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main(get_args_parser().parse_args())
