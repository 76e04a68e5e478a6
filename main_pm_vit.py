"""Prune and Merge: compress the tokens of every block, finetune, evaluate, and measure the speed."""
from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import options
import results
import resuming
import training
from engine import evaluate, progress_bar
from finetuning import CHECKPOINT, Run, read_resumed, train
from latency.measure import device_name
from latency.whole import measured_ratios
from loaders import start_epoch
from models import ViTDims, macs, params, skeleton
from models.pretrained import from_checkpoint, read_initial
from models.vit import ModelError, TokenLogits
from pruning import pm_vit
from utils import Problems, append_log, is_main, make_folder, run_script, say, write_json

ALIASES = {
    f"{name}_{size}_patch16_224": f"deit_{size}_patch16_224"
    for name, size in itertools.product(("tmvit", "tmit"), ("tiny", "small", "base"))
}


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
    options.add_run_args(parser, "folder of what --prune or finetuning writes")
    _add_token_args(parser)
    parser.set_defaults(
        model_ema=False, drop_path=0.0, aa="", lr=1e-4, min_lr=1e-6, warmup_lr=1e-5, epochs=100, start_epoch=None,
        teacher_model=None,
    )  # fmt: skip
    return parser


def _add_token_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens")
    add = group.add_argument
    add("--resume", metavar="FILE", default="",
        help="the model: dense weights or any checkpoint; a finetuning run's own ft_checkpoint.pth in --output_dir "
             "goes on where it was broken off (default: --initial-checkpoint or --pretrained)")  # fmt: skip
    add("--prune", action="store_true", help="score the patches and compress the model (default: off, finetune)")
    add("--eval", action="store_true", help="print counts and accuracy of a compressed model (default: off)")
    add("--speed-only", action="store_true",
        help="print images per second of the dense and the compressed model; needs no data (default: off)")
    add("--prune_mode", choices=pm_vit.MODES, default="attn",
        help="scores: attn gradient x attention; head the same without cancellation between heads; head_entropy "
             "attention received, no labels; random; seq evenly spread, no data; clus attn on a compressed model, "
             "whose skipped patches stay skipped (default: attn)")  # fmt: skip
    add("--prune_iter", metavar="N", type=int, default=250, help="batches to score on, 0 for an epoch (default: 250)")
    add("--prune_rate", metavar="F", type=float, default=0.1, help="share of patches that skip a block (default: 0.1)")
    add("--keep_rate", metavar="F", type=float, default=0.6, help="share of patches that stay tokens (default: 0.6)")
    add("--merge_list", metavar="L", type=int, nargs="+", default=None, help="blocks to compress (default: all)")
    add("--merge", choices=tuple(pm_vit.ASSIGN), default="grid",
        help="where merged patches go: the nearest centre on the grid, or along the row as published (default: grid)")
    add("--merge_entries", choices=("mean", "published"), default="mean",
        help="entries of the merge matrix: rows sum to 1, or the centre's is 1 (default: mean)")
    add("--shortcut", choices=("merged", "skipped"), default="merged",
        help="which patches keep their own values: also merged ones, as far as they differ from their group, or "
             "skipped ones alone as published (default: merged)")  # fmt: skip
    add("--per_image", action="store_true", help="absolute scores of every image, not of a batch's mean (default: off)")
    add("--depth_factor", metavar="F", type=float, default=pm_vit.DEPTH_FACTOR,
        help=f"scores of block l are multiplied by 1 - F l (default: {pm_vit.DEPTH_FACTOR})")
    add("--dense_merge", action="store_true",
        help="store and train both matrices in full, as published, with --shortcut skipped (default: off)")
    add("--freeze_param", action="store_true", help="finetune the token matrices alone (default: off)")
    add("--freeze_matrix", action="store_true", help="finetune everything but the token matrices (default: off)")
    add("--final_finetune", metavar="N", type=int, dest="epochs", help="epochs of finetuning (default: 100)")


