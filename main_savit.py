"""SAViT: prune heads, MLP and embedding (QK and V widths too) together, down to a share of the model's MACs."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import options
from engine import evaluate
from files import checkpoint
from loading import shards
from models import Masks, ViTDims, compact, macs
from models.compact import difference
from models.count import MacsFormula
from models.pretrained import from_checkpoint
from models.vit import TokenLogits
from pruning import savit
from pruning.gates import COMPONENTS, axes_of_component
from pruning.interaction import FORMS, without_second_derivative
from pruning.macs_search import SEARCHES, Problem
from pruning.savit import FORMULAS, METHODS, Importance
from recipes import importance_files, savit_log
from recipes import savit as recipe
from runtime.console import say, say_result, warn
from runtime.errors import Problems, RunFailed
from runtime.folders import make_folder, write_json
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from runtime.seeds import rng_state
from training import provenance, results
from training.full_model import FullModel, check_plain, is_dense, load_cnn_teacher, read_full_model, structural_kwargs
from training.parts import Data, load_data, make_precision

DEFAULT_MODEL = "deit_base_patch16_224"


def components(text: str) -> tuple[str, ...]:
    """SAViT's --pruning_layers: 3 for heads, mlp and embed (0, 1, 2), or a list of names or numbers."""
    if text == "3":
        return COMPONENTS[:3]
    names = [COMPONENTS[int(word)] if word in ("0", "1", "2") else word for word in text.split(",")]
    if odd := [name for name in names if name not in COMPONENTS]:
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is no component: 0 to 3, or a list of {', '.join(COMPONENTS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names a component twice")
    return tuple(name for name in COMPONENTS if name in names)


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python main_savit.py --finetune dense.pth --data-set DIGITS --need_hessian "
        "--pruning_flops_percentage 0.5\n  --output_dir runs/savit",
    )
    options.add_model_args(parser, drops=False)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_cnn_args(parser)
    options.add_tau_arg(parser, "of soft CNN distillation")
    options.add_run_args(parser, "the run's folder; required", trains=False)
    _add_pruning_args(parser)
    group = parser.add_argument_group("accepted, no effect")
    group.add_argument("--epochs", type=int, default=1, help="nothing is trained here (default: 1)")
    group.add_argument("--finetune_op", type=int, choices=(2,), default=2, help="2 prunes and ends (default: 2)")
    group.add_argument("--pruning_per_iteration", type=int, default=100, help="one-shot pruning only (default: 100)")
    group.add_argument(
        "--pruning_flops_threshold",
        type=float,
        default=0.001,
        help="the budget is met to the last unit (default: 0.001)",
    )
    return parser


def _add_pruning_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--finetune",
        metavar="FILE",
        default="",
        help="weights to start from, a pruned checkpoint included (default: --initial-checkpoint)",
    )
    group.add_argument(
        "--pruning_flops_percentage",
        metavar="SHARE",
        type=float,
        default=0.5,
        help="share of the starting model's MACs to remove, in (0, 1) (default: 0.5)",
    )
    group.add_argument(
        "--pruning_layers",
        metavar="COMPONENTS",
        type=components,
        default=COMPONENTS[:3],
        help="0 heads, 1 mlp, 2 embed, 3 all three; or a list such as heads,mlp,embed,qk,v (default: 3)",
    )
    group.add_argument(
        "--pruning_method",
        type=int,
        choices=tuple(METHODS),
        default=2,
        help="scores from 2 the batches' or 3 the images' gradients, squared (default: 2)",
    )
    group.add_argument(
        "--pruning_feed_percent",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="share of the training batches to score on, in (0, 1] (default: 0.1)",
    )
    group.add_argument(
        "--pruning_protect",
        metavar="BOOL",
        type=options.boolean,
        default=True,
        help="keep the best units of every block and component, up to --pruning_floor (default: True)",
    )
    group.add_argument(
        "--pruning_floor",
        metavar="SHARE",
        type=float,
        default=0.05,
        help="share of them to keep, at least one unit, in [0, 1) (default: 0.05)",
    )
    group.add_argument(
        "--pruning_normalize_by_layer",
        action="store_true",
        help="divide the scores of every block and component by their norm (default: off)",
    )
    group.add_argument(
        "--pruning_normalize_by_layer_type",
        type=int,
        choices=(1, 2),
        default=2,
        help="which: 1 for L1, 2 for L2 (default: 2)",
    )
    group.add_argument(
        "--pruning_pickle_from",
        metavar="DIR",
        default="",
        help="importance files of an earlier run, in place of scoring (default: none)",
    )
    group.add_argument("--pruning_silent", action="store_true", help="write no importance files (default: off)")
    group.add_argument(
        "--need_hessian",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="interactions between components decide the ratios (default: off, or as the files of "
        "--pruning_pickle_from have them); without, the units' scores alone",
    )
    group.add_argument(
        "--hessian_formula",
        choices=FORMULAS,
        default="joint",
        help="joint weighs units by importance, paper takes them as a random sample, published has "
        "that code's weights (default: joint)",
    )
    group.add_argument(
        "--hessian_embed",
        metavar="F",
        type=float,
        default=6.0,
        help="divides the embedding's interactions, of the published formula (default: 6)",
    )
    group.add_argument(
        "--hessian_form",
        choices=FORMS,
        default="exact",
        help="second derivatives, or finite differences in half the memory (default: exact)",
    )
    group.add_argument(
        "--hessian_error",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="relative standard error of every interaction to stop measuring at (default: 0.1)",
    )
    group.add_argument(
        "--linear_term",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with interactions, the units' own gradients count too (default: off)",
    )
    group.add_argument(
        "--search",
        choices=tuple(SEARCHES),
        default="grid",
        help="deterministic grid, or the published evolutionary search (default: grid)",
    )


