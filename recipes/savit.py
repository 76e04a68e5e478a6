"""SAViT's parts between its command line and its mathematics: which model, whether the budget can be met, what goes."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loading import shards
from models import Arch, Masks, ViTDims
from pruning import savit
from pruning.gates import COMPONENTS, axes_of_component
from pruning.interaction import without_second_derivative
from pruning.macs_search import Problem
from pruning.savit import Importance
from recipes import importance_files, savit_scoring
from runtime.errors import Problems, RunFailed
from training import results, resuming
from training.full_model import FullModel, read_full_model
from training.parts import Data
from training.sources import Source

DEFAULT_MODEL = "deit_base_patch16_224"


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


def check_flags(args: Any, problems: Problems) -> None:
    """What flags need of each other."""
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


def read_full(args: Any) -> FullModel:
    """The full-size model, and the narrower checkpoint that pruning starts from, where it is one. Raises ValueError."""
    weights = args.finetune or args.initial_checkpoint
    return read_full_model(replace(Source.of(args), weights=weights, default=DEFAULT_MODEL), narrower=True)


def build(full: FullModel) -> nn.Module:
    """The frozen model to prune. Raises ValueError for a narrower one that knows other classes than the data has."""
    model = full.build().requires_grad_(False).eval()
    if model.num_classes != (classes := full.classes):
        raise ValueError(f"{full.start.path} has {model.num_classes} classes, the data has {classes}")
    full.check_names()
    return model


def _floor_share(args: Any) -> float | None:
    return args.pruning_floor if args.pruning_protect else None


def check_target(args: Any, model: nn.Module) -> None:
    """Raises ValueError for a component that the model lacks, or a target that the floors make unreachable."""
    dims, components = model.dims, args.pruning_layers
    if lacking := [c for c in components if not axes_of_component(dims, c)]:
        raise ValueError(f"--pruning_layers: the model has no {', '.join(lacking)} to prune")
    lowest = savit.floor_dims(dims, components, _floor_share(args), args.width_multiple)
    arch = Arch.of_model(model)
    least = arch.macs(lowest)
    if budget(args, model) < least:
        most = math.floor(1e4 * (1 - least / arch.macs(dims))) / 1e4
        raise ValueError(
            f"--pruning_flops_percentage {args.pruning_flops_percentage} cannot be reached: removing "
            f"{', '.join(components)} down to the floors takes away at most {most:.4f}"
        )


def check_scoring(args: Any, model: nn.Module, images: int) -> None:
    """Raises ValueError for too little data, or a layer that has no second derivative."""
    shards.check_indexed(args, "the pruning pass")
    savit_scoring.batches_needed(args, images)
    if args.need_hessian and args.hessian_form == "exact":
        sample = torch.randn(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        if layer := without_second_derivative(model, sample):
            raise ValueError(f"--need_hessian: no second derivative in layer {layer}; --hessian_form finite needs none")


def start_anew(args: Any, setup: Setup) -> None:
    """Rename what an earlier run left in the folder; its importance files too, where this run writes its own."""
    scores = setup.importance is None and not args.pruning_silent
    own = (importance_files.TENSORS, importance_files.DESCRIPTION) if scores else ()
    resuming.start_anew(setup.folder, resuming.PRUNED[0], (*resuming.PRUNED, *own))


def budget(args: Any, model: nn.Module) -> int:
    """MACs of one image that may stay."""
    return int((1 - args.pruning_flops_percentage) * Arch.of_model(model).macs(model.dims))


def select(args: Any, model: nn.Module, importance: Importance, device: torch.device) -> tuple[Masks, Problem]:
    """What goes. Raises RunFailed where the search finds nothing."""
    dims = model.dims
    norm = args.pruning_normalize_by_layer_type if args.pruning_normalize_by_layer else None
    share, multiple = _floor_share(args), args.width_multiple
    rankings = [savit.rank(importance, c, dims, share, norm, multiple) for c in args.pruning_layers]
    objective = savit.objective(
        importance,
        rankings,
        dims,
        formula=args.hessian_formula,
        linear=args.linear_term,
        hessian_embed=args.hessian_embed,
    )
    formula = Arch.of_model(model).macs_formula(dims)
    problem = Problem(formula, dims, rankings, objective, budget(args, model))
    try:
        return savit.choose(problem, dims, args.search, args.seed, device), problem
    except ValueError as error:
        raise RunFailed(str(error)) from None


def conclude(args: Any, report: results.Report, start: ViTDims, dims: ViTDims, top1: tuple[float, float]) -> None:
    """The results; a start that was pruned already, or is lean, has no stage of its own."""
    stage = report.conclude("pruned", dims, top1[1], earlier=report.dense(start, top1[0]))
    following = (
        f"main_savit_deploy.py --masked_model {shlex.quote(str(report.folder / 'pruned_checkpoint.pth'))} "
        f"{results.data_flags(args)} --output_dir {shlex.quote(str(report.folder / 'finetuned'))}"
    )
    report.say("pruned_checkpoint.pth", stage, following)
