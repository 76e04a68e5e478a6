"""Pruning without labels, gradients or training: align, price every width, allocate under each target, refit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch.distributed as dist

from engine import evaluate
from files import checkpoint
from loading.preparation import Preparation
from models.arch import Arch
from models.compact import expand_
from models.swin_dims import Dims
from models.vit import TokenLogits
from pruning.one_shot import Analysis, Choice, NotReached, analyse
from pruning.recovery import recover_
from pruning.refit import unseen_of
from pruning.shrink import Student
from recipes import analysis_files, calibration, pareto
from recipes.nvit import Setup
from recipes.nvit_files import CHECKPOINT, conclude
from recipes.one_shot_options import targets
from recipes.tables import measures_target
from runtime.console import say
from runtime.errors import FailedTogether
from runtime.folders import append_log, make_folder
from runtime.precision import Precision
from runtime.ranks import is_main, world_size
from runtime.seeds import rng_state
from training import provenance, results, resuming

CLOSE = 0.01  # of a share of the latency, to which --max_drop is solved
T = TypeVar("T")


class _Clock:
    """Says what a stage gave and how long it took."""

    def __init__(self, earlier: dict[str, float] | None = None) -> None:
        self.seconds = dict(earlier or {})
        self._last = time.perf_counter()

    def stop(self, stage: str, outcome: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now
        say(f"{stage} in {self.seconds[stage]:.1f} s: {outcome}")


def on_main(compute: Callable[[], T]) -> T:
    """What the main rank computes, on all of them: others may round, or measure, differently.

    A NotReached there ends the run on all ranks.
    """
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [compute()]
        except NotReached as error:
            outcome = [error]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], NotReached):
        raise FailedTogether(str(outcome[0]))
    return outcome[0]


def measure_on_main(report: results.Report, dims: Dims) -> float:
    """The measured ratio of widths to the dense model, as the main rank measures it."""
    return on_main(lambda: report.measure(dims))


def made_from(args: Any, inputs: dict[str, str], preparation: Preparation) -> dict[str, Any]:
    """What an analysis depends on: dense weights, calibration images, how widths are priced. inputs: as of a Setup."""
    known = {name: inputs[name] for name in ("weights", "training images") if name in inputs}
    known["preparation of images"] = str(preparation)
    return known | dict(calib_images=args.calib_images, seed=args.seed, pricing=args.pricing, processes=world_size())


def check_analysis(
    args: Any, arch: Arch, groups: dict[str, int], inputs: dict[str, str], preparation: Preparation
) -> None:
    """Raises ValueError where --analysis names a file that is not of this model, these images and these groups."""
    if args.analysis:
        analysis_files.check_file(args.analysis, arch, groups, made_from(args, inputs, preparation))


def make_analysis(args: Any, setup: Setup, clock: _Clock) -> Analysis:
    """Align the dense model in place and price its widths, or read both from --analysis."""
    model = setup.model.to(setup.device).eval().requires_grad_(False)
    images, groups = calibration.images_of(args, setup.data.preparation), setup.pruner.group_sizes
    grid = setup.student.masks.grid
    if args.analysis:
        prices = analysis_files.read(args.analysis, model)
        clock.stop("read", args.analysis)
        return Analysis(model, images, groups, prices, args.batch_size, grid=grid)
    clock.stop("aligned", calibration.align(model, images, args.batch_size))
    analysis = analyse(model, images, groups, args.batch_size, pricing=args.pricing, grid=grid)
    clock.stop("priced", f"{sum(len(curve) for block in analysis.prices.blocks for curve in block.values())} widths")
    if is_main():
        origin = made_from(args, setup.inputs, setup.data.preparation)
        analysis_files.write(setup.folder / analysis_files.NAME, analysis, origin)
    return analysis


@dataclass
class Result:
    """A pruned model at one target: the run's setup with it as the student, its log's line, and its metrics."""

    setup: Setup
    line: dict[str, Any]
    metrics: dict[str, Any]
    target: float


def prune(
    args: Any, setup: Setup, analysis: Analysis, choice: Choice, target: float, precision: Precision, clock: _Clock
) -> Result:
    """The model at the chosen widths, refitted and evaluated."""
    small, masks, divergence = analysis.cut(choice.dims)
    clock.stop("refitted", f"divergence {divergence:.2e} {analysis.objective.unit} on images that no fit has seen")
    recovered = {}
    if args.recover_minutes:
        done = recover_(
            small,
            analysis.dense,
            calibration.batches_of(args, setup.data.preparation),
            60 * args.recover_minutes,
            unseen_of(analysis.images),
            args.batch_size,
            analysis.objective,
            progress=say,
        )
        recovered = dict(divergence_recovered=done.after, updates=done.updates)
        clock.stop("recovered", f"divergence {done.after:.2e} {analysis.objective.unit} after {done.updates} updates")
    model = copy.deepcopy(analysis.dense)
    expand_(model, masks, small)
    pruner = copy.copy(setup.pruner)
    pruner.masks = masks
    setup = replace(setup, student=Student(model, masks), pruner=pruner)
    metrics = evaluate(TokenLogits(model), setup.data.val, precision, args.dist_eval)
    line = dict(
        calib_images=args.calib_images,
        divergence_predicted=choice.predicted,
        divergence=divergence,
        seconds=clock.seconds,
        latency=pruner.ratio,
        **recovered,
    )
    return Result(setup, line, metrics, target)


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
        data_config=setup.data.preparation.record,
        args=resuming.saved_args(args, setup.full.path, names=setup.data.names),
    )


def bisect_drop(attempt: Callable[[float], tuple[float, T]], most: float) -> T:
    """What is pruned to the lowest latency at which it loses `most` points, to CLOSE of a share of the latency.

    attempt: a target to (points lost, what was pruned); it raises NotReached where no widths meet the target. Raises
    FailedTogether.
    """
    low, high, best = 0.0, 1.0, None
    while high - low > CLOSE:
        target = (low + high) / 2
        try:
            drop, made = attempt(target)
        except (NotReached, FailedTogether):
            low = target
            continue
        say(f"at {target:.3f} of the latency: {drop:.2f} points lost")
        if drop <= most:
            high, best = target, made
        else:
            low = target
    if best is None:
        raise FailedTogether(f"--max_drop {most:g}: every quicker model that was tried loses more")
    return best


def _quickest(
    args: Any,
    setup: Setup,
    analysis: Analysis,
    precision: Precision,
    top1_dense: float,
    seconds: dict[str, float],
) -> Result:
    """The quickest model that loses at most --max_drop points of top-1, by bisection over targets."""

    def attempt(target: float) -> tuple[float, Result]:
        choice = on_main(lambda: analysis.choose(setup.table, target))
        result = prune(args, setup, analysis, choice, target, precision, _Clock(seconds))
        return top1_dense - result.metrics["acc1"], result

    return bisect_drop(attempt, args.max_drop)


def _choose(
    args: Any, setup: Setup, analysis: Analysis, report: results.Report, target: float, clock: _Clock
) -> Choice:
    if measures_target(args, setup.table, setup.device):
        choice = on_main(lambda: analysis.choose_measured(setup.table, target, report.measure, say))
    else:
        choice = on_main(lambda: analysis.choose(setup.table, target))
    clock.stop("allocated", f"predicted divergence {choice.predicted:.2e} {analysis.objective.unit}")
    return choice


def _finish(args: Any, result: Result, report: results.Report, top1_dense: float) -> None:
    """Write a pruned model's files into the folder of its setup."""
    setup, metrics = result.setup, result.metrics
    append_log(setup.folder, epoch=0, **result.line, **results.log_line({}, metrics))
    report = replace(report, folder=setup.folder)
    conclude(args, setup, report, top1_dense, metrics, lambda name: save(name, args, setup, metrics))


def run_(args: Any, setup: Setup, report: results.Report, precision: Precision, top1_dense: float) -> None:
    """--one_shot from beginning to end."""
    resuming.start_anew(setup.folder, CHECKPOINT, resuming.PRUNED)
    provenance.record(args, setup.folder, setup.device, setup.data, setup.inputs)
    clock = _Clock()
    analysis, wanted = make_analysis(args, setup, clock), targets(args)
    if args.max_drop is not None:
        result = _quickest(args, setup, analysis, precision, top1_dense, clock.seconds)
        _finish(args, result, report, top1_dense)
        return
    finished = []
    for target in wanted:
        within = setup.folder
        if len(wanted) > 1:
            within = make_folder(setup.folder / f"target_{target:g}", lock=False)
            provenance.record(args, within, setup.device, setup.data, setup.inputs)
            say(f"target {target:g}")
        own = _Clock(clock.seconds)
        choice = _choose(args, setup, analysis, report, target, own)
        result = prune(args, replace(setup, folder=within), analysis, choice, target, precision, own)
        _finish(args, result, report, top1_dense)
        finished.append((target, within, result.line["divergence"]))
    if len(finished) > 1 and is_main():
        pareto.write(setup.folder, top1_dense, finished)
