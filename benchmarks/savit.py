"""SAViT's scoring against the published schedule, and its results with and without interactions.

    python -m benchmarks.savit scoring --initial-checkpoint FILE [--batch-size 32] [--batches 156]
    python -m benchmarks.savit accuracy --initial-checkpoint FILE --data-path CIFAR10 --bench FOLDER --rows FILE

`scoring` prints the time of one pass by the published schedule (nine double backward passes on every batch, here with
gate gradients only, which spares it the weights' gradients that it also took) and by ours, and the memory of each form
of the interactions. `accuracy` prunes to half of the MACs, one-shot and after the shared recovery recipe of the folder
--bench (equal_footing.py, torch_pruning_baseline.py); rows that --rows holds already are not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import append, read, spread
from models import build_vit, load_dense
from models.pretrained import load_initial_, read_initial
from pruning.gates import COMPONENTS, Gates, axes_of_component
from pruning.interaction import SampledMean, component_hessian
from pruning.savit import Scores
from recipes.savit_scoring import GROUP
from runtime.console import table
from runtime.device import device_name

THREE = COMPONENTS[:3]
PUBLISHED_SAMPLE = 16  # batches on which the published schedule is timed
PLAIN = ["--mixup", "0", "--cutmix", "0", "--aa", "", "--color-jitter", "0", "--reprob", "0", "--num_workers", "0"]
FLAGS = dict(
    interactions=["--need_hessian"],
    paper=["--need_hessian", "--hessian_formula", "paper"],
    published=["--need_hessian", "--hessian_formula", "published"],
    without=["--no-need_hessian"],
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scoring", "accuracy"), help="which of the two tables to print")
    parser.add_argument("--initial-checkpoint", default="", help="dense weights")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name, where there is no checkpoint")
    parser.add_argument("--batch-size", type=int, default=32, help="images per call (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=156, help="of the scoring pass")
    parser.add_argument(
        "--hessian_error", type=float, default=0.1, help="relative error of every interaction (default: %(default)s)"
    )
    parser.add_argument("--data-path", default="", help="CIFAR-10 as train/ and val/ class folders")
    parser.add_argument("--bench", type=Path, default=Path("../shared/bench"), help="folder of equal_footing.py")
    parser.add_argument("--rows", type=Path, default=Path("runs/savit_rows.jsonl"), help="results, one row a line")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["interactions", "without", "torch-pruning"],
        choices=(*FLAGS, "torch-pruning"),
        help="what is compared (default: interactions without torch-pruning)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=3, help="of recovery")
    parser.add_argument("--per-class", type=int, default=1000, help="training images a class for recovery")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after so many")
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


def scoring(args: argparse.Namespace) -> None:
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


def torch_macs(model: nn.Module, images: Tensor) -> int:
    """By torch's counter, of one image."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def prune_by_savit(args: argparse.Namespace, method: str, seed: int) -> nn.Module:
    """Half of the MACs removed by main_savit.py; one scoring pass per seed serves all methods."""
    folder = args.rows.parent / f"savit_{seed}"
    command = [
        sys.executable,
        "main_savit.py",
        "--finetune",
        args.initial_checkpoint,
        "--data-path",
        args.data_path,
        "--data-set",
        "IMNET",
        "--batch-size",
        str(args.batch_size),
        "--seed",
        str(seed),
        *PLAIN,
        "--hessian_error",
        str(args.hessian_error),
        "--device",
        "cpu",
    ]
    if not (folder / "importance.json").exists():
        subprocess.run([*command, "--need_hessian", "--output_dir", str(folder)], check=True)
    output = args.rows.parent / f"savit_{seed}_{method}"
    subprocess.run(
        [*command, *FLAGS[method], "--pruning_pickle_from", str(folder), "--output_dir", str(output)], check=True
    )
    return load_dense(output / "pruned_checkpoint.pth")


def prune_by_torch_pruning(args: argparse.Namespace, data: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """By Torch-Pruning's Taylor criterion, its sparsity bisected to half of the MACs. Raises RuntimeError."""
    import torch_pruning_baseline as baseline

    torch.manual_seed(seed)
    flags = argparse.Namespace(crit="taylor", isomorphic=False, heads=False, no_norm=False, round_to=None)
    base = baseline.bind(baseline.ef.load_base(args.initial_checkpoint))
    pick = torch.randperm(len(data[0]))[:1024]
    gradients = baseline.gradients(base, flags.crit, data[0][pick], data[1][pick])
    sample, low, high, best = torch.randn(1, 3, 32, 32), 0.0, 0.95, None
    budget = torch_macs(base, sample) // 2
    for _ in range(12):
        model = baseline.prune(base, (low + high) / 2, gradients, flags)
        met = torch_macs(model, sample) <= budget
        best = model if met else best
        low, high = (low, (low + high) / 2) if met else ((low + high) / 2, high)
    if best is None:
        raise RuntimeError("Torch-Pruning met no sparsity within half of the MACs")
    return best


def accuracy(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(args.bench))
    import equal_footing as ef

    begin = time.monotonic()
    rows = read(args.rows)
    done = {(row["method"], row["seed"]) for row in rows}
    train, val = ef.load_split("train", args.per_class), ef.load_split("val")
    base = ef.load_base(args.initial_checkpoint)
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) in done or time.monotonic() - begin > 60 * args.minutes:
                continue
            if method == "torch-pruning":
                model = prune_by_torch_pruning(args, train, seed)
            else:
                model = prune_by_savit(args, method, seed)
            sample = torch.randn(1, 3, 32, 32)
            row = dict(
                method=method,
                seed=seed,
                macs=torch_macs(model, sample) / torch_macs(base, sample),
                oneshot=ef.top1(model, *val),
            )
            ef.finetune(model.requires_grad_(True), base, *train, args.epochs, seed=seed)
            row |= dict(epochs=args.epochs, per_class=args.per_class, finetuned=ef.top1(model, *val))
            rows.append(row)
            append(args.rows, row)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Mean and spread over seeds of every method."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        ours = [row for row in rows if row["method"] == method]
        cells = [spread([row[key] for row in ours]) for key in ("oneshot", "finetuned")]
        lines.append([method, str(len(ours)), f"{max(row['macs'] for row in ours):.4f}", *cells])
    print(table(["", "seeds", "MACs of dense", "top-1 one-shot", "after recovery"], lines))


def main(args: argparse.Namespace) -> None:
    dict(scoring=scoring, accuracy=accuracy)[args.what](args)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
