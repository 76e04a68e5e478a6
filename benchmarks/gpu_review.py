"""Nine suspicions about GPU paths, each measured: python -m benchmarks.gpu_review [--only N ...] [--tiny --device cpu]

1 collectives of CPU tensors under NCCL; 2 host synchronisations of a pruning step; 3 what its hooks cost; 4 memory of
gates; 5 the attention kernel of content merging and the cost of its bias; 6 widths that are no multiple of 8; 7 masked
against compact where convolutions may round to TF32; 8 memory of a refit at 518 px; 9 memory layout of the CNN teacher;
10 2:4 sparse layers. A suspicion that ends in an error says so, and the next one is measured. `--tiny --device cpu`
checks this script itself.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine import Progress, train_one_epoch
from latency.kernels import attention_kernels
from latency.measure import stopwatch, warm_up
from models import BlockDims, Masks, TokenLogits, ViTDims, build_vit, compact, sparsity
from models.compact import difference
from pruning.gate_saliency import GateSaliency
from pruning.moments import all_reduced
from pruning.refit import refit_
from pruning.saliency import Saliency
from runtime.device import device_name
from runtime.precision import FiniteGuard, Precision
from runtime.processes import BACKENDS

ARCH = "deit_base_distilled_patch16_224"
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
GIB = 2**30


@dataclass
class Case:
    """What every measurement starts from: a DeiT-B, or a shrunken one, with random images and labels."""

    device: torch.device
    tiny: bool
    batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.batch = 4 if self.tiny else 128
        self.kwargs = TINY if self.tiny else {}
        self.half = torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @cached_property
    def model(self) -> nn.Module:
        return build_vit(ARCH, **self.kwargs).to(self.device)

    @cached_property
    def images(self) -> Tensor:
        return torch.randn(self.batch, 3, *self.model.patch_embed.img_size, device=self.device)

    @cached_property
    def labels(self) -> Tensor:
        return torch.randint(self.model.num_classes, (self.batch,), device=self.device)

    def build(self, dims: ViTDims, **kwargs: object) -> nn.Module:
        """A model of these widths in half precision, in eval mode."""
        return build_vit(ARCH, dims, **self.kwargs | kwargs).to(self.device, self.half).eval()

    def milliseconds(self, call: Callable[[], object], repeats: int = 20) -> float:
        """Mean over calls after three of warm-up."""
        warm_up(call, self.device, 3)
        return 1e3 * stopwatch(call, repeats, self.device)

    def peak_gib(self, call: Callable[[], object]) -> float:
        """GPU memory that a call needs above what is held before it; 0 on a CPU, which does not count it."""
        if self.device.type == "cpu":
            call()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / GIB


def collective(case: Case) -> None:
    """1: a tensor on the CPU in a collective, as one-shot pruning's closed loop has it."""
    backend = BACKENDS[case.device.type]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        print(f"all_reduced(CPU tensor) under {backend}: {float(all_reduced(torch.tensor(0.5)))}")
    finally:
        dist.destroy_process_group()


