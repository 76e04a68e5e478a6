"""Pruning without labels, gradients or training: align, price every width, allocate under the target, refit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import options
from engine import Precision, evaluate
from files import checkpoint
from loading import shards
from models import Masks, ViTDims, compact
from models.compact import expand_
from models.vit import TokenLogits
from pruning.allocation import allocate
from pruning.moments import all_reduced
from pruning.probe import prices
from pruning.refit import refit_
from recipes import calibration
from recipes.nvit import Setup
from recipes.nvit_files import CHECKPOINT, conclude
from runtime.console import say
from runtime.errors import Problems, RunFailed
from runtime.folders import append_log
from runtime.ranks import is_main
from runtime.seeds import rng_state
from training import provenance, results, resuming

ROUNDS, CLOSE = 5, 0.01  # of aiming at a measured ratio, and how close below it is close enough


def check_flags(args: Any, problems: Problems) -> None:
    """What --one_shot needs, and what it does not go with."""
    if args.latency_target is None:
        problems.add("--one_shot needs --latency_target")
    for name in ("latency_target_ms", "macs_target", "params_target"):
        if getattr(args, name) is not None:
            problems.add(f"--{name} goes with training; --one_shot aims at --latency_target alone")
    for name in ("resume", "dry_run", "align", "compensate", "shrink_interval"):
        if getattr(args, name):
            problems.add(f"{options.flag(name)} goes with training; --one_shot has none")
    problems.attempt(shards.check_indexed, args, "--one_shot")


class _Clock:
    """Says what a stage found and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str, outcome: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now
        say(f"{stage} in {self.seconds[stage]:.1f} s: {outcome}")


class _Allocator:
    """Prices of an aligned model's widths, and the best widths for any target."""

    def __init__(self, args: Any, setup: Setup, images: Tensor) -> None:
        self.table, self.full = setup.table, setup.model.dims
        self.groups = setup.pruner.group_sizes
        self.prices = prices(setup.model, images, self.groups, args.batch_size)

    def __call__(self, target: float) -> tuple[ViTDims, float]:
        """The widths to keep, and the divergence predicted for them. Raises RunFailed where none are as quick."""
        choices = allocate(self.table, self.full, self.groups, *self.prices, target)
        if not choices:
            raise RunFailed(f"target {target:.4g} not reached: by the table, no widths are as quick")
        return choices[0]


def _as_measured(allocator: _Allocator, target: float, measure: Callable[[ViTDims], float]) -> tuple[ViTDims, float]:
    """Widths whose measured ratio is at or below the target, as close as a few rounds of aiming come to it."""
    aim, best, least = target, None, None
    for _ in range(ROUNDS):
        choice = allocator(aim)
        ratio = float(all_reduced(torch.tensor(measure(choice[0]) if is_main() else 0.0)))  # the main rank's
        say(f"aimed at {aim:.4f}: measured {ratio:.4f}")
        if ratio <= target and (best is None or ratio > best[0]):
            best = ratio, choice
        if least is None or ratio < least[0]:
            least = ratio, choice
        if target - CLOSE <= ratio <= target:
            break
        aim = min(1.0, aim * (target - CLOSE / 2) / ratio)
    return (best or least)[1]


def prune_(args: Any, setup: Setup, images: Tensor, measure: Callable[[ViTDims], float]) -> dict[str, Any]:
    """Prune the student in place to --latency_target; returns the log's line.

    images: this process's calibration images; measure: the measured ratio of widths to the dense model.
    """
    model, clock = setup.model.to(setup.device).eval().requires_grad_(False), _Clock()
    clock.stop("aligned", calibration.align(model, images, args.batch_size))
    allocator = _Allocator(args, setup, images)
    if args.latency_measured:
        dims, predicted = _as_measured(allocator, args.latency_target, measure)
    else:
        dims, predicted = allocator(args.latency_target)
    clock.stop("allocated", f"predicted divergence {predicted:.2e} nats")
    masks = setup.student.masks
    masks.load_state_dict(Masks.first(model.dims, dims, setup.device, masks.grid).state_dict())
    small = compact(model, masks)
    divergence = refit_(model, small, masks, images, args.batch_size)
    clock.stop("refitted", f"divergence {divergence:.2e} nats on held-out images")
    expand_(model, masks, small)
    return dict(
        calib_images=args.calib_images,
        divergence_predicted=predicted,
        divergence=divergence,
        seconds=clock.seconds,
        latency=setup.pruner.ratio,
    )


def save(name: str, args: Any, setup: Setup, metrics: dict[str, Any]) -> None:
    """A pruned checkpoint: as of a pruning run, without what only training needs."""
    if not is_main():
        return
    masks = setup.student.masks
    checkpoint.save(
        setup.folder / name,
        arch=setup.full.arch.record,
        dims=masks.dims.to_dict(),
        dim=masks.dims.to_dim(),
        masks=masks.state_dict(),
        model=setup.model.state_dict(),
        epoch=0,
        step=0,
        rng=rng_state(),
        metrics=metrics,
        args=resuming.saved_args(args, setup.full.path),
    )


def run_(args: Any, setup: Setup, report: results.Report, precision: Precision, top1_dense: float) -> None:
    """--one_shot from beginning to end."""
    resuming.start_anew(setup.folder, CHECKPOINT)
    provenance.record(args, setup.folder, setup.device, setup.data, setup.inputs)
    outcome = prune_(args, setup, calibration.images_of(args, setup.full), report.measure)
    metrics = evaluate(TokenLogits(setup.model), setup.data.val, precision, args.dist_eval)
    append_log(setup.folder, epoch=0, **outcome, **results.log_line({}, metrics))
    conclude(args, setup, report, top1_dense, metrics, lambda name: save(name, args, setup, metrics))
