"""Compact a pruned checkpoint into a dense model, and finetune, train from scratch or evaluate it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import options
from engine import evaluate
from files import checkpoint
from models import sparsity
from models.pooling import new_classifier_
from models.tokens import layers
from runtime.console import say
from runtime.errors import Problems
from runtime.folders import make_folder, write_json
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from training import results, resuming
from training.class_names import are_others, check_class_names
from training.dense import CHECKPOINT, Run, read_resumed, train
from training.full_model import (
    FullModel,
    is_dense,
    read_full_model,
)
from training.parts import Data, drop_rate_kwargs, load_data, make_precision
from training.preparing import settle
from training.sources import Checkpoint, Source, Teacher
from training.teachers import load_cnn, load_full


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "examples: python finetune_dense.py --finetune runs/pruned_run --data-set DIGITS --epochs 10\n"
        "          python finetune_dense.py --eval --finetune runs/pruned_run/ft_dense_…/ft_checkpoint.pth",
    )
    options.add_dense_training_args(parser, "where the run's folder is made (default: inside --finetune)")
    group = parser.add_argument_group("finetuning")
    group.add_argument(
        "--finetune",
        metavar="PATH",
        default="",
        help="folder of a pruning run, or a checkpoint (default: train --model itself, with --scratch)",
        path=True,
    )
    group.add_argument("--scratch", action="store_true", help="keep the widths but not the weights (default: off)")
    group.add_argument("--eval", action="store_true", help="print top-1 and top-5 of --finetune and end")
    group.add_argument(
        "--asp",
        action="store_true",
        help="also a 2:4 sparse result, ASP_checkpoint.pth; with --eval, of --finetune (default: off)",
    )
    return parser


def checkpoint_path(path: str) -> Path:
    """The checkpoint that --finetune names: a file, or the result in the folder of a pruning or a finetuning run."""
    if not Path(path).is_dir():
        return Path(path)
    tuned = Path(path) / "ft_checkpoint.pth"
    return tuned if tuned.exists() else Path(path) / "pruned_checkpoint.pth"


def run_folder(args: argparse.Namespace) -> Path:
    """--run_name, else as published: the arguments that matter are in the name."""
    kind = "scratch" if args.scratch else "ft_dense"
    name = f"{kind}_{args.epochs}_lr_{args.lr}_a_{args.distillation_alpha}_T_{args.distillation_tau}"
    if args.asp:
        name += "_asp"
    if not args.kl_loss_coeff:
        name += "_CNN_only"
    parent = Path(args.output_dir) if args.output_dir else checkpoint_path(args.finetune).parent
    return parent / (args.run_name or name)


def _full_model(args: argparse.Namespace, parent: Checkpoint | None) -> FullModel:
    """The full-size model: the pruned checkpoint's where there is one, its weights from where that run had them."""
    source = Source.of(args)
    if parent is None:
        return read_full_model(source, swin=True)
    if args.model and args.model != parent.arch.name:
        raise ValueError(f"--model is {args.model} but {args.finetune} holds {parent.arch.name}")
    args.initial_ema = parent.origin_ema and not source.weights  # --use-ema is of --finetune
    source = replace(source.like(parent), ema=args.initial_ema)
    if args.kl_loss_coeff and not args.eval and not (source.weights or source.pretrained):
        pretrained = bool(parent.args.get("pretrained")) and not parent.origin
        source = replace(source, weights=parent.origin, pretrained=pretrained)
    return read_full_model(source, swin=True)


def is_other_data(args: argparse.Namespace, parent: Checkpoint, data: Data) -> bool:
    """Whether the model was pruned on other data than it is finetuned on now, as far as names and classes tell."""
    other = parent.classes != data.classes or are_others(parent.class_names, data.names)
    return other or parent.args.get("data_set", args.data_set) != args.data_set


def _check_classes(args: argparse.Namespace, parent: Checkpoint, data: Data) -> None:
    if parent.classes != data.classes and (args.eval or args.kl_loss_coeff):
        hint = "" if args.eval else "; for a new classifier use --kl_loss_coeff 0: the full model lacks these classes"
        raise ValueError(f"{args.finetune} has {parent.classes} classes, the data has {data.classes}{hint}")
    if not has_new_classes(args, parent.class_names, data):
        check_class_names(parent.class_names, data.names, args.finetune)


def has_new_classes(args: argparse.Namespace, known: Sequence[str], data: Data) -> bool:
    """Whether a model of other classes, as many as the data's, gets a new classifier: where nothing else teaches it."""
    return not (args.eval or args.kl_loss_coeff) and are_others(known, data.names)


def _model(args: argparse.Namespace, full: FullModel, parent: Checkpoint | None) -> nn.Module:
    drops = drop_rate_kwargs(args)
    if parent is None:
        return full.arch.build(**drops) if args.scratch else full.build(**drops)
    if args.scratch:
        model = full.arch.build(parent.dims, **drops)
        if merging := dict(layers(model)):  # where patches merge is structure
            pruned = parent.build()
            for i, tokens in merging.items():
                tokens.load_state_dict(pruned.blocks[i].tokens.state_dict())
        return model
    model = parent.build(ema=args.use_ema, **drops)
    if (other := are_others(parent.class_names, full.data_names)) or model.num_classes != full.classes:
        classes, what = full.classes, "other" if other else model.num_classes
        say(f"new classifier: {args.finetune} knows {what} classes, the data has {classes}")
        new_classifier_(model, classes)
        model.arch_kwargs = model.arch_kwargs | dict(num_classes=classes)
    return model