class Steps:
    """Training steps as main_full_global_latency.py takes them, with a few embedding channels removed."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model.train()
        self.masks = Masks(self.model.dims, case.device)
        self.masks.remove("embed", torch.arange(self.model.embed_dim // 48, device=case.device))
        self.masks.install_(self.model)
        self.both, self.saliency = TokenLogits(self.model), Saliency(self.model, self.model.dims, "taylor_sq", 0.9)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=case.device.type == "cuda")

    def __call__(self, number: int, hooks: bool = True) -> None:
        train_one_epoch(
            self.both,
            lambda logits, *_: (F.cross_entropy(sum(part.float() for part in logits) / 2, self.case.labels), {}),
            [(self.case.images, self.case.labels)] * number,
            self.optimizer,
            Precision(self.case.device, torch.bfloat16),
            Progress(number),
            log_interval=10**9,
            after_backward=self.saliency.step if hooks else lambda: None,
            after_step=(lambda _: self.masks.zero_weights_(self.model) and False) if hooks else lambda _: None,
        )


def synchronisations(case: Case) -> None:
    """2: how often a pruning step waits for the GPU."""
    steps = Steps(case)
    steps(3)
    if case.device.type == "cpu":
        return print("host synchronisations: none on a CPU")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            steps(10)
            many = len(seen)
            steps(20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{w.filename.split('/')[-1]}:{w.lineno}" for w in seen})
    a_step = (len(seen) - 2 * many) / 10
    print(f"host synchronisations: {a_step:.1f} a step, {many - 10 * a_step:.0f} an epoch, at {', '.join(places)}")


def hooks(case: Case) -> None:
    """3: what saliency, masking and the check for finite losses add to a step."""
    steps, check = Steps(case), FiniteGuard.check
    full = case.milliseconds(partial(steps, 10), 2) / 10
    bare = case.milliseconds(partial(steps, 10, hooks=False), 2) / 10
    FiniteGuard.check = lambda self, *_, **__: self._losses.clear() or True
    try:
        unguarded = case.milliseconds(partial(steps, 10, hooks=False), 2) / 10
    finally:
        FiniteGuard.check = check
    print(f"ms per step: {full:.1f} with hooks, {bare:.1f} without, {unguarded:.1f} without the finite check as well")
    print(f"zero_weights_ {case.milliseconds(lambda: steps.masks.zero_weights_(steps.model)):.2f} ms", end=", ")
    print(f"saliency.step {case.milliseconds(steps.saliency.step):.2f} ms")


def gates(case: Case) -> None:
    """4: the memory of a training step with and without a gradient for every unit of every image."""
    for mode in (None, "gates", "gate_samples"):
        model = build_vit(ARCH, **case.kwargs).to(case.device)
        if mode:
            scaler = torch.amp.GradScaler(case.device.type, enabled=False)
            saliency = GateSaliency(model, Masks(model.dims, case.device), mode, 0.0, scaler)  # noqa: F841 (holds hooks)

        def step(model: nn.Module = model) -> None:
            with torch.autocast(case.device.type, dtype=torch.bfloat16):
                loss = sum(part.float().sum() for part in TokenLogits(model)(case.images))
            loss.backward()

        print(f"batch {case.batch}, {mode or 'no gates'}: peak {case.peak_gib(step):.2f} GiB above the weights")


def content_merging(case: Case) -> None:
    """5: which kernel attends with a bias, and what the bias costs."""
    dims, tokens = case.model.dims, case.model.dims.blocks[0].tokens * 6 // 10
    blocks = tuple(BlockDims(b.heads, b.qk, b.v, b.mlp, tokens) for b in dims.blocks)
    merging = case.build(ViTDims(dims.embed, blocks), content_merge=True)
    x = torch.randn(2 * case.batch, tokens, dims.embed, device=case.device, dtype=case.half)
    attention = merging.blocks[0].attn
    with torch.inference_mode():
        print(f"kernels {attention_kernels(merging, case.images.to(case.half))}", end="; ")
        for dtype in (torch.float32, case.half):
            bias = torch.rand(2 * case.batch, 1, 1, tokens, device=case.device, dtype=dtype)
            print(f"bias in {dtype}: {case.milliseconds(lambda bias=bias: attention(x, bias=bias)):.3f} ms", end=", ")
        print(f"no bias: {case.milliseconds(lambda: attention(x)):.3f} ms")


def odd_widths(case: Case) -> None:
    """6: widths as SAViT leaves them, against multiples of 8."""
    dims, images = case.model.dims, case.images.to(case.half)
    for embed, mlp in ((37, 41), (32, 40)) if case.tiny else ((531, 1733), (528, 1728), (536, 1736)):
        blocks = tuple(BlockDims(b.heads, b.qk, b.v, mlp, b.tokens) for b in dims.blocks)
        model = case.build(ViTDims(embed, blocks))
        with torch.inference_mode():
            print(f"embed {embed}, mlp {mlp}: {case.milliseconds(lambda model=model: model(images)):.2f} ms")


def tensor_float_32(case: Case) -> None:
    """7: masked against compact in fp32, with convolutions in TF32 or not."""
    allowed = torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        torch.backends.cudnn.allow_tf32 = tf32
        model = build_vit(ARCH, **case.kwargs).to(case.device).eval()
        masks = Masks(model.dims, case.device)
        masks.remove("embed", torch.arange(model.embed_dim * 237 // 768, device=case.device))
        masks.install_(model)
        print(
            f"convolutions in {'TF32' if tf32 else 'fp32'}: differs by {difference(model, compact(model, masks)):.1e}"
        )
    torch.backends.cudnn.allow_tf32 = allowed


def refit_memory(case: Case) -> None:
    """8: what a refit at 518 px holds."""
    arch, numbers, kwargs = "vit_large_patch14_dinov2", (32, 64), dict(num_classes=1000)
    if case.tiny:
        numbers, kwargs = (4, 8), kwargs | dict(img_size=28, embed_dim=48, depth=2, num_heads=3)
    model = build_vit(arch, **kwargs).to(case.device).eval().requires_grad_(False)
    masks = Masks(model.dims, case.device)
    for number in numbers:
        images = torch.randn(number, 3, *model.patch_embed.img_size)
        peak = case.peak_gib(lambda images=images: refit_(model, compact(model, masks), masks, images, 16))
        print(f"{arch}, {number} images: peak {peak:.1f} GiB above the model", flush=True)


def cnn_teacher(case: Case) -> None:
    """9: the memory layout of NViT's CNN teacher."""
    name, images = (
        "regnety_002" if case.tiny else "regnety_160",
        torch.randn(case.batch, 3, 224, 224, device=case.device),
    )
    teacher = timm.create_model(name).to(case.device).eval()
    layouts = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
    benchmark = torch.backends.cudnn.benchmark
    for layout, memory_format in layouts.items():
        teacher.to(memory_format=memory_format)
        for torch.backends.cudnn.benchmark in (False, True):
            with torch.no_grad(), torch.autocast(case.device.type, dtype=torch.bfloat16):
                spent = case.milliseconds(lambda: teacher(images), 2 if case.tiny else 10)
            print(f"{name}, {layout}, cudnn.benchmark {torch.backends.cudnn.benchmark}: {spent:.1f} ms")
    torch.backends.cudnn.benchmark = benchmark