@dataclass
class Model:
    """The model that --resume names, or the dense one, and where its dense weights are."""

    full: training.FullModel
    content: dict[str, Any] | None  # of a checkpoint of this project
    origin: str = ""

    def build(self, args: argparse.Namespace) -> nn.Module:
        drops = training.drop_rates(args)
        if self.content is None:
            return self.full.build(**drops)
        return from_checkpoint(self.content, args.resume, **drops)

    def check_classes(self, args: argparse.Namespace, classes: int) -> None:
        if self.content is None:
            return self.full.check_classifier()
        if (own := self.content["arch"]["kwargs"].get("num_classes", 1000)) != classes:
            raise ValueError(f"{args.resume} has {own} classes, the data has {classes}")

    @property
    def dims(self) -> ViTDims:
        return training.dims_of(self.full) if self.content is None else ViTDims.from_dict(self.content["dims"])


def read_model(args: argparse.Namespace) -> Model:
    """Raises ValueError, whatever is wrong with the files."""
    name = ALIASES.get(args.model, args.model)
    content = checkpoint.read(args.resume) if args.resume else None
    if content is None or "format" not in content:
        source = args.resume or args.initial_checkpoint
        full = training.full_model(argparse.Namespace(**vars(args) | dict(model=name, initial_checkpoint=source)))
        return Model(full, None, full.path)
    content = checkpoint.load(args.resume)
    arch, kwargs = content["arch"]["name"], content["arch"]["kwargs"]
    if name not in (None, arch):
        raise ValueError(f"--model is {args.model} but {args.resume} holds {arch}")
    size = skeleton(arch, **kwargs).patch_embed.img_size[0]
    if args.input_size not in (None, size):
        raise ValueError(f"--input-size is {args.input_size} but {args.resume} is for images of {size}")
    full = training.full_model(argparse.Namespace(
        model=arch, model_kwargs=training.structural(kwargs) | args.model_kwargs, input_size=None,
        initial_checkpoint="", pretrained=False,
    ))  # fmt: skip
    full.kwargs["num_classes"] = kwargs.get("num_classes", skeleton(arch, **kwargs).num_classes)
    return Model(full, content, content["args"].get("initial_checkpoint", ""))


def is_compressed(full: training.FullModel, dims: ViTDims) -> bool:
    return any(b.tokens < training.dims_of(full).blocks[0].tokens for b in dims.blocks)