@dataclass
class Setup:
    """What the arguments named, loaded and checked; model is the one to prune."""

    device: torch.device
    full: FullModel
    data: Data
    model: nn.Module
    cnn: nn.Module | None = None
    importance: Importance | None = None
    folder: Path = Path()


def _check_flags(args: argparse.Namespace, problems: Problems) -> None:
    if not 0 < args.pruning_flops_percentage < 1:
        problems.add(f"--pruning_flops_percentage must be in (0, 1), not {args.pruning_flops_percentage}")
    if not args.output_dir:
        problems.add("--output_dir is required")
    if args.finetune and (args.initial_checkpoint or args.pretrained):
        problems.add("--finetune names the weights: without --initial-checkpoint and --pretrained")
    if not (args.finetune or args.initial_checkpoint or args.pretrained):
        problems.add("no weights to prune: give --finetune FILE, or --pretrained")
    known = COMPONENTS[:3]
    if args.hessian_formula == "published" and (odd := [c for c in args.pruning_layers if c not in known]):
        problems.add(f"--hessian_formula published has no weight for {', '.join(odd)}")


def _start(args: argparse.Namespace) -> tuple[FullModel, dict[str, Any] | None]:
    """The full-size model, and the narrower checkpoint that pruning starts from, None for full-width weights."""
    path = args.finetune or args.initial_checkpoint
    content = checkpoint.read(path) if path else {}
    if "format" in content:
        content = checkpoint.load_model(path)
        arch, origin = content["arch"], (content["args"] or {}).get("initial_checkpoint", "")
        if args.model not in (None, arch["name"]):
            raise ValueError(f"--model is {args.model} but {path} holds {arch['name']}")
        check_plain(arch["name"])
        full = FullModel(arch["name"], structural_kwargs(arch["kwargs"]), origin)
        if content["dims"] != full.dims.to_dict():
            return full, content
    named = argparse.Namespace(**vars(args) | dict(initial_checkpoint=path))
    if named.model is None and not content.get("arch"):
        named.model = DEFAULT_MODEL
    return read_full_model(named), None


def _model(full: FullModel, parent: dict[str, Any] | None, path: str) -> nn.Module:
    if parent is None:
        return full.build().requires_grad_(False).eval()
    model = from_checkpoint(parent, path)
    if model.num_classes != full.kwargs["num_classes"]:
        raise ValueError(f"{path} has {model.num_classes} classes, the data has {full.kwargs['num_classes']}")
    return model.requires_grad_(False).eval()


def floor_share(args: argparse.Namespace) -> float | None:
    return args.pruning_floor if args.pruning_protect else None


def _check_target(args: argparse.Namespace, model: nn.Module) -> None:
    """Raises ValueError for a component that the model lacks, or a target that the floors make unreachable."""
    dims, components = model.dims, args.pruning_layers
    if lacking := [c for c in components if not axes_of_component(dims, c)]:
        raise ValueError(f"--pruning_layers: the model has no {', '.join(lacking)} to prune")
    lowest = savit.floor_dims(dims, components, floor_share(args))
    least = macs(model.arch, lowest, **model.arch_kwargs)
    if budget(args, model) < least:
        most = 1 - least / macs(model.arch, dims, **model.arch_kwargs)
        most = math.floor(1e4 * most) / 1e4
        raise ValueError(
            f"--pruning_flops_percentage {args.pruning_flops_percentage} cannot be reached: removing "
            f"{', '.join(components)} down to the floors takes away at most {most:.4f}"
        )