def sparse_layers(case: Case) -> None:
    """10: 2:4 sparse layers against the same layers dense."""
    if not sparsity.has_kernels(case.device):
        return print(f"no 2:4 kernels on {device_name(case.device)}")
    model = build_vit(ARCH, **case.kwargs).to(case.device).eval()
    sparsity.sparsify_(model)
    images = torch.cat([case.images, case.images]).to(case.half)
    fast, slow = sparsity.accelerate(model, case.half), model.to(case.half)
    with torch.inference_mode():
        dense = case.milliseconds(lambda: slow(images))
        sparse = case.milliseconds(lambda: fast(images))
        error = float((fast(images) - slow(images)).norm() / slow(images).norm())
    print(
        f"batch {len(images)}: dense {dense:.2f} ms, 2:4 {sparse:.2f} ms, {dense / sparse:.2f}x, differ by {error:.0e}"
    )


MEASURED = (collective, synchronisations, hooks, gates, content_merging, odd_widths, tensor_float_32, refit_memory)
MEASURED += (cnn_teacher, sparse_layers)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the suspicions (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="shrunken models, to check this script")
    return parser


def main(args: argparse.Namespace) -> int:
    """Number of measurements that ended in an error."""
    torch.manual_seed(0)
    failed = 0
    print(f"{device_name(args.device)}, torch {torch.__version__}, timm {timm.__version__}", flush=True)
    for number, measure in enumerate(MEASURED, start=1):
        if args.only and number not in args.only:
            continue
        begin = time.perf_counter()
        print(f"{number} {measure.__name__.replace('_', ' ')}", flush=True)
        try:
            measure(Case(torch.device(args.device), args.tiny))
        except Exception:
            failed += 1
            traceback.print_exc(limit=-3)
        print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(get_args_parser().parse_args()))
