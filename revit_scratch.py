"""ReViT: train the redistributed widths that NViT discovers, or any widths of your own, from scratch."""

from __future__ import annotations

import argparse
from pathlib import Path

import options
from models import ViTDims
from models.pretrained import read_dims
from models.redistribution import RULES, redistribute
from runtime.errors import Problems
from runtime.folders import make_folder
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from training import results, resuming
from training.dense import CHECKPOINT, Run, conclude, read_resumed, train
from training.full_model import FullModel, read_full_model
from training.parts import drop_rate_kwargs, load_data
from training.preparing import settle
from training.sources import Source, Teacher
from training.teachers import load_cnn, load_full


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python revit_scratch.py --scratch --EMB 176 --data-path IMAGENET --kl_loss_coeff 0 "
        "--original_loss_coeff 1\n  --output_dir runs",
    )
    options.add_dense_training_args(parser, "where the run's folder is made; required")
    group = parser.add_argument_group("architecture")
    group.add_argument(
        "--EMB",
        metavar="WIDTH",
        type=int,
        default=768,
        help="embedding width that the redistribution rule starts from (default: %(default)s)",
    )
    group.add_argument(
        "--rule",
        choices=tuple(RULES),
        default="published",
        help="the published code's rule or the paper's (default: %(default)s)",
    )
    group.add_argument(
        "--dims",
        metavar="FILE",
        default="",
        help="any widths instead of a rule's: a dims.json (default: none)",
        path=True,
    )
    group.add_argument(
        "--scratch", action="store_true", help="required, as published: there are no weights to start from"
    )
    return parser


def run_folder(args: argparse.Namespace, dims: ViTDims) -> Path:
    """--run_name, else as published: the arguments that matter are in the name."""
    name = (
        f"scratch_revit_EMB_{dims.embed}_{args.epochs}_lr_{args.lr}_a_{args.distillation_alpha}"
        f"_T_{args.distillation_tau}"
    )
    return Path(args.output_dir) / (args.run_name or name + ("" if args.kl_loss_coeff else "_CNN_only"))


def _dims(args: argparse.Namespace, full: FullModel) -> ViTDims:
    tokens = full.dims.blocks[0].tokens
    if not args.dims:
        return redistribute(args.EMB, tokens, args.rule)
    dims = read_dims(args.dims)
    if odd := [b.tokens for b in dims.blocks if b.tokens != tokens]:
        raise ValueError(f"--dims {args.dims} has blocks of {odd[0]} tokens, the model has {tokens}")
    return dims


def check_args(args: argparse.Namespace) -> Run:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    if not args.scratch:
        problems.add("--scratch is required: ReViT is trained from random weights")
    if not args.output_dir:
        problems.add("--output_dir is required")
    device = problems.attempt(start_processes, args)
    full = problems.attempt(read_full_model, Source.of(args))
    problems.raise_if_any()
    dims = problems.attempt(_dims, args, full)
    problems.raise_if_any()
    folder = run_folder(args, dims)
    preparation = problems.attempt(settle, args, full, resumed=resuming.find(args, folder, CHECKPOINT))
    problems.raise_if_any()
    data = problems.attempt(load_data, args, preparation)
    problems.raise_if_any()
    full = full.for_data(data)
    model = full.arch.build(dims, **drop_rate_kwargs(args))
    run = Run(device, full, data, model, origin=full.path)
    if args.kl_loss_coeff:
        run.teacher = problems.attempt(load_full, full, data, device)
    run.cnn = problems.attempt(load_cnn, Teacher.of(args), data, device)
    run.resumed = problems.attempt(read_resumed, args, run, folder)
    problems.raise_if_any()
    run.folder = problems.attempt(make_folder, folder)
    problems.raise_if_any()
    return run


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    run = check_args(args)
    metrics = train(args, run)
    if is_main():
        conclude(args, run, metrics["acc1"], effort)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
