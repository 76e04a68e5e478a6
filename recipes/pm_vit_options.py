"""Flags of Prune and Merge, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import options
from options.ranges import ABOVE_0, FROM_0, SHARE_ABOVE_0, SHARE_BELOW_1
from pruning import pm_vit, token_merging
from recipes import pm_vit as steps
from runtime.errors import Problems


def add_token_args(parser: Any) -> None:
    """What is compressed, how patches are scored and merged, and how finetuning starts."""
    group = parser.add_argument_group("tokens")
    add = group.add_argument
    add(
        "--resume",
        metavar="FILE",
        default="",
        help="the model: dense weights or any checkpoint. The ft_checkpoint.pth that finetuning has written to "
        "--output_dir resumes that run (default: --initial-checkpoint or --pretrained)",
        may_differ=True,
    )
    add("--prune", action="store_true", help="score the patches and compress the model (default: off, finetune it)")
    add("--eval", action="store_true", help="print counts and accuracy of a compressed model (default: off)")
    add(
        "--speed-only",
        action="store_true",
        help="print images per second of the dense and the compressed model; needs no data (default: off)",
    )
    add(
        "--prune_mode",
        choices=pm_vit.MODES,
        default="attn",
        help="how patches are scored. attn: gradient x attention. head: the same, without cancellation between heads. "
        "head_entropy: by the attention they receive, without labels. random. seq: spread evenly, without data. clus: "
        "attn on a compressed model whose skipped patches stay skipped. probe: spread evenly, as many per block as the "
        "predictions need, without labels (default: %(default)s)",
    )
    _add_scoring_args(add)
    _add_merging_args(add)


def _add_scoring_args(add: Callable[..., Any]) -> None:
    add(
        "--compensate",
        action="store_true",
        help="after --prune, refit the weights to the dense model's outputs, without labels (default: off)",
    )
    add(
        "--calib_images",
        metavar="N",
        type=int,
        default=256,
        help="training images for --prune_mode probe and --compensate, over all processes (default: %(default)s)",
        check=ABOVE_0,
    )
    add(
        "--prune_iter",
        metavar="N",
        type=int,
        default=250,
        help="batches to score on, 0 for an epoch (default: %(default)s)",
        check=FROM_0,
    )
    add(
        "--prune_rate",
        metavar="F",
        type=float,
        default=None,
        help="share of patches that skip a block (default: 0 with --merge content and --prune_mode probe, else 0.1)",
        check=SHARE_BELOW_1,
    )
    add(
        "--keep_rate",
        metavar="F",
        type=float,
        default=0.6,
        help="share of patches that stay tokens (default: %(default)s)",
        check=SHARE_ABOVE_0,
    )


def _add_merging_args(add: Callable[..., Any]) -> None:
    add("--merge_list", metavar="L", type=int, nargs="+", default=None, help="blocks to compress (default: all)")
    add(
        "--merge",
        choices=token_merging.MERGES,
        default=None,
        help="where merged patches go. content: per image, into the patch that each is most like. grid: for all "
        "images, into the nearest centre. raster: along the row, as published (default: content, or grid if "
        "--prune_rate, --prune_mode clus or a flag of the matrices needs merging by place)",
    )
    add(
        "--merge_entries",
        choices=("mean", "published"),
        default="mean",
        help="entries of the merge matrix: rows sum to 1, or the centre's is 1 (default: %(default)s)",
    )
    add(
        "--shortcut",
        choices=("merged", "skipped"),
        default="merged",
        help="which patches keep values of their own: merged ones too, as far as they differ from their group, or only "
        "skipped ones, as published (default: %(default)s)",
    )
    add(
        "--per_image",
        action="store_true",
        help="take the scores' absolute values per image, not per batch (default: off)",
    )
    add(
        "--depth_factor",
        metavar="F",
        type=float,
        default=pm_vit.DEPTH_FACTOR,
        help="multiply the scores of block l by 1 - F l (default: %(default)s)",
    )
    add(
        "--dense_merge",
        action="store_true",
        help="store and train both matrices in full, as published, with --shortcut skipped (default: off)",
    )
    add("--freeze_param", action="store_true", help="finetune only the token matrices (default: off)")
    add("--freeze_matrix", action="store_true", help="finetune everything but the token matrices (default: off)")
    add("--final_finetune", metavar="N", type=int, dest="epochs", help="epochs of finetuning (default: 100)")


def calibrates(args: Any) -> bool:
    """Whether --prune looks at --calib_images."""
    return args.prune_mode == "probe" or args.compensate


def asks_for_places(args: Any) -> bool:
    """Whether a flag wants groups that are the same for every image."""
    matrices = args.dense_merge, args.merge_entries == "published", args.shortcut == "skipped"
    return bool(args.prune_rate or args.prune_mode == "clus" or any(matrices))


def only_merges(args: Any) -> str:
    """The flag that lets no patch skip a block, if one does."""
    if args.merge == token_merging.CONTENT:
        return "--merge content"
    return "--prune_mode probe" if args.prune_mode == "probe" else ""


def _settle_merging(args: Any, problems: Problems) -> None:
    """Fill in how patches are merged and how many skip a block, and complain about what does not go together."""
    if args.merge is None:
        args.merge = "grid" if asks_for_places(args) else token_merging.CONTENT
    flag = only_merges(args)
    if args.prune_rate is None:
        args.prune_rate = 0.0 if flag else 0.1
    if flag and args.prune_rate:
        problems.add(f"{flag} only merges: --prune_rate {args.prune_rate:g} does not go with it")
    for odd in ("--dense_merge", "--merge_entries published", "--shortcut skipped"):
        name, *value = odd.removeprefix("--").split()
        if args.merge == token_merging.CONTENT and getattr(args, name) in (True, *value):
            problems.add(f"{odd} is of matrices, which --merge content has none of")


def check_flags(args: Any, problems: Problems) -> None:
    """Complaints about flags and how they go together."""
    options.check_values(args, problems)
    _settle_merging(args, problems)
    if sum((args.prune, args.eval, args.speed_only)) > 1:
        problems.add("--prune, --eval and --speed-only are three things to do: give one")
    if not (args.resume or args.initial_checkpoint or args.pretrained or args.speed_only):
        problems.add("--resume FILE is required: dense weights, or a checkpoint")
    if not (args.output_dir or args.prune or args.eval or args.speed_only):
        problems.add("--output_dir is required")
    if args.compensate and not args.prune:
        problems.add("--compensate goes with --prune")
    if args.dense_merge and args.shortcut != "skipped":
        problems.add("--dense_merge goes with --shortcut skipped")
    if args.freeze_param and args.freeze_matrix:
        problems.add("--freeze_param and --freeze_matrix leave nothing to train")


def check_model(args: Any, model: steps.Model) -> None:
    """Raises ValueError where --resume does not hold what is to be done with it."""
    compressed = steps.is_compressed(model.full, model.dims)
    if (args.eval or not (args.prune or args.speed_only)) and not compressed:
        what = "--eval" if args.eval else "finetuning"
        raise ValueError(
            f"{what}: {args.resume or model.full.arch.name} has no token structure; compress it with --prune"
        )
    by_content = compressed and model.start.arch.merge == "content"
    if compressed and not by_content and args.prune and args.merge == token_merging.CONTENT:
        raise ValueError(f"--merge content: {args.resume} merges by place; use --merge grid")
    if by_content:
        if args.freeze_param:
            raise ValueError(f"--freeze_param: {args.resume} merges by content and has no matrices to train")
        if args.prune and args.merge != token_merging.CONTENT:
            raise ValueError(f"--merge {args.merge}: {args.resume} merges by content; use --merge content")
        if args.prune and args.prune_mode not in ("seq", "random", "probe"):
            raise ValueError(
                f"--prune_mode {args.prune_mode} scores patches that have a place of their own; "
                f"{args.resume} merges by content: seq, random and probe compress it further"
            )
    if args.prune and args.prune_mode == "clus" and not compressed:
        raise ValueError("--prune_mode clus compresses a compressed model further; --resume holds none")
    if args.compensate and compressed:
        raise ValueError(f"--compensate refits to a model with all of its tokens; {args.resume} has fewer")
    if args.prune:
        stem = model.full.arch.skeleton.patch_embed
        pm_vit.budget(len(steps.merge_list(args, model.dims)), stem.num_patches, args.prune_rate, args.keep_rate)
