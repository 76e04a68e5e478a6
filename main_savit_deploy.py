"""SAViT: compact a pruned checkpoint into a dense model and finetune it with the published recipe."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

import options
from options.ranges import ABOVE_0
from runtime.console import warn
from runtime.errors import Problems
from runtime.folders import make_folder
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from training import results, resuming
from training.class_names import check_class_names
from training.dense import CHECKPOINT, PUBLISHED, Run, conclude, read_resumed, train
from training.full_model import FullModel, read_full_model
from training.parts import LossWeights, drop_rate_kwargs, load_data
from training.preparing import settle
from training.sources import Checkpoint, Source, Teacher
from training.teachers import load_cnn, load_full


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python main_savit_deploy.py --masked_model runs/savit/pruned_checkpoint.pth --data-set DIGITS "
        "--epochs 10\n  --output_dir runs/savit_finetuned",
    )
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_optimizer_args(parser)
    options.add_schedule_args(parser)
    _add_distillation_args(parser)
    options.add_tau_arg(parser, "of soft CNN distillation")
    options.add_ema_args(parser)
    options.add_run_args(parser, "the run's folder; required")
    options.add_resume_args(parser, "ft_checkpoint.pth (also named checkpoint.pth)")
    group = parser.add_argument_group("finetuning")
    group.add_argument(
        "--masked_model", metavar="FILE", default="", help="pruned_checkpoint.pth of a pruning run; required", path=True
    )
    group = parser.add_argument_group("accepted, no effect")
    group.add_argument("--finetune_op", type=int, choices=(1,), default=1, help="1 finetunes (default: %(default)s)")
    group.add_argument(
        "--pruning_flops_percentage",
        type=float,
        choices=(0.0,),
        default=0.0,
        help="0: nothing is pruned here (default: %(default)s)",
    )
    parser.set_defaults(model_ema=False)  # published
    return parser


def _add_distillation_args(parser: argparse.ArgumentParser) -> None:
    group = options.add_cnn_args(parser)
    group.add_argument(
        "--teacher-model-full",
        metavar="NAME",
        default="",
        help="timm name of the full model (default: the pruned model's own)",
    )
    group.add_argument(
        "--teacher-path-full",
        metavar="FILE",
        default="",
        help="its weights (default: those that were pruned)",
        path=True,
    )
    group.add_argument(
        "--distillation-type-full",
        choices=("none", "soft"),
        default="none",
        help="soft distils from the full model (default: %(default)s)",
    )
    group.add_argument(
        "--distillation-alpha-full",
        metavar="F",
        type=float,
        default=1e5,
        help="weight of its KL, a thousandth of it per batch-mean KL times tau^2 (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--distillation-tau-full",
        metavar="T",
        type=float,
        default=0.05,
        help="temperature of its KL (default: %(default)s)",
        check=ABOVE_0,
    )


def _full_model(args: argparse.Namespace, parent: Checkpoint) -> FullModel:
    """The full-size model that was pruned, with its weights where the run distils from it."""
    if args.model and args.model.removesuffix("_deploy") != parent.arch.name:
        raise ValueError(f"--model is {args.model} but {args.masked_model} holds {parent.arch.name}")
    source = Source.of(args).like(parent)
    if args.distillation_type_full != "none" and not (source.weights or source.pretrained):
        source = replace(source, weights=parent.origin, ema=parent.origin_ema)
    return read_full_model(source)


def _teacher(args: argparse.Namespace, full: FullModel) -> FullModel:
    """The full model to distil from: the pruned one's, or the one that --teacher-…-full names."""
    path = args.teacher_path_full
    if not (args.teacher_model_full or path):
        if not full.has_weights:
            raise ValueError("--distillation-type-full: no full model to distil from: give --teacher-path-full FILE")
        return full
    model = args.teacher_model_full or (None if path else full.arch.name)
    teacher = read_full_model(Source(model, weights=path, pretrained=not path))
    return teacher.with_kwargs(num_classes=full.classes)


def _model(args: argparse.Namespace, parent: Checkpoint, classes: int) -> nn.Module:
    if parent.classes != classes:
        raise ValueError(f"{args.masked_model} has {parent.classes} classes, the data has {classes}")
    return parent.build(**drop_rate_kwargs(args))


def losses_of(args: argparse.Namespace) -> LossWeights:
    """The published full-model loss is alpha x tau^2 x the mean of the KL over batch and 1000 classes."""
    alpha, tau = args.distillation_alpha_full, args.distillation_tau_full
    kl = alpha * tau**2 if args.distillation_type_full == "soft" else 0.0
    return LossWeights(1.0, kl, args.distillation_type, args.distillation_alpha, args.distillation_tau, kl_tau=tau)


def check_args(args: argparse.Namespace) -> Run:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    if not args.output_dir:
        problems.add("--output_dir is required")
    if args.start_epoch and not args.resume:
        problems.add("--start_epoch goes with --resume")
    if not args.masked_model:
        problems.add("--masked_model FILE is required: pruned_checkpoint.pth of a pruning run")
    parent = problems.attempt(Checkpoint.load, args.masked_model) if args.masked_model else None
    device = problems.attempt(start_processes, args)
    problems.raise_if_any()
    full = problems.attempt(_full_model, args, parent)
    problems.raise_if_any()
    resumed = resuming.find(args, Path(args.output_dir), CHECKPOINT)
    preparation = problems.attempt(settle, args, full, parent, resumed)
    problems.raise_if_any()
    data = problems.attempt(load_data, args, preparation)
    problems.raise_if_any()
    full = full.for_data(data)
    problems.attempt(check_class_names, parent.class_names, data.names, args.masked_model)
    run = Run(device, full, data, problems.attempt(_model, args, parent, data.classes), folder=Path(args.output_dir))
    run.origin, run.start, run.alias = parent.origin, parent.weights, PUBLISHED
    run.losses = losses_of(args)
    teacher = problems.attempt(_teacher, args, full) if args.distillation_type_full != "none" else None
    if teacher is not None and run.losses.kl:
        run.teacher = problems.attempt(load_full, teacher, data, device, parent)
    run.cnn = problems.attempt(load_cnn, Teacher.of(args), data, device)
    if run.model is not None:
        run.resumed = problems.attempt(read_resumed, args, run, run.folder)
    problems.raise_if_any()
    problems.attempt(make_folder, run.folder)
    problems.raise_if_any()
    return run


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    run = check_args(args)
    if args.teacher_path and args.distillation_type == "none":
        warn("--teacher-path without --distillation-type hard or soft: no CNN teaches, as in the published recipe")
    metrics = train(args, run)
    if is_main():
        conclude(args, run, metrics["acc1"], effort, results.earlier(Path(args.masked_model).parent))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
