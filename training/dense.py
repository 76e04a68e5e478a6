"""Training a dense model to its end: epochs, checkpoints and log, shared by finetuning and training from scratch."""

from __future__ import annotations

import filecmp
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine import Progress, evaluate, train_one_epoch
from files import checkpoint
from files.atomic import name_also, older
from loading.loaders import start_epoch
from models.vit import TokenLogits
from runtime.console import say
from runtime.folders import append_log
from runtime.precision import Precision
from runtime.ranks import is_main
from runtime.seeds import rng_state
from training import provenance, results, resuming
from training.curves import Curves
from training.full_model import FullModel
from training.keeper import Keeper
from training.parts import (
    Data,
    LossWeights,
    images_per_update,
    make_loss,
    make_mixup,
    make_optimizer,
    make_precision,
    make_scheduler,
    wrap_for_training,
)

CHECKPOINT = "ft_checkpoint.pth"
PUBLISHED = "checkpoint.pth"  # what scripts that are based on DeiT's look for


@dataclass
class Run:
    """What the arguments named, loaded and checked. origin: path of the dense weights; resumed: the checkpoint;
    transfer: whether the model was pruned on other data; losses: how the loss is weighed where flags do not say it;
    start: weights of the pruned checkpoint; alias: second name of the newest checkpoint; inputs: see
    `resuming.inputs_of`."""

    device: torch.device
    full: FullModel
    data: Data
    model: nn.Module
    teacher: nn.Module | None = None
    cnn: nn.Module | None = None
    folder: Path = Path()
    origin: str = ""
    losses: LossWeights | None = None
    resumed: dict[str, Any] | None = None
    transfer: bool = False
    start: dict[str, Any] | None = None
    alias: str = ""
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass
class State:
    """What training moves, and so what a checkpoint holds."""

    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    precision: Precision
    progress: Progress
    metrics: dict[str, Any] = field(default_factory=dict)


def save(name: str, args: Any, run: Run, state: State) -> None:
    """Write a checkpoint into the run's folder, on the main rank. Raises RunFailed where a loss was not finite.

    Equal runs write equal files, wherever they lie: the dense weights' path is relative to the folder.
    """
    state.precision.guard.settle()
    if not is_main():
        return
    origin = os.path.relpath(run.origin, run.folder.resolve()) if run.origin else ""
    dims = run.model.dims
    progress = state.progress.state_dict()
    checkpoint.save(
        run.folder / name,
        keep_older=name == CHECKPOINT,
        arch=run.full.arch.record,
        dims=dims.to_dict(),
        dim=dims.to_dim(),
        model=run.model.state_dict(),
        model_ema=state.ema.module.state_dict() if state.ema else None,
        optimizer=state.optimizer.state_dict(),
        lr_scheduler=state.scheduler.state_dict(),
        scaler=state.precision.scaler.state_dict(),
        epoch=progress["epoch"],
        step=progress["step"],
        rng=rng_state(),
        metrics=state.metrics | progress["metrics"],
        data_config=run.data.preparation.record,
        args=resuming.saved_args(args, origin, run.inputs, run.data.names),
    )
    if run.alias and name == CHECKPOINT:
        name_also(run.folder / name, run.alias)


def is_own(run: Run, path: str) -> bool:
    """Whether a path is the newest checkpoint in the run's folder, by either of its names."""
    newest, given = run.folder / CHECKPOINT, Path(path)
    alias = run.alias and given.name == run.alias and given.parent.resolve() == run.folder.resolve()
    return bool(alias and _holds_newest(run)) or newest.resolve() == given.resolve()


def _holds_newest(run: Run) -> bool:
    newest, other = run.folder / CHECKPOINT, run.folder / run.alias
    if other.is_symlink() or not other.exists():
        return newest.exists() or older(newest).exists()
    return newest.exists() and filecmp.cmp(newest, other, shallow=False)


def _free_alias(run: Run) -> None:
    """Before a new run is written: the second name is not another's, whose file is renamed."""
    other = run.folder / run.alias
    if not (run.alias and is_main()) or _holds_newest(run):
        return
    if other.is_symlink():
        other.unlink()
    else:
        resuming.set_aside(run.folder, [run.alias])


