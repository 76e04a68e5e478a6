"""--dry-run: what a pruning run would do, and what it would take, without training or writing anything."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from pruning.gate_saliency import GateSaliency
from pruning.global_latency import GlobalPruner
from pruning.saliency import EventMean
from pruning.token_saliency import TokenSaliency
from recipes.nvit import Setup
from runtime.console import say, table
from runtime.device import device_name
from training.full_model import freeze
from training.parts import make_optimizer, make_precision, wrap_for_training

SHOWN_EVENTS = 8
TRIAL_BATCH = 8  # images of the trial steps on a CPU; time and activations are scaled from there
TRIAL_STEPS = 2
MOST_EVENTS = 100_000


def plan(pruner: GlobalPruner, seed: int) -> list[tuple[float, Any]]:
    """(predicted latency ratio, widths) after every event, with random saliency: every group is as likely to go.

    The masks of `pruner` are used up.
    """
    generator, events = torch.Generator().manual_seed(seed), []
    pruner.regularization = 0.0
    scores = {
        axis: torch.rand(n, generator=generator, dtype=torch.float64) / pruner.group_sizes[axis]
        for axis, n in pruner.masks.sizes().items()
    }
    while len(events) < MOST_EVENTS and not pruner.reached and pruner.event(scores).groups:
        events.append((pruner.ratio, pruner.masks.dims))
    return events


def _hooks(args: Any, setup: Setup) -> list[EventMean]:
    """What --saliency and --tokens score by: what their hooks note stays in memory until backward ends."""
    model, masks, momentum = setup.model, setup.student.masks.fresh(), setup.config.momentum  # the plan used those up
    scaler, hooks = torch.amp.GradScaler(enabled=False), []
    if args.saliency != "weights":
        taught = args.saliency_loss == "teacher"
        hooks.append(GateSaliency(model, masks, args.saliency, momentum, scaler, taught))
    if args.tokens:
        hooks.append(TokenSaliency(model, masks, momentum, scaler))
    return hooks


def trial(args: Any, setup: Setup) -> tuple[float, float]:
    """(seconds of one training step, bytes at its peak), from a few steps on random images, data loading left out."""
    images_per_step = args.batch_size if setup.device.type == "cuda" else min(args.batch_size, TRIAL_BATCH)
    scale = args.batch_size / images_per_step
    teacher = freeze(copy.deepcopy(setup.model), setup.device)
    student = wrap_for_training(args, setup.model, setup.device).train()
    optimizer = make_optimizer(args, setup.model)
    hooks = _hooks(args, setup)
    criterion, precision = nn.CrossEntropyLoss(), make_precision(args, setup.device)
    stem = setup.model.patch_embed
    images = torch.randn(images_per_step, stem.proj.in_channels, *stem.img_size, device=setup.device)
    labels = torch.randint(setup.data.classes, (images_per_step,), device=setup.device)
    kept: dict[int, int] = {}  # storage address: bytes of what backward needs

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seconds = []
    for _ in range(1 + TRIAL_STEPS):
        begin = time.perf_counter()
        kept.clear()
        with precision.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.no_grad():
                taught = teacher(images)
            logits = student(images)
            for saliency in hooks:
                saliency.see(logits, taught)
            loss = criterion(logits[0], labels)
        loss.backward()
        for saliency in hooks:
            saliency.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        seconds.append(time.perf_counter() - begin)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in setup.model.parameters()}
    activations = scale * sum(size for address, size in kept.items() if address not in weights)
    copies = 5  # student, its gradient, two moments, teacher
    return args.grad_accum_steps * scale * min(seconds[1:]), copies * sum(weights.values()) + activations


def say_targets(pruner: GlobalPruner) -> None:
    """Every target beside the dense model and the lowest value that the floors allow."""
    for target in pruner.targets:
        dense, lowest = (target.show(target.measure(dims)) for dims in (pruner.dense, pruner.floor()))
        say(f"{target.flag}: {target.show(target.limit)}; dense {dense}, lowest reachable {lowest}")


def report(args: Any, setup: Setup) -> None:
    """Print the targets, the plan of events, and the estimate."""
    full, pruner, limits = setup.full, setup.pruner, setup.pruner.targets
    say_targets(pruner)
    events = plan(pruner, args.seed)
    interval, per_epoch = args.interval_prune[0], setup.data.updates
    rows = []
    for i in sorted({round(i * (len(events) - 1) / (SHOWN_EVENTS - 1)) for i in range(SHOWN_EVENTS)} if events else ()):
        ratio, dims = events[i]
        step, counts = (i + 1) * interval, (full.arch.macs(dims), full.arch.params(dims))
        rows.append(
            [
                str(i + 1),
                str(step),
                f"{step / per_epoch:.2f}",
                f"{ratio:.4f}",
                f"{counts[0] / 1e6:,.1f}",
                f"{counts[1]:,}",
            ]
        )
    say(table(["event", "step", "epoch", "predicted latency", "M MACs", "params"], rows))
    end = "every target met" if pruner.reached else "no target" if not limits else "targets not met"
    steps = min(len(events) * interval, args.epochs * per_epoch)
    say(f"plan: {len(events)} events of {pruner.per_event} groups, {interval} steps apart, with random saliency; {end}")
    if len(events) * interval > args.epochs * per_epoch:
        say(f"--epochs {args.epochs} end after {steps} steps, before the last event")
    seconds, memory = trial(args, setup)
    say(
        f"estimate: {seconds:.2f} s a step, {seconds * steps / 3600:.2f} h for {steps} steps without data loading and "
        f"evaluation, {memory / 2**30:.2f} GiB of memory per process, on {device_name(setup.device)}"
    )