def _check_scoring(args: argparse.Namespace, model: nn.Module, images: int) -> None:
    """Raises ValueError for too little data, or a layer that has no second derivative."""
    shards.check_indexed(args, "the pruning pass")
    recipe.batches_needed(args, images)
    if args.need_hessian and args.hessian_form == "exact":
        sample = torch.randn(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        if layer := without_second_derivative(model, sample):
            raise ValueError(f"--need_hessian: no second derivative in layer {layer}; --hessian_form finite needs none")


def check_args(args: argparse.Namespace) -> Setup:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    _check_flags(args, problems)
    device = problems.attempt(start_processes, args)
    start = problems.attempt(_start, args)
    problems.raise_if_any()
    full, parent = start
    data = problems.attempt(load_data, args, full, train=not args.pruning_pickle_from)
    problems.raise_if_any()
    model = problems.attempt(_model, full, parent, args.finetune or args.initial_checkpoint)
    cnn = problems.attempt(load_cnn_teacher, args, data.classes, device)
    problems.raise_if_any()
    setup = Setup(device, full, data, model, cnn)
    problems.attempt(_check_target, args, model)
    if args.pruning_pickle_from:
        setup.importance = problems.attempt(importance_files.read_for, args, model)
    else:
        problems.attempt(_check_scoring, args, model, len(data.train.dataset))
    problems.raise_if_any()
    setup.folder = problems.attempt(make_folder, Path(args.output_dir))
    problems.raise_if_any()
    model.to(device)
    return setup


def budget(args: argparse.Namespace, model: nn.Module) -> int:
    """MACs of one image that may stay."""
    return int((1 - args.pruning_flops_percentage) * macs(model.arch, model.dims, **model.arch_kwargs))


def select(
    args: argparse.Namespace, model: nn.Module, importance: Importance, device: torch.device
) -> tuple[Masks, Problem]:
    """What goes. Raises RunFailed where the search finds nothing."""
    dims = model.dims
    norm = args.pruning_normalize_by_layer_type if args.pruning_normalize_by_layer else None
    rankings = [savit.rank(importance, c, dims, floor_share(args), norm) for c in args.pruning_layers]
    objective = savit.objective(
        importance,
        rankings,
        dims,
        formula=args.hessian_formula,
        linear=args.linear_term,
        hessian_embed=args.hessian_embed,
    )
    formula = MacsFormula.of(model.arch, dims, **model.arch_kwargs)
    problem = Problem(formula, dims, rankings, objective, budget(args, model))
    try:
        return savit.choose(problem, dims, args.search, args.seed, device), problem
    except ValueError as error:
        raise RunFailed(str(error)) from None


def finish(args: argparse.Namespace, setup: Setup, start: ViTDims, dims: ViTDims, top1: tuple[float, float]) -> None:
    """summary.json and dims.json; a start that was pruned already, or is lean, has no stage of its own."""
    conditions = results.Conditions(args.batch_size)
    common = dict(conditions=conditions, device=setup.device, predicted=None)
    summary = {}
    if is_dense(setup.full, start):
        summary["dense"] = results.stage(setup.full, start, top1[0], measured=1.0, **common | dict(predicted=1.0))
    measured = results.measured_ratio(setup.full, dims, conditions, setup.device)
    summary["pruned"] = results.stage(setup.full, dims, top1[1], measured=measured, **common)
    write_json(setup.folder / "dims.json", dims.to_dict())
    write_json(setup.folder / "summary.json", summary)
    quoted = shlex.quote(str(setup.folder / "pruned_checkpoint.pth"))
    results.say_where(
        setup.folder,
        f"main_savit_deploy.py --masked_model {quoted} {results.data_flags(args)} "
        f"--output_dir {shlex.quote(str(setup.folder / 'finetuned'))}",
    )
    say_result(results.result_line(setup.folder / "pruned_checkpoint.pth", summary["pruned"]))


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- parts
    setup = check_args(args)
    model, start = setup.model, setup.model.dims
    precision = make_precision(args, setup.device)
    before = evaluate(TokenLogits(model), setup.data.val, precision, args.dist_eval)["acc1"]
    say(f"before: top-1 {before:.2f}, {savit_log.complexity(model.arch, start, model.arch_kwargs)}")
    provenance.record(args, setup.folder, setup.device, setup.data, {})

    # ---------------------------------------------------------------- score
    importance = setup.importance
    if importance is None:
        importance, data = recipe.measure(args, model, setup.data.train.dataset.dataset, setup.cnn, setup.device)
        if is_main() and not args.pruning_silent:
            importance_files.save(setup.folder, importance, importance_files.model_record(model), data)
    if importance.hessian is None:
        warn("no interactions (--need_hessian): the units' scores alone decide how much of each component goes")

    # ---------------------------------------------------------------- prune
    masks, problem = select(args, model, importance, setup.device)
    masks.install_(model)
    small = compact(model, masks).eval()
    if not (error := difference(model, small)) <= 1e-3:
        raise RunFailed(f"the compact model differs from the masked one by {error:.1e}: please report this")
    after = evaluate(TokenLogits(small), setup.data.val, precision, args.dist_eval)["acc1"]

    # ---------------------------------------------------------------- result
    if not is_main():
        return
    savit_log.write(setup.folder / "logs", model, masks, problem)
    say(savit_log.lines(model, masks, problem)[-1])
    dims = masks.dims
    checkpoint.save(
        setup.folder / "pruned_checkpoint.pth",
        arch=setup.full.record,
        dims=dims.to_dict(),
        dim=dims.to_dim(),
        masks=masks.state_dict(),
        model=model.state_dict(),
        rng=rng_state(),
        metrics=dict(acc1=after),
        args=vars(args) | dict(initial_checkpoint=setup.full.path),
    )
    finish(args, setup, start, dims, (before, after))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
