"""NViT: prune a pretrained ViT over embedding, heads, QK, V and MLP at once, until a latency target is reached."""
from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import options
import results
import training
from datasets import start_epoch
from engine import Precision, evaluate, train_one_epoch
from latency.table import LatencyTable
from models import Masks, compact
from models.vit import TokenLogits
from pruning.config import PruningConfig, load_config
from pruning.global_latency import GlobalPruner
from pruning_steps import PruningSteps, Setup
from utils import (
    Problems,
    RunFailed,
    append_log,
    is_main,
    make_folder,
    naming_the_last_good,
    run_script,
    say,
    warn,
    write_json,
)

KL_TEMPERATURE = 3.0  # published, fixed while pruning


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python main_full_global_latency.py --data-set DIGITS --initial-checkpoint dense.pth --pruning "
        "--latency_look_up_table table.json\n  --latency_target 0.5 --latency_regularization 5e-4 "
        "--output_dir runs/digits",
    )
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_optimizer_args(parser)
    options.add_distillation_args(parser)
    options.add_tau_arg(parser, "of soft CNN distillation; the full model's KL is at 3, as published")
    options.add_run_args(parser, "where the run's folder is made; required")
    parser.add_argument("--resume", metavar="FILE", nargs="?", const="auto", default="",
                        help="go on from FILE, or from checkpoint.pth of this run's folder (default: start anew)")
    group = parser.add_argument_group("pruning")
    group.add_argument("--pruning", action="store_true", help="prune; without it the dense model is evaluated")
    group.add_argument("--pruning_config", metavar="FILE", default="pruning_configs/group8_m23_m09.json",
                       help="criterion, momentum, group sizes (default: pruning_configs/group8_m23_m09.json)")
    group.add_argument("--prune_dict", metavar="JSON", default='{"Global":0}',
                       help='label of the run and most units removed, 0 for no limit (default: {"Global":0})')
    group.add_argument("--interval_prune", metavar="STEPS", type=int, nargs="+", default=[100],
                       help="training steps between pruning events (default: 100)")
    group.add_argument("--prune_per_iter", metavar="UNITS", type=int, default=1024,
                       help="units per event: prune_per_iter / group_size groups go (default: 1024)")
    group.add_argument("--group_size", metavar="UNITS", type=int, default=16,
                       help="units that prune_per_iter counts as one group (default: 16)")
    group.add_argument("--student_eval", metavar="BOOL", type=options.boolean, default=False,
                       help="after the first event the student runs in eval mode (default: False)")
    group.add_argument(
        "--latency_regularization",
        metavar="F",
        type=float,
        default=0.0,
        help="lambda of saliency - lambda x latency, in squared loss per second of the table (default: 0)",
    )
    group.add_argument("--latency_target", metavar="RATIO", type=float, default=None,
                       help="stop at this share of the dense model's predicted latency, in (0, 1] (default: none)")
    group.add_argument("--latency_look_up_table", metavar="FILE", default="latency_head.json",
                       help="from python -m latency.build_table (default: latency_head.json)")
    group = parser.add_argument_group("accepted, no effect")
    group.add_argument("--pruning_exit", action="store_true", help="the published code never reads it")
    return parser


def run_folder(args: argparse.Namespace, full: training.FullModel, label: str, cap: int) -> Path:
    """As published: the arguments that matter are in the name."""
    name = f"global_prune_{args.data_set}_{full.arch}_lr{args.lr}_{label}_{cap}"
    if args.latency_target is not None:
        name += f"_lat_{args.latency_regularization}_target_{args.latency_target}"
    return Path(args.output_dir) / f"{name}_ft_{args.epochs}"


def _prune_dict(text: str) -> tuple[str, int]:
    try:
        (label, cap), *more = json.loads(text).items()
    except (json.JSONDecodeError, AttributeError, ValueError):
        label, cap, more = None, None, []
    if more or not isinstance(cap, int) or isinstance(cap, bool) or cap < 0:
        raise ValueError(f'--prune_dict must be one label and a count, like {{"Global":39000}}, not {text}')
    return label, cap


def _load_table(path: str, full: training.FullModel) -> LatencyTable:
    table = LatencyTable.load(path)
    table.check_covers(training.dims_of(full))
    return table


def _check_flags(args: argparse.Namespace, problems: Problems) -> None:
    if 0 < args.prune_per_iter < args.group_size:
        problems.add(f"--prune_per_iter {args.prune_per_iter} is less than one group of --group_size {args.group_size}")
    if len(args.interval_prune) != 1 or args.interval_prune[0] <= 0:
        problems.add(f"--interval_prune takes one number of steps above 0, not {args.interval_prune}")
    if args.pruning and not args.original_loss_coeff:
        problems.add("--original_loss_coeff must be above 0: until the first event the student equals the full model, "
                     "so that its KL ranks nothing")  # fmt: skip
    if not args.output_dir:
        problems.add("--output_dir is required")


