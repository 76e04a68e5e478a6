"""Latency and throughput of models side by side: python -m latency.compare A B ... [--batch-size 1 64] [--dtype bf16]

A, B, ... are checkpoints of this project, dense weights with their arch, timm names, or dims.json files for the first
one's architecture; the first is the baseline. All run interleaved in one process, eager and compiled (with CUDA graphs
where there is CUDA), from several copies in memory; printed are median and quartiles, images per second, the speed-up
over the first from paired rounds, and which attention kernel runs in each.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import options
from files import checkpoint
from latency.disturbance import describe
from latency.kernels import attention_kernels
from latency.measure import DTYPES, Timing, compile_mode, interleaved, ratio
from latency.whole import build_random
from models import Arch
from models.foreign import adapt
from models.pretrained import find_initial, from_checkpoint, load_initial_, read_dims
from runtime.console import say, table, warn
from runtime.device import device_name
from runtime.errors import Problems, RunFailed
from runtime.folders import write_json
from runtime.script import run_script

MODES = ("eager", "compiled")
THROUGHPUT_BATCH = dict(cpu=64, cuda=256)


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python -m latency.compare deit_small_patch16_224 runs/pruned_run/dims.json",
        "latency.compare",
    )
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoints, timm names, dims.json; the first is the baseline"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    add = parser.add_argument_group("measurement").add_argument
    add(
        "--batch-size",
        type=int,
        nargs="+",
        metavar="N",
        help=f"batches to measure (default: 1 and {THROUGHPUT_BATCH['cpu']}, on a GPU {THROUGHPUT_BATCH['cuda']})",
    )
    add("--dtype", default="fp32", choices=tuple(DTYPES), help="weights and images (default: %(default)s)")
    add("--device", default=available, help="cpu or cuda (default: cuda where there is one)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: eager compiled)")
    add("--rounds", type=int, default=9, metavar="N", help="measurements of every copy (default: %(default)s)")
    add("--copies", type=int, default=3, metavar="N", help="copies of each model in eager mode (default: %(default)s)")
    return parser


def load(name: str) -> nn.Module:
    """The model that a checkpoint or a timm name gives, in eval mode. Raises ValueError."""
    if not Path(name).exists() and timm.is_model(name):
        return build_random(Arch.of(name), None, torch.device("cpu"))
    content = checkpoint.read(name)
    if "format" in content:
        return from_checkpoint(checkpoint.load(name), name).eval()
    initial = find_initial(name)
    if not initial.arch:
        raise ValueError(f"{name} does not say its architecture; it needs the keys arch, kwargs and model")
    arch = Arch.of(initial.arch, **initial.kwargs)
    state, _ = adapt(initial.state, arch.skeleton, arch.name, name)
    model = arch.build()
    load_initial_(model, state, name)
    return model.eval()


def narrow(parent: nn.Module | None, path: str) -> nn.Module | None:
    """The parent's architecture with the widths of a dims.json. Raises ValueError."""
    dims = read_dims(path)
    return parent and build_random(Arch.of_model(parent), dims, torch.device("cpu"))


def check_args(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models by name. Everything wrong is reported at once; raises BadArguments."""
    problems = Problems()
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        problems.add(f"--device {args.device} is not usable here; use --device cpu")
    for flag in ("rounds", "copies"):
        if getattr(args, flag) < 1:
            problems.add(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if odd := [n for n in args.batch_size or () if n < 1]:
        problems.add(f"--batch-size must be at least 1, not {odd[0]}")
    if len(set(args.models)) < len(args.models):
        problems.add("the same model is named twice")
    models = {args.models[0]: (first := problems.attempt(load, args.models[0]))}
    for name in args.models[1:]:
        how = (narrow, first, name) if name.endswith(".json") else (load, name)
        models[name] = problems.attempt(*how)
    sizes = {name: m.patch_embed.img_size for name, m in models.items() if m is not None}
    if len(set(sizes.values())) > 1:
        problems.add(f"the models take images of different sizes: {sizes}")
    problems.raise_if_any()
    return {name: model.to(args.device) for name, model in models.items()}


def measure(args: argparse.Namespace, models: dict[str, nn.Module], batch: int, mode: str) -> dict[str, Timing]:
    """Seconds per batch of every model, over all copies."""
    stem, compiled = next(iter(models.values())).patch_embed, mode == "compiled"
    images = torch.randn(batch, stem.proj.in_channels, *stem.img_size, device=args.device)
    samples: dict[str, list[float]] = {name: [] for name in models}
    kept, disturbed = [], []
    for _ in range(1 if compiled else args.copies):
        kept.append({name: copy.deepcopy(model) for name, model in models.items()})
        timings = interleaved(kept[-1], images, args.rounds, dtype=args.dtype, compiled=compiled)
        for name, timing in timings.items():
            samples[name] += timing.samples
            disturbed.append(timing.disturbed)
    return {name: Timing.of(seconds, sum(disturbed) / len(disturbed)) for name, seconds in samples.items()}


def kernels(args: argparse.Namespace, models: dict[str, nn.Module], batch: int) -> dict[str, str]:
    """The attention kernel of every model in eager mode."""
    stem, dtype = next(iter(models.values())).patch_embed, DTYPES[args.dtype]
    images = torch.randn(batch, stem.proj.in_channels, *stem.img_size, device=args.device).to(dtype)
    return {name: attention_kernels(copy.deepcopy(model).to(dtype), images) for name, model in models.items()}


def report(args: argparse.Namespace, models: dict[str, nn.Module], batch: int, mode: str) -> list[dict[str, Any]]:
    """Measure and print one batch and mode."""
    timings, used = measure(args, models, batch, mode), kernels(args, models, batch)
    base, rows, figures = timings[args.models[0]], [], []
    for name, t in timings.items():
        times = ratio(base, t)
        figures.append(
            dict(
                model=name,
                batch=batch,
                mode=mode,
                dtype=args.dtype,
                device=device_name(args.device),
                seconds=t.median,
                q1=t.q1,
                q3=t.q3,
                n=t.n,
                images_per_second=batch / t.median,
                speed_up=times.median,
                speed_up_quartiles=[times.q1, times.q3],
                disturbed=t.disturbed,
                attention=used[name],
            )
        )
        rows.append(
            [
                name,
                f"{1e3 * t.median:.3f}",
                f"{1e3 * t.q1:.3f} to {1e3 * t.q3:.3f}",
                f"{batch / t.median:,.0f}",
                f"{times.median:.3f}x",
                f"{times.q1:.3f} to {times.q3:.3f}",
                used[name],
            ]
        )
    how = f"compiled ({compile_mode(args.device)})" if mode == "compiled" else mode
    say(f"\nbatch {batch}, {args.dtype}, {how}, {device_name(args.device)}, torch {torch.__version__}, n {base.n}")
    threads = torch.get_num_threads()
    if note := describe(threads, threads, base.disturbed):
        warn(note)
    say(table(["model", "median ms", "quartiles", "images/s", "speed-up", "quartiles", "attention (eager)"], rows))
    return figures


def main(args: argparse.Namespace) -> None:
    models = check_args(args)
    figures = []
    for batch in args.batch_size or (1, THROUGHPUT_BATCH[args.device]):
        for mode in args.modes:
            try:
                figures += report(args, models, batch, mode)
            except torch.OutOfMemoryError:
                raise RunFailed(f"out of memory at batch {batch}; try --batch-size {max(1, batch // 2)}") from None
    if args.json:
        write_json(Path(args.json), figures)
        say(f"written: {args.json}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
