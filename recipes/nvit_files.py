"""The files of a pruning run: checkpoints to resume from, and what is written when it has ended."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine import Progress
from files import checkpoint
from models import compact
from pruning.config import PruningConfig
from recipes import one_shot_options
from recipes.nvit import PruningSteps, Setup
from runtime.console import say, say_result
from runtime.precision import Precision
from runtime.ranks import is_main
from runtime.seeds import rng_state
from training import results, resuming
from training.full_model import FullModel
from training.parts import Data

CHECKPOINT = "checkpoint.pth"


def run_folder(args: Any, full: FullModel, label: str, cap: int) -> Path:
    """--run_name, else as published: the arguments that matter are in the name."""
    if args.run_name:
        return Path(args.output_dir) / args.run_name
    if args.one_shot:
        return Path(args.output_dir) / one_shot_options.folder_name(args, full.arch.name)
    data_set = args.data_set.replace("/", "_")
    name = f"global_prune_{data_set}_{full.arch.name}_lr{args.lr}_{label}_{cap}"
    if args.latency_target is not None:
        name += f"_lat_{args.latency_regularization}_target_{args.latency_target}"
    for target in ("latency_target_ms", "macs_target", "params_target"):
        if (limit := getattr(args, target)) is not None:
            name += f"_{target}_{limit:g}"
    defaults = dict(
        selection="published", saliency="weights", saliency_loss="training", align=None, compensate=None, tokens=None
    )
    name += "".join(f"_{n}_{getattr(args, n)}" for n, value in defaults.items() if getattr(args, n) != value)
    return Path(args.output_dir) / f"{name}_ft_{args.epochs}"


@dataclass
class State:
    """What pruning moves, and so what a checkpoint holds."""

    steps: PruningSteps
    optimizer: torch.optim.Optimizer
    precision: Precision
    progress: Progress
    metrics: dict[str, Any] = field(default_factory=dict)


def save(name: str, args: Any, setup: Setup, state: State) -> None:
    """Write a checkpoint into the run's folder, on the main rank. Raises RunFailed where a loss was not finite."""
    state.precision.guard.settle()
    if not is_main():
        return
    steps, progress = state.steps, state.progress.state_dict()
    model, masks = setup.student.expand()
    checkpoint.save(
        setup.folder / name,
        keep_older=name == CHECKPOINT,
        arch=setup.full.arch.record,
        dims=masks.dims.to_dict(),
        dim=masks.dims.to_dim(),
        masks=masks.state_dict(),
        model=model.state_dict(),
        optimizer=setup.student.optimizer_state(),
        scaler=state.precision.scaler.state_dict(),
        pruner=steps.state_dict(),
        epoch=progress["epoch"],
        step=steps.steps,
        rng=rng_state(),
        metrics=state.metrics | progress["metrics"],
        data_config=setup.data.preparation.record,
        args=resuming.saved_args(args, setup.full.path, setup.inputs, setup.data.names),
    )


def read_resumed(
    args: Any, full: FullModel, data: Data, config: PruningConfig, folder: Path, inputs: dict[str, str]
) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None. Raises ValueError where it does not fit the arguments."""
    content = resuming.read(
        args,
        folder,
        CHECKPOINT,
        data=data,
        run="pruning",
        fitting=dict(arch=full.arch.record),
        needed="pruner",
        inputs=inputs,
        may_differ={"epochs"},
    )  # the learning rate is constant
    if content is not None and content["pruner"]["config"] != asdict(config):
        raise ValueError(f"--resume: {args.pruning_config} is not the pruning config of that run")
    return content


def restore(setup: Setup, state: State) -> None:
    """Go on from the resumed checkpoint."""
    content = setup.resumed
    with resuming.restoring(content["path"]):
        masks = setup.student.masks.fresh()
        masks.load_state_dict(content["masks"])
        masks.install_tokens_(setup.model)
        setup.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.precision.scaler.load_state_dict(content["scaler"])
        state.steps.restore(content["pruner"], content["masks"])
        state.metrics = resuming.restore(content, state.progress, setup.folder, resuming.PRUNED)
    state.progress.ended = state.steps.done


def make_report(args: Any, setup: Setup, effort: results.Effort) -> results.Report:
    """Measured as the latency table was, so that prediction and measurement speak of the same thing."""
    conditions = results.Conditions.of(setup.table, args.batch_size)
    return results.Report(setup.folder, setup.full, setup.device, conditions, effort)


def conclude(
    args: Any,
    setup: Setup,
    report: results.Report,
    top1_dense: float,
    metrics: dict[str, Any],
    write: Callable[[str], None],
) -> None:
    """Check and measure the compact model, and write the results; metrics go into the checkpoint that `write` makes."""
    if not is_main():
        return
    model, masks = setup.student.eval().expand()
    say(
        f"compact: widths {masks.dims.to_dim()}, relative difference to the masked model "
        f"{results.check_compact(model, compact(model, masks)):.1e}"
    )
    dense = replace(report, full=replace(setup.full, arch=setup.full.arch.plain)).dense(
        masks.full.with_queries(None), top1_dense
    )
    pruned = report.conclude("pruned", masks.dims, metrics["acc1"], round(setup.pruner.ratio, 5), dense)
    metrics |= pruned
    write("pruned_checkpoint.pth")
    results.say_where(
        setup.folder,
        f"finetune_dense.py --finetune {shlex.quote(str(setup.folder))} "
        f"{results.data_flags(args)} --original_loss_coeff 1 --kl_loss_coeff 100000",
    )
    say_result(
        f"pruned: {setup.folder / 'pruned_checkpoint.pth'}; top-1 {metrics['acc1']:.2f}, latency predicted "
        f"{pruned['latency_predicted']:.3f}, measured {pruned['latency_measured']:.3f} of dense"
    )