def _make_pruner(args: argparse.Namespace, masks: Masks, table: LatencyTable, config: PruningConfig,
                 cap: int) -> GlobalPruner:  # fmt: skip
    """Raises ValueError for a table that does not reach down to the floors, or a target below them."""
    pruner = GlobalPruner(
        masks, table, config.group_sizes(masks.full), regularization=args.latency_regularization, cap=cap or None,
        target=args.latency_target, per_event=args.prune_per_iter // args.group_size,
    )  # fmt: skip
    lowest = table.ratio(pruner.floor(), masks.full)
    if args.latency_target is not None and args.latency_target < lowest:
        raise ValueError(
            f"--latency_target {args.latency_target} is below {lowest:.4f}, the least that the group sizes allow"
        )
    return pruner


def check_args(args: argparse.Namespace) -> Setup:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    _check_flags(args, problems)
    named = problems.attempt(_prune_dict, args.prune_dict)
    config = problems.attempt(load_config, args.pruning_config)
    device = problems.attempt(training.start, args)
    full = problems.attempt(training.full_model, args)
    table = problems.attempt(_load_table, args.latency_look_up_table, full) if full else None
    data = problems.attempt(training.load_data, args, full) if full else None
    if full and not full.has_weights:
        problems.add("pruning starts from a trained model: give --initial-checkpoint FILE or --pretrained")
    problems.raise_if_any()
    problems.attempt(full.check_classifier)
    model = problems.attempt(full.build, **training.drop_rates(args))
    cnn = problems.attempt(training.cnn_teacher, args, data.classes, device)
    problems.raise_if_any()
    (config, dead), (label, cap) = config, named
    pruner = problems.attempt(_make_pruner, args, Masks(model.dims, device), table, config, cap)
    path = run_folder(args, full, label, cap)
    resumed = problems.attempt(read_resumed, args, full, path)
    problems.raise_if_any()
    folder = problems.attempt(make_folder, path)
    problems.raise_if_any()
    if dead:
        warn(f"{args.pruning_config}: as in the published code, these keys have no effect: {', '.join(dead)}")
    if (cleaned := table.monotone_report()).raised:
        say(f"latency table: {cleaned.raised} of {cleaned.values} values lie below that of a narrower layer, by up to "
            f"{cleaned.largest_change:.1%}; selection counts such a step as free")  # fmt: skip
    return Setup(device, full, data, model, cnn, table, config, pruner, folder, resumed)


def save(name: str, setup: Setup, steps: PruningSteps, optimizer: torch.optim.Optimizer, precision: Precision,
         args: argparse.Namespace, epoch: int, metrics: dict[str, Any]) -> None:  # fmt: skip
    if not is_main():
        return
    dims = steps.masks.dims
    checkpoint.save(
        setup.folder / name, arch=setup.full.record, dims=dims.to_dict(), dim=dims.to_dim(),
        masks=steps.masks.state_dict(), model=setup.model.state_dict(), optimizer=optimizer.state_dict(),
        scaler=precision.scaler.state_dict(), pruner=steps.state_dict(), epoch=epoch, step=steps.steps,
        rng=checkpoint.rng_state(), metrics=metrics, args=vars(args) | dict(initial_checkpoint=setup.full.path),
    )  # fmt: skip


def read_resumed(args: argparse.Namespace, full: training.FullModel, folder: Path) -> dict[str, Any] | None:
    """The checkpoint that --resume names, None without it. Raises ValueError where it does not fit the arguments."""
    if not args.resume:
        return None
    path = folder / "checkpoint.pth" if args.resume == "auto" else Path(args.resume)
    content = checkpoint.load(path)
    if content["arch"] != full.record or content["pruner"] is None:
        raise ValueError(f"--resume: {path} is not a pruning run of {full.arch} with these arguments")
    return content


