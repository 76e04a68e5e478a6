"""What pruning adds to a training step: the same distillation step with and without saliency, masking and selection.

    python -m benchmarks.pruning_overhead [--initial-checkpoint FILE] [--batch-size 128] [--device cuda]

Both kinds of step run interleaved in one process; prints the median of the paired ratios with its quartiles, before any
embedding channel is masked and after a quarter of every axis is; then the cost of a selection, spread over --interval.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from latency.table import LatencyTable
from losses import DistillationLoss, NViTLoss, base_criterion
from models import Masks, build_vit
from models.pretrained import read_initial
from models.vit import TokenLogits
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner
from pruning.saliency import Saliency
from runtime.device import device_name
from runtime.precision import Precision
from training.full_model import freeze

DIGITS = (
    "deit_tiny_distilled_patch16_224",
    dict(img_size=16, patch_size=2, embed_dim=96, depth=6, num_heads=3, num_classes=10),
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-checkpoint", default="", help="a dense model (default: the quickstart's, untrained)")
    parser.add_argument("--model", default="", help="timm name instead of a checkpoint")
    parser.add_argument("--batch-size", type=int, default=128, help="images per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="steps over which one pruning event is spread")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float16"), help="autocast type (default: fp32)")
    return parser


class Step:
    """A distillation step as the pruning script takes it; `extra` turns saliency and masking on."""

    def __init__(self, model: torch.nn.Module, device: torch.device, precision: Precision, batch: int) -> None:
        before = memory(device)
        self.model, self.precision = model.to(device), precision
        self.both, self.masks = TokenLogits(self.model), Masks(model.dims, device)
        teacher = freeze(copy.deepcopy(model), device)
        original = DistillationLoss(base_criterion(False, 0.1), None, "none", 0.5, 1.0)
        self.loss = NViTLoss(original, 1.0, teacher, 1e5, 3.0, False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.saliency = Saliency(model, model.dims, "taylor_sq", 0.9)
        size, classes = model.patch_embed.img_size, model.num_classes
        self.images = torch.randn(batch, model.patch_embed.proj.in_channels, *size, device=device)
        self.targets = torch.randint(0, classes, (batch,), device=device)
        self.resident = memory(device) - before

    def __call__(self, extra: bool) -> float:
        """Seconds of one step."""
        synchronise(self.images.device)
        begin = time.perf_counter()
        with self.precision.autocast():
            loss, _ = self.loss(self.both(self.images), self.images, self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if extra:
            self.saliency.step()
        self.optimizer.step()
        if extra:
            self.masks.zero_weights_(self.model)
        synchronise(self.images.device)
        return time.perf_counter() - begin

    def peak_bytes(self, extra: bool) -> int:
        """GPU memory that this step alone needs at most."""
        before = memory(self.images.device)
        torch.cuda.reset_peak_memory_stats()
        self(extra)
        return self.resident + torch.cuda.max_memory_allocated() - before


def memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(label: str, step: Step, plain: Step, rounds: int) -> None:
    for _ in range(3):
        step(True), plain(False)
    pairs = [(step(True), plain(False)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    low, middle, high = ratios[rounds // 4], statistics.median(ratios), ratios[-1 - rounds // 4]
    milliseconds = 1e3 * statistics.median(b for _, b in pairs)
    print(
        f"{label}: {middle:.3f} x a step without pruning (quartiles {low:.3f} to {high:.3f}); that one takes "
        f"{milliseconds:.1f} ms"
    )
    if step.images.device.type == "cuda":
        own, without = step.peak_bytes(True), plain.peak_bytes(False)
        print(f"{label}: peak memory {own / 2**30:.2f} GiB, {own / without:.3f} x that without pruning")


def report_selection(step: Step, plain: Step, interval: int, rounds: int) -> None:
    """The cost of one pruning event, spread over the steps between events."""
    dims = step.model.dims
    widths = [dict(e=dims.embed, h=b.heads, q=b.qk, v=b.v, m=b.mlp) for b in dims.blocks]
    top = {axis: max(w[axis] for w in widths) for axis in "ehqvm"}
    grid = {axis: (1, size) if size > 1 else (1,) for axis, size in top.items()}
    table = LatencyTable(
        {
            f"EMB_{e}": {
                f"QK_{h}_{q}": {
                    f"V_{v}": {f"MLP_{m}": 1e-9 * e * (h * (2 * q + 2 * v) + 2 * m) for m in grid["m"]}
                    for v in grid["v"]
                }
                for h in grid["h"]
                for q in grid["q"]
            }
            for e in grid["e"]
        }
    )
    seconds = []
    for _ in range(rounds):
        pruner = GlobalPruner(
            Masks(dims, step.images.device),
            table,
            PruningConfig().group_sizes(dims),
            regularization=5e-4,
            target=None,
            per_event=2,
        )
        step.saliency.step()
        begin = time.perf_counter()
        pruner.event(step.saliency.close_window())
        pruner.masks.install_(plain.model, plain.optimizer)
        synchronise(step.images.device)
        seconds.append(time.perf_counter() - begin)
    share = statistics.median(seconds) / interval / statistics.median(plain(False) for _ in range(rounds))
    print(
        f"one selection: {1e3 * statistics.median(seconds):.1f} ms, {share:.3f} x a step when one comes every "
        f"{interval} steps"
    )


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    precision = Precision(device, getattr(torch, args.dtype) if args.dtype else None)
    if args.initial_checkpoint:
        arch, kwargs, _ = read_initial(args.initial_checkpoint)
    else:
        arch, kwargs = (args.model, {}) if args.model else DIGITS
    print(f"{arch} {kwargs}, batch {args.batch_size}, {args.dtype or 'float32'}, {device_name(device)}")
    step, plain = (Step(build_vit(arch, **kwargs), device, precision, args.batch_size) for _ in range(2))
    report("saliency and masks, nothing removed yet", step, plain, args.rounds)
    for axis, keep in step.masks.keep.items():
        step.masks.remove(axis, torch.arange(len(keep) // 4, device=device))
    step.masks.install_(step.model, step.optimizer)
    report("a quarter of every axis removed", step, plain, args.rounds)
    report_selection(step, plain, args.interval, args.rounds)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
