"""Prune and Merge: compress the tokens of every block, finetune, evaluate, and measure the speed."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

import options
from engine import evaluate
from files import checkpoint
from latency.whole import measure_ratios
from loading import shards
from models import Arch, Masks, ViTDims
from models.tokens import train_matrices_
from pruning import pm_vit, token_merging
from recipes import calibration, pm_vit_options
from recipes import pm_vit as steps
from runtime.console import say, warn
from runtime.device import device_name
from runtime.errors import FailedTogether, Problems
from runtime.folders import append_log, make_folder
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from training import provenance, results, resuming
from training.dense import PUBLISHED, Run, conclude, is_own, read_resumed, train
from training.full_model import FullModel
from training.parts import Data, load_data, make_precision
from training.preparing import settle
from training.sources import structural_kwargs


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "examples: python main_pm_vit.py --prune --resume dense.pth --data-set DIGITS --output_dir runs/pm\n"
        "          python main_pm_vit.py --resume runs/pm/pruned_checkpoint.pth --data-set DIGITS --final_finetune 5\n"
        "            --teacher-path dense.pth --distillation-type soft --output_dir runs/pm_finetuned",
    )
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_optimizer_args(parser)
    options.add_schedule_args(parser)
    options.add_cnn_args(parser)
    options.add_tau_arg(parser, "of soft distillation")
    options.add_ema_args(parser)
    options.add_run_args(parser, "folder of what is written (default: of --prune, runs/pm_…, which is said)")
    pm_vit_options.add_token_args(parser)
    parser.set_defaults(
        model_ema=False,
        drop_path=0.0,
        aa="",
        lr=1e-4,
        min_lr=1e-6,
        warmup_lr=1e-5,
        epochs=100,
        start_epoch=None,
        teacher_model=None,
    )
    return parser


# --------------------------------------------------------------------------------------------------------------- prune
def prune(args: argparse.Namespace, run: Run, effort: results.Effort) -> None:
    """Compress the model and write pruned_checkpoint.pth with what it is worth."""
    resuming.start_anew(run.folder, resuming.PRUNED[0], resuming.PRUNED)
    provenance.record(args, run.folder, run.device, run.data, {})
    model = run.model.to(run.device).eval()
    merging = token_merging.Merging(args.merge, args.merge_entries == "published", args.shortcut == "merged")
    images = calibration.images_of(args, run.data.preparation) if pm_vit_options.calibrates(args) else None
    try:
        structure = steps.structure(args, run, images)
        small = token_merging.compress(model, structure, merging, args.dense_merge)
    except pm_vit.CompressionError as error:
        raise FailedTogether(str(error)) from None
    if args.compensate:
        calibration.compensate_(model, small, Masks(model.dims, run.device), images, args.batch_size)
    precision = make_precision(args, run.device)
    test = partial(evaluate, loader=run.data.val, precision=precision, sharded=args.dist_eval)
    before, after = (test(m)["acc1"] for m in (model, small))
    if not is_main():
        return
    path = run.folder / "pruned_checkpoint.pth"
    checkpoint.save(
        path,
        arch=dict(name=small.arch, kwargs=structural_kwargs(small.arch_kwargs) | run.full.arch.kwargs),
        dims=small.dims.to_dict(),
        dim=small.dims.to_dim(),
        model=small.state_dict(),
        metrics=dict(acc1=after),
        data_config=run.data.preparation.record,
        args=resuming.saved_args(args, run.origin, names=run.data.names),
    )
    append_log(run.folder, dense_acc1=before, test_acc1=after, tokens=[b.tokens for b in small.dims.blocks])
    counts = " ".join(str(b.tokens) for b in small.dims.blocks)
    say(
        f"tokens per block {counts} of {structure.centres.shape[1] + model.num_prefix_tokens}, "
        f"patches skipped {' '.join(map(str, structure.skipped.sum(1).tolist()))}; top-1 {before:.2f} before"
    )
    conditions = results.Conditions(args.batch_size, compiled=args.compile)
    report = results.Report(run.folder, run.full, run.device, conditions, effort)
    stage = report.conclude("pruned", small.dims, after, earlier=report.dense(model.dims, before))
    following = (
        f"main_pm_vit.py --resume {shlex.quote(str(path))} {results.data_flags(args)} "
        f"--output_dir {shlex.quote(str(run.folder / 'finetuned'))}"
    )
    report.say(path.name, stage, following)


# ------------------------------------------------------------------------------------------------------------ finetune
def freeze_(args: argparse.Namespace, model: nn.Module) -> None:
    """--freeze_param and --freeze_matrix, before there is an optimizer."""
    model.requires_grad_(not args.freeze_param)
    train_matrices_(model, not args.freeze_matrix)


def finetune(args: argparse.Namespace, run: Run, effort: results.Effort) -> None:
    """Train the compressed model to the last epoch."""
    freeze_(args, run.model)
    metrics = train(args, run)
    if is_main():
        conclude(args, run, metrics["acc1"], effort, results.earlier(Path(args.resume).parent))


# ----------------------------------------------------------------------------------------------------- eval and speed
def evaluate_compressed(args: argparse.Namespace, run: Run) -> None:
    """Say the accuracy of a compressed model and what it costs."""
    result = evaluate(run.model.to(run.device), run.data.val, make_precision(args, run.device), args.dist_eval)
    arch, dims = Arch.of_model(run.model), run.model.dims
    say(
        f"{args.resume}: top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f} on {int(result['samples'])} images, "
        f"{arch.macs(dims) / 1e9:.3f} GMACs, {arch.params(dims):,} parameters"
    )


def speed(args: argparse.Namespace, full: FullModel, dims: ViTDims, device: torch.device) -> None:
    """Images per second of the dense and of the compressed model, interleaved; both with fused attention."""
    measured = measure_ratios(full.arch, [dims], args.batch_size, device, compiled=args.compile)
    ratios, dense = measured.ratios, args.batch_size / measured.dense_seconds
    if measured.note:
        warn(measured.note)
    say(
        f"{full.arch.name}, batch {args.batch_size}, fp32, {device_name(device)}: dense {dense:,.1f} images/s, "
        f"compressed {dense / ratios[0]:,.1f} images/s, {1 / ratios[0]:.2f}x"
    )


# ---------------------------------------------------------------------------------------------------------- arguments
def check_args(args: argparse.Namespace) -> Run:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    pm_vit_options.check_flags(args, problems)
    device = problems.attempt(start_processes, args)
    problems.raise_if_any()
    model = problems.attempt(steps.read_model, args)
    problems.raise_if_any()
    if args.merge == token_merging.CONTENT and not steps.is_compressed(model.full, model.dims):
        model.full = model.full.with_kwargs(content_merge=True)
    problems.attempt(pm_vit_options.check_model, args, model)
    problems.raise_if_any()
    run = Run(device, model.full, Data(None, None, 0), None, origin=model.origin, start=model.weights)
    if args.speed_only:
        run.model = model
        return run
    preparation = problems.attempt(settle, args, model.full, model.start)
    problems.raise_if_any()
    run.data = problems.attempt(load_data, args, preparation, train=not args.eval)
    problems.raise_if_any()
    run.full = model.full = model.full.for_data(run.data)
    problems.attempt(model.check_classes, args, run.data.classes)
    if args.prune and pm_vit_options.calibrates(args):
        problems.attempt(shards.check_indexed, args, "--compensate" if args.compensate else "--prune_mode probe")
        problems.attempt(calibration.check, args, len(run.data.train.dataset))
    problems.raise_if_any()
    run.model = problems.attempt(model.build, args)
    problems.raise_if_any()
    if args.eval:
        return run
    run.folder = problems.attempt(make_folder, _folder(args, run))
    if not args.prune:
        _check_finetuning(args, run, problems)
    problems.raise_if_any()
    return run


def _folder(args: argparse.Namespace, run: Run) -> Path:
    """--output_dir, or where the published --prune command, which has none, writes to."""
    if args.output_dir:
        return Path(args.output_dir)
    folder = Path("runs", f"pm_{run.full.arch.name}_{args.prune_mode}_{args.prune_rate:g}_{args.keep_rate:g}")
    say(f"no --output_dir: writing to {folder}")
    return folder


def _check_finetuning(args: argparse.Namespace, run: Run, problems: Problems) -> None:
    if args.distillation_type != "none" and (teacher := problems.attempt(steps.teacher, args, run)) is not None:
        if args.distillation_type == "soft":
            run.teacher, run.cnn = teacher, None
        else:
            run.teacher, run.cnn = None, steps.MeanLogits(teacher)
    run.alias, run.losses = PUBLISHED, steps.losses_of(args)
    own = is_own(run, args.resume)
    if own:  # what it started from is in the checkpoint alone
        run.start = None
    resume = "auto" if own else ""
    run.resumed = problems.attempt(read_resumed, args, run, run.folder, resume)
    if own and run.resumed:
        run.inputs = run.resumed["args"].get("inputs", {}) | run.inputs


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    run = check_args(args)
    if args.speed_only:
        dims = run.model.dims
        if not steps.is_compressed(run.full, dims):
            dims = token_merging.uniform(dims, args.keep_rate, run.full.arch.prefix)
        speed(args, run.full, dims, run.device)
    elif args.eval:
        evaluate_compressed(args, run)
    elif args.prune:
        prune(args, run, effort)
    else:
        finetune(args, run, effort)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