def merge_list(args: argparse.Namespace, dims: ViTDims) -> tuple[int, ...]:
    """The blocks to compress: those asked for, or all that have attention to score by. Raises ValueError."""
    scored = args.prune_mode not in ("random", "seq")
    if args.merge_list is None:
        return tuple(i for i, b in enumerate(dims.blocks) if b.heads or not scored)
    found = args.merge_list
    if sorted(set(found)) != found or found[0] < 0:
        raise ValueError(f"--merge_list must be block indices in ascending order, not {' '.join(map(str, found))}")
    if found[-1] >= len(dims.blocks):
        raise ValueError(f"--merge_list names block {found[-1]}, the model has blocks 0 to {len(dims.blocks) - 1}")
    if odd := [i for i in found if scored and not dims.blocks[i].heads]:
        raise ValueError(f"--merge_list: block {odd[0]} has no attention to score by; --prune_mode seq needs none")
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------- prune
def scoring_batches(loader: Any, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches, over as many epochs as they take; 0 for one epoch."""
    count = count or len(loader)
    for epoch in itertools.count():
        start_epoch(loader, epoch)
        yield from itertools.islice(loader, count - epoch * len(loader))
        if (epoch + 1) * len(loader) >= count:
            return


def scores(args: argparse.Namespace, run: Run, layers: Sequence[int]) -> Tensor:
    """Of every patch of `layers`: (L, N) on the CPU."""
    model, (rows, columns) = run.model, run.model.patch_embed.grid_size
    if args.prune_mode == "seq":
        return pm_vit.spread(layers, (rows, columns))
    if args.prune_mode == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return torch.rand(len(layers), rows * columns, generator=generator, dtype=torch.float64)
    precision, logits = training.precision(args, run.device), TokenLogits(model)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        with precision.autocast():
            cls, dist = logits(images)
        return F.cross_entropy((cls + dist).float() / 2, targets)

    batches = scoring_batches(run.data.train, args.prune_iter)
    batches = progress_bar(batches, args.prune_iter or len(run.data.train), "score")
    mode = "attn" if args.prune_mode == "clus" else args.prune_mode
    return pm_vit.measured(model, layers, batches, loss, mode, args.per_image).cpu()


def structure(args: argparse.Namespace, run: Run) -> pm_vit.Structure:
    """What becomes of every patch. Raises ValueError (CompressionError) for rates that leave nothing."""
    layers = merge_list(args, run.model.dims)
    found = scores(args, run, layers)
    passing = pm_vit.skipped_patches(run.model, layers) if args.prune_mode == "clus" else None
    if args.prune_mode not in ("random", "seq"):
        return pm_vit.chosen(pm_vit.comparable(found, layers, args.depth_factor), layers, args.prune_rate,
                             args.keep_rate, passing)  # fmt: skip
    chosen = pm_vit.chosen(found, layers, args.prune_rate, args.keep_rate)
    return replace(chosen, weights=torch.ones_like(chosen.weights))  # no patch matters more than another


def prune(args: argparse.Namespace, run: Run) -> None:
    model = run.model.to(run.device).eval()
    found = structure(args, run)
    merging = pm_vit.Merging(args.merge, args.merge_entries == "published", args.shortcut == "merged")
    small = pm_vit.compressed(model, found, merging, args.dense_merge)
    precision = training.precision(args, run.device)
    test = partial(evaluate, loader=run.data.val, precision=precision, sharded=args.dist_eval)
    before, after = (test(m)["acc1"] for m in (model, small))
    if not is_main():
        return
    path = run.folder / "pruned_checkpoint.pth"
    checkpoint.save(path, arch=dict(name=small.arch, kwargs=training.structural(small.arch_kwargs) | run.full.kwargs),
                    dims=small.dims.to_dict(), dim=small.dims.to_dim(), model=small.state_dict(),
                    metrics=dict(acc1=after), args=resuming.saved_args(args, run.origin))  # fmt: skip
    write_json(run.folder / "args.json", vars(args))
    append_log(run.folder, dense_acc1=before, test_acc1=after, tokens=[b.tokens for b in small.dims.blocks])
    counts = " ".join(str(b.tokens) for b in small.dims.blocks)
    say(f"tokens per block {counts} of {found.centres.shape[1] + model.num_prefix_tokens}, "
        f"patches skipped {' '.join(map(str, found.skipped.sum(1).tolist()))}; top-1 {before:.2f} before")  # fmt: skip
    summarise(args, run, path, model.dims, dense=before)
    summarise(args, run, path, small.dims, pruned=after)
    say(results.result_line(path, json.loads((run.folder / "summary.json").read_text())["pruned"]))


def summarise(args: argparse.Namespace, run: Run, path: Path, dims: ViTDims, **top1: float) -> None:
    """Add a stage to summary.json beside a checkpoint; the earlier stages come from --resume's folder."""
    here = path.parent / "summary.json"
    earlier = here if here.exists() else Path(args.resume).parent / "summary.json"
    summary = json.loads(earlier.read_text()) if earlier.exists() else {}
    conditions = results.Conditions(args.batch_size, compiled=args.compile)
    ((name, accuracy),) = top1.items()
    dense = dims == training.dims_of(run.full)
    measured = 1.0 if dense else results.measured_ratio(run.full, dims, conditions, run.device)
    summary[name] = results.stage(run.full, dims, accuracy, predicted=1.0 if dense else None, measured=measured,
                                  conditions=conditions, device=run.device)  # fmt: skip
    write_json(path.parent / "dims.json", dims.to_dict())
    write_json(here, summary)


# ------------------------------------------------------------------------------------------------------------ finetune
class MeanLogits(nn.Module):
    """One set of logits, (B, classes), of a model that gives those of two tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return sum(self.model(images)) / 2


def with_losses(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the shared loss's own weights.

    Published: base + alpha x distillation, not DeiT's mix. `soft` is the KL at temperature tau, times tau^2, over batch
    x 1000 classes; `hard` the cross-entropy with the teacher's label.
    """
    alpha, kind = args.distillation_alpha, args.distillation_type
    if kind == "soft":
        own = dict(kl_loss_coeff=alpha * args.distillation_tau**2, original_loss_coeff=1.0, distillation_type="none")
    elif kind == "hard":  # (1 + alpha) ((1 - a) base + a hard)
        own = dict(kl_loss_coeff=0.0, original_loss_coeff=1 + alpha, distillation_alpha=alpha / (1 + alpha))
    else:
        own = dict(kl_loss_coeff=0.0, original_loss_coeff=1.0)
    return argparse.Namespace(**vars(args) | own)


def teacher(args: argparse.Namespace, run: Run) -> nn.Module:
    """The dense model to distil from: --teacher-path, else what was compressed. Raises ValueError."""
    path, name = args.teacher_path or run.origin, ALIASES.get(args.teacher_model, args.teacher_model)
    if not path:
        raise ValueError("--distillation-type: no dense model to distil from: give --teacher-path FILE")
    arch, _, _ = read_initial(path)
    name = name or arch or run.full.arch
    own = training.structural(run.full.kwargs) if not arch and name == run.full.arch else {}
    try:
        skeleton(name)
    except ModelError:
        wanted = argparse.Namespace(distillation_type="soft", teacher_model=name, teacher_path=path)
        return training.frozen(training.cnn_teacher(wanted, run.data.classes, run.device), run.device)
    full = training.full_model(argparse.Namespace(
        model=name, model_kwargs=own, input_size=None, initial_checkpoint=path, pretrained=False,
    ))  # fmt: skip
    full.kwargs["num_classes"] = run.data.classes
    return training.full_teacher(argparse.Namespace(kl_loss_coeff=1.0), full, run.device)


def freeze_(args: argparse.Namespace, model: nn.Module) -> None:
    """--freeze_param and --freeze_matrix, before there is an optimizer."""
    for name, parameter in model.named_parameters():
        matrix = ".tokens." in name
        parameter.requires_grad_(not (args.freeze_matrix if matrix else args.freeze_param))


def finetune(args: argparse.Namespace, run: Run) -> None:
    freeze_(args, run.model)
    metrics = train(with_losses(args), run)
    if is_main():
        path = run.folder / CHECKPOINT
        summarise(args, run, path, run.model.dims, finetuned=metrics["acc1"])
        say(results.result_line(path, json.loads((run.folder / "summary.json").read_text())["finetuned"]))


# ----------------------------------------------------------------------------------------------------- eval and speed
def evaluated(args: argparse.Namespace, run: Run) -> None:
    result = evaluate(run.model.to(run.device), run.data.val, training.precision(args, run.device), args.dist_eval)
    counted = (run.model.arch, run.model.dims)
    kwargs = run.model.arch_kwargs
    say(f"{args.resume}: top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f} on {int(result['samples'])} images, "
        f"{macs(*counted, **kwargs) / 1e9:.3f} GMACs, {params(*counted, **kwargs):,} parameters")


def speed(args: argparse.Namespace, full: training.FullModel, dims: ViTDims, device: torch.device) -> None:
    """Images per second of the dense and of the compressed model, interleaved; both with fused attention."""
    ratios, seconds = measured_ratios(full.arch, full.kwargs, [dims], args.batch_size, device, compiled=args.compile)
    dense = args.batch_size / seconds
    say(f"{full.arch}, batch {args.batch_size}, fp32, {device_name(device)}: dense {dense:,.1f} images/s, "
        f"compressed {dense / ratios[0]:,.1f} images/s, {1 / ratios[0]:.2f}x")  # fmt: skip


def uniform(dims: ViTDims, keep_rate: float, prefix: int) -> ViTDims:
    """The same share of patches in every block, for --speed-only without a checkpoint."""
    blocks = [replace(b, tokens=prefix + max(1, int((b.tokens - prefix) * keep_rate))) for b in dims.blocks]
    return ViTDims(dims.embed, tuple(blocks))


# ---------------------------------------------------------------------------------------------------------- arguments
def check_flags(args: argparse.Namespace, problems: Problems) -> None:
    """Complaints about flags and how they go together."""
    options.check_values(with_losses(args), problems)
    if sum((args.prune, args.eval, args.speed_only)) > 1:
        problems.add("--prune, --eval and --speed-only are three things to do: give one")
    if not (args.resume or args.initial_checkpoint or args.pretrained or args.speed_only):
        problems.add("--resume FILE is required: dense weights, or a checkpoint")
    if not (args.output_dir or args.eval or args.speed_only):
        problems.add("--output_dir is required")
    if args.prune_rate + args.keep_rate > 1:
        problems.add(f"--prune_rate {args.prune_rate:g} and --keep_rate {args.keep_rate:g} sum to more than 1")
    if args.dense_merge and args.shortcut != "skipped":
        problems.add("--dense_merge goes with --shortcut skipped")
    if args.freeze_param and args.freeze_matrix:
        problems.add("--freeze_param and --freeze_matrix leave nothing to train")


def check_model(args: argparse.Namespace, model: Model) -> None:
    """Raises ValueError where --resume does not hold what is to be done with it."""
    compressed = is_compressed(model.full, model.dims)
    if (args.eval or not (args.prune or args.speed_only)) and not compressed:
        what = "--eval" if args.eval else "finetuning"
        raise ValueError(f"{what}: {args.resume or model.full.arch} has no token structure; compress it with --prune")
    if args.prune and args.prune_mode == "clus" and not compressed:
        raise ValueError("--prune_mode clus compresses a compressed model further; --resume holds none")
    if args.prune:
        merge_list(args, model.dims)


def check_args(args: argparse.Namespace) -> Run:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    check_flags(args, problems)
    device = problems.attempt(training.start, args)
    problems.raise_if_any()
    model = problems.attempt(read_model, args)
    problems.raise_if_any()
    problems.attempt(check_model, args, model)
    problems.raise_if_any()
    run = Run(device, model.full, training.Data(None, None, 0), None, origin=model.origin)
    if args.speed_only:
        run.model = model
        return run
    run.data = problems.attempt(training.load_data, args, model.full, train=not args.eval)
    problems.raise_if_any()
    problems.attempt(model.check_classes, args, run.data.classes)
    problems.raise_if_any()
    run.model = problems.attempt(model.build, args)
    problems.raise_if_any()
    if args.eval:
        return run
    run.folder = problems.attempt(make_folder, Path(args.output_dir))
    if not args.prune:
        _check_finetuning(args, run, problems)
    problems.raise_if_any()
    return run


def _check_finetuning(args: argparse.Namespace, run: Run, problems: Problems) -> None:
    if args.distillation_type != "none" and (found := problems.attempt(teacher, args, run)) is not None:
        run.teacher, run.cnn = (found, None) if args.distillation_type == "soft" else (None, MeanLogits(found))
    own = (run.folder / CHECKPOINT).resolve() == Path(args.resume).resolve()
    going_on = argparse.Namespace(**vars(with_losses(args)) | dict(resume="auto" if own else ""))
    run.resumed = problems.attempt(read_resumed, going_on, run, run.folder)


def main(args: argparse.Namespace) -> None:
    run = check_args(args)
    if args.speed_only:
        dims = run.model.dims
        if not is_compressed(run.full, dims):
            dims = uniform(dims, args.keep_rate, skeleton(run.full.arch, **run.full.kwargs).num_prefix_tokens)
        speed(args, run.full, dims, run.device)
    elif args.eval:
        evaluated(args, run)
    elif args.prune:
        prune(args, run)
    else:
        finetune(args, run)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