def check_args(args: argparse.Namespace) -> tuple[Run, Checkpoint | None]:
    """Load everything the arguments name: (run, pruned checkpoint). Everything wrong is reported at once.

    Raises BadArguments.
    """
    problems = Problems()
    options.check_values(args, problems)
    _check_flags(args, problems)
    parent = problems.attempt(Checkpoint.load, checkpoint_path(args.finetune)) if args.finetune else None
    device = problems.attempt(start_processes, args)
    problems.raise_if_any()
    full = problems.attempt(_full_model, args, parent)
    problems.raise_if_any()
    resumed = None if args.eval else resuming.find(args, run_folder(args), CHECKPOINT)
    preparation = problems.attempt(settle, args, full, parent, resumed)
    problems.raise_if_any()
    data = problems.attempt(load_data, args, preparation, train=not args.eval)
    problems.raise_if_any()
    full = full.for_data(data)
    if parent is not None:
        problems.attempt(_check_classes, args, parent, data)
    elif full.state is not None and not args.scratch and has_new_classes(args, full.class_names, data):
        full = full.for_other_classes()
    elif not args.scratch:
        problems.attempt(full.check_names)
    problems.raise_if_any()
    run = Run(device, full, data, problems.attempt(_model, args, full, parent))
    run.origin = full.path or (parent.origin if parent else "")
    run.transfer = parent is not None and is_other_data(args, parent, data)
    run.start = parent.weights if parent and not args.scratch else None
    if not args.eval:
        if args.kl_loss_coeff:
            run.teacher = problems.attempt(load_full, full, data, device, parent)
        run.cnn = problems.attempt(load_cnn, Teacher.of(args), data, device)
        if run.model is not None:
            run.resumed = problems.attempt(read_resumed, args, run, run_folder(args))
        problems.raise_if_any()
        run.folder = problems.attempt(make_folder, run_folder(args))
    problems.raise_if_any()
    return run, parent


def _check_flags(args: argparse.Namespace, problems: Problems) -> None:
    if args.use_ema and not (args.finetune or args.initial_checkpoint):
        problems.add("--use-ema needs --finetune FILE_OR_FOLDER, or --initial-checkpoint FILE")
    if args.eval:
        if not args.finetune:
            problems.add("--eval needs --finetune FILE_OR_FOLDER")
        return
    if not (args.finetune or args.scratch or args.initial_checkpoint or args.pretrained):
        problems.add("give --finetune FOLDER, or --scratch to train --model itself")
    if not args.finetune and not args.output_dir:
        problems.add("--output_dir is required without --finetune")
    if args.start_epoch and not args.resume:
        problems.add("--start_epoch goes with --resume")


def finish(args: argparse.Namespace, run: Run, top1: float, effort: results.Effort) -> None:
    """The results of a finished run; the earlier stages come from the pruning run's summary.

    They are left out where the data is another: their accuracy would not compare.
    """
    earlier = results.earlier(checkpoint_path(args.finetune).parent) if args.finetune else {}
    pruned = earlier.get("pruned", {})
    conditions = results.Conditions(
        **{k: pruned[k] for k in ("batch", "dtype", "compiled") if k in pruned}
        or dict(batch=args.batch_size, compiled=args.compile)
    )
    report = results.Report(run.folder, run.full, run.device, conditions, effort)
    name = "dense" if is_dense(run.full, run.model.dims) else "finetuned"
    predicted = pruned.get("latency_predicted")
    stage = report.conclude(name, run.model.dims, top1, predicted, {} if run.transfer else earlier)
    following = results.after_dense if name == "dense" else results.after_training
    report.say("ft_checkpoint.pth", stage, *following(run.folder))


def sparse(args: argparse.Namespace, run: Run, folder: Path) -> dict[str, Any]:
    """Make the model 2:4 sparse, evaluate it and write ASP_checkpoint.pth; returns its stage of summary.json."""
    model = run.model.to(run.device)
    if odd := sparsity.sparsify_(model):
        say(f"2:4 sparsity leaves out {', '.join(odd)}: their inputs are not a multiple of 4")
    top1 = evaluate(model, run.data.val, make_precision(args, run.device), args.dist_eval)["acc1"]
    report = results.Report(folder, run.full, run.device, results.Conditions(args.batch_size, dtype="bf16"))
    measured, dims = report.measure_sparse(model), model.dims
    if is_main():
        checkpoint.save(
            folder / "ASP_checkpoint.pth",
            arch=run.full.arch.record,
            dims=dims.to_dict(),
            dim=dims.to_dim(),
            model=model.state_dict(),
            metrics=dict(acc1=top1),
            data_config=run.data.preparation.record,
            args=resuming.saved_args(args, run.origin, names=run.data.names),
        )
    speed = "no 2:4 kernels on this device" if measured is None else f"measured latency {measured:.3f} of dense"
    say(f"{folder / 'ASP_checkpoint.pth'}: 2:4 sparse, top-1 {top1:.2f}, {speed}")
    return report.stage(dims, top1, None, measured)


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    run, parent = check_args(args)
    if args.eval:
        result = evaluate(run.model.to(run.device), run.data.val, make_precision(args, run.device), args.dist_eval)
        say(
            f"{checkpoint_path(args.finetune)}: top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, "
            f"loss {result['loss']:.4f} on {int(result['samples'])} images"
        )
        if args.asp:
            sparse(args, run, checkpoint_path(args.finetune).parent)
        return
    metrics = train(args, run)
    if is_main():
        finish(args, run, metrics["acc1"], effort)
    if args.asp:
        stage = sparse(args, run, run.folder)
        if is_main():
            summary = run.folder / "summary.json"
            write_json(summary, json.loads(summary.read_text()) | dict(sparse=stage))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