def restore(args: argparse.Namespace, setup: Setup, steps: PruningSteps, optimizer: torch.optim.Optimizer,
            precision: Precision) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Go on from the resumed checkpoint; returns the next epoch and the metrics so far."""
    content = setup.resumed
    setup.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    precision.scaler.load_state_dict(content["scaler"])
    steps.restore(content["pruner"], content["masks"])
    training.restore_random_state(args, content)
    return content["epoch"] + 1, content["metrics"]


@torch.inference_mode()
def check_compact(model: nn.Module, masks: Masks) -> float:
    """Relative difference of masked and compact logits on random images. Raises RunFailed above 1e-3."""
    shape = (4, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(masks.keep["embed"].device)
    masked = model.eval()(images)
    difference = float((compact(model, masks)(images) - masked).norm() / masked.norm())
    if not difference <= 1e-3:
        raise RunFailed(f"the compact model differs from the masked one by {difference:.1e}: please report this")
    return difference


def finish(args: argparse.Namespace, setup: Setup, masks: Masks, top1_dense: float, top1: float) -> dict[str, Any]:
    """summary.json and dims.json of a finished run."""
    conditions = results.Conditions.of(setup.table, setup.device, args.batch_size)
    common = dict(conditions=conditions, device=setup.device)
    dense = results.stage(setup.full, masks.full, top1_dense, predicted=1.0, measured=1.0, **common)
    measured = results.measured_ratio(setup.full, masks.dims, conditions, setup.device)
    pruned = results.stage(
        setup.full, masks.dims, top1, predicted=round(setup.pruner.ratio, 5), measured=measured, **common
    )
    summary = dict(dense=dense, pruned=pruned)
    write_json(setup.folder / "dims.json", masks.dims.to_dict())
    write_json(setup.folder / "summary.json", summary)
    return summary


def main(args: argparse.Namespace) -> None:
    setup = check_args(args)
    precision = training.precision(args, setup.device)
    teacher = training.frozen(copy.deepcopy(setup.model), setup.device)
    top1_dense = evaluate(teacher, setup.data.val, precision, args.dist_eval)["acc1"]
    say(f"dense model: top-1 {top1_dense:.2f} on {len(setup.data.val.dataset)} images")
    if not args.pruning:
        say("no --pruning: nothing removed")
        return

    # ---------------------------------------------------------------- parts
    student = training.for_training(setup.model, setup.device)
    optimizer = training.make_optimizer(args, setup.model)
    criterion = training.make_loss(args, setup.cnn, teacher, tau=KL_TEMPERATURE, per_token=False)
    mixup = training.make_mixup(args, setup.data.classes)
    steps = PruningSteps(args, setup, student, optimizer, criterion)
    if setup.resumed:
        epoch, test = restore(args, setup, steps, optimizer, precision)
    else:
        epoch, test = 0, dict(acc1=top1_dense)
    write_json(setup.folder / "args.json", vars(args))

    # ---------------------------------------------------------------- prune
    while epoch < args.epochs and not steps.done:
        start_epoch(setup.data.train, epoch)
        steps.set_phase()
        with naming_the_last_good(setup.folder / "checkpoint.pth"):
            stats = train_one_epoch(
                student, criterion, setup.data.train, optimizer, precision, epoch, mixup=mixup,
                clip_grad=args.clip_grad, after_backward=steps.after_backward, after_step=steps.after_step,
                log_interval=args.log_interval,
            )  # fmt: skip
            test = evaluate(TokenLogits(setup.model), setup.data.val, precision, args.dist_eval)
        ratio = setup.pruner.ratio
        save("checkpoint.pth", setup, steps, optimizer, precision, args, epoch, test | dict(latency=ratio))
        append_log(setup.folder, epoch=epoch, events=steps.events, latency=ratio, **results.log_line(stats, test))
        say(f"epoch {epoch}: loss {stats['loss']:.4f}, top-1 {test['acc1']:.2f}, predicted latency {ratio:.4f}")
        epoch += 1

    # ---------------------------------------------------------------- result
    if args.latency_target is not None and not setup.pruner.reached:
        way = ("nothing more may be removed (floors, or the count in --prune_dict)" if steps.exhausted else
               f"go on with --resume {setup.folder / 'checkpoint.pth'} and more --epochs")  # fmt: skip
        raise RunFailed(f"target {args.latency_target} not reached, predicted {setup.pruner.ratio:.4f}: {way}")
    if not is_main():
        return
    say(f"compact: widths {steps.masks.dims.to_dim()}, relative difference to the masked model "
        f"{check_compact(setup.model, steps.masks):.1e}")
    summary = finish(args, setup, steps.masks, top1_dense, test["acc1"])
    save("pruned_checkpoint.pth", setup, steps, optimizer, precision, args, epoch - 1, test | summary["pruned"])
    say(f"pruned: {setup.folder / 'pruned_checkpoint.pth'}; top-1 {test['acc1']:.2f}, latency predicted "
        f"{summary['pruned']['latency_predicted']:.3f}, measured {summary['pruned']['latency_measured']:.3f} of dense")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