def read_resumed(args: Any, run: Run, folder: Path, resume: str | None = None) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None. Raises ValueError where it does not fit the arguments.

    resume: in place of --resume, where a script has another use for that flag.
    """
    if resume is None and args.resume and is_own(run, args.resume):
        resume = "auto"
    fitting = dict(arch=run.full.arch.record, dims=run.model.dims.to_dict())
    named = {name: model.state_dict() for name, model in (("teacher", run.teacher), ("CNN", run.cnn)) if model}
    run.inputs = resuming.inputs_of(run.data, weights=run.start or run.full.state, **named)
    return resuming.read(
        args,
        folder,
        CHECKPOINT,
        data=run.data,
        run="finetuning",
        fitting=fitting,
        needed="lr_scheduler",
        inputs=run.inputs,
        resume=resume,
        losses=run.losses and run.losses.as_flags(),
    )


def restore(run: Run, state: State) -> None:
    """Go on from the resumed checkpoint."""
    content = run.resumed
    with resuming.restoring(content["path"]):
        run.model.load_state_dict(content["model"])
        if state.ema and content["model_ema"]:
            state.ema.module.load_state_dict(content["model_ema"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scheduler.load_state_dict(content["lr_scheduler"])
        state.precision.scaler.load_state_dict(content["scaler"])
        state.metrics = resuming.restore(content, state.progress, run.folder)


def _test(args: Any, run: Run, state: State, model: nn.Module) -> dict[str, float]:
    return evaluate(TokenLogits(model), run.data.val, state.precision, args.dist_eval)


def _parameters(run: Run) -> int:
    return sum(p.numel() for p in run.model.parameters())


def _end_epoch(args: Any, run: Run, state: State, keeper: Keeper, curves: Curves, stats: dict[str, float]) -> None:
    """Evaluate, write the log and the checkpoints, and say how the epoch went. stats: of its training."""
    with keeper.evaluating():
        tested = _test(args, run, state, run.model)
        line = results.log_line(stats, tested)
        if state.ema:
            line["test_ema_acc1"] = _test(args, run, state, state.ema.module)["acc1"]
    epoch = state.progress.epoch
    state.progress.next_epoch()
    state.metrics = tested | dict(best=max(state.metrics["best"], tested["acc1"]))
    keeper.attempt(append_log, run.folder, **line, epoch=epoch, n_parameters=_parameters(run))
    if tested["acc1"] >= state.metrics["best"]:
        keeper.attempt(save, "ft_best.pth", args, run, state)
    keeper.write()
    keeper.attempt(curves.epoch, line, epoch)
    shown = f", EMA {line['test_ema_acc1']:.2f}" if state.ema else ""
    say(f"epoch {epoch}: loss {stats['loss']:.4f}, top-1 {tested['acc1']:.2f}{shown}, best {state.metrics['best']:.2f}")


def train(args: Any, run: Run) -> dict[str, Any]:
    """Train to the last epoch, or go on from a checkpoint; returns the last epoch's metrics. Raises RunFailed."""
    # ---------------------------------------------------------------- parts
    progress = Progress(run.data.updates)
    model = wrap_for_training(args, run.model, run.device)
    ema = ModelEmaV3(run.model, decay=args.model_ema_decay) if args.model_ema else None
    optimizer = make_optimizer(args, run.model)
    scheduler, epochs = make_scheduler(args, optimizer, progress.updates)
    state = State(ema, optimizer, scheduler, make_precision(args, run.device), progress)
    criterion = make_loss(args, run.losses or LossWeights.of(args), run.cnn, run.teacher, per_token=True)
    mixup = make_mixup(args, run.data.classes)
    if run.resumed:
        restore(run, state)
    else:
        resuming.start_anew(run.folder, CHECKPOINT)
    _free_alias(run)
    provenance.record(args, run.folder, run.device, run.data, run.inputs)
    if not run.resumed:
        state.metrics = _test(args, run, state, run.model) | dict(best=0.0)
        widths = run.model.dims.to_dim()
        say(f"before: top-1 {state.metrics['acc1']:.2f}, {_parameters(run):,} parameters, widths {widths}")
    curves = Curves(run.folder, purge_step=progress.epoch)
    write = partial(save, CHECKPOINT, args, run, state)
    keeper = Keeper(progress, run.folder / CHECKPOINT, args.recovery_interval, write, args.checkpoint_errors)

    def after_step(loss: Tensor) -> None:
        if ema:
            ema.update(run.model)
        keeper.after_step()

    # ---------------------------------------------------------------- train
    with keeper:
        while progress.epoch < epochs:
            model.train()
            start_epoch(run.data.train, progress.epoch, skip=progress.step * args.grad_accum_steps)
            with curves.training(progress, images_per_update(args)):
                stats = train_one_epoch(
                    model,
                    criterion,
                    run.data.train,
                    optimizer,
                    state.precision,
                    progress,
                    seed=args.seed,
                    accumulate=args.grad_accum_steps,
                    mixup=mixup,
                    clip_grad=args.clip_grad,
                    before_step=scheduler.step_update,
                    after_step=after_step,
                    log_interval=args.log_interval,
                )
            _end_epoch(args, run, state, keeper, curves, stats)
    if not (run.folder / CHECKPOINT).exists():  # resumed from another folder's last epoch
        keeper.write()
    curves.end(vars(args), state.metrics)
    return state.metrics


def conclude(args: Any, run: Run, top1: float, effort: results.Effort, earlier: dict[str, Any] | None = None) -> None:
    """Write and say what the finetuned model is worth, beside the `earlier` stages of summary.json."""
    conditions = results.Conditions(args.batch_size, compiled=args.compile)
    report = results.Report(run.folder, run.full, run.device, conditions, effort)
    stage = report.conclude("finetuned", run.model.dims, top1, earlier=earlier)
    report.say(CHECKPOINT, stage, *results.after_training(run.folder))
