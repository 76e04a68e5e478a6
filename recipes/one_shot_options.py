"""Flags of one-shot pruning, and what does not go together among them."""

from __future__ import annotations

from typing import Any

import options
from loading import shards
from options.ranges import ABOVE_0, FROM_0
from pruning.objective import OBJECTIVES, TOKENS
from pruning.one_shot import PRICING
from runtime.errors import Problems


def add_one_shot_args(parser: Any) -> None:
    """Flags of --one_shot."""
    group = parser.add_argument_group("one-shot pruning")
    group.add_argument(
        "--one_shot",
        action="store_true",
        help="prune to --latency_target without labels, gradients or training. Several targets share one analysis and "
        "get a folder each (default: off)",
    )
    group.add_argument(
        "--calib_images",
        metavar="N",
        type=int,
        default=1024,
        help="training images for --one_shot, --align and --compensate, over all processes (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--max_drop",
        metavar="POINTS",
        type=float,
        default=None,
        help="instead of --latency_target: find the quickest model that loses at most this many points of top-1 on the "
        "validation images (default: none)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--recover_minutes",
        metavar="MIN",
        type=float,
        default=0.0,
        help="after every refit, distil the dense model's outputs on unlabelled training images for this long; the "
        "best state on held-out images wins (default: 0, off)",
        check=FROM_0,
    )
    group.add_argument(
        "--pricing",
        choices=tuple(PRICING),
        default="gradient",
        help="how the cost of every width is found. gradient: one backward pass per probe, in time linear in depth. "
        "measured: by running the rest of the model after every cut (default: %(default)s)",
    )
    group.add_argument(
        "--analysis",
        metavar="FILE",
        default="",
        help="analysis.safetensors of an earlier run of the same model and images, for further targets (default: none)",
        path=True,
    )
    _add_feature_args(parser)


def _add_feature_args(parser: Any) -> None:
    group = parser.add_argument_group("one-shot pruning of a backbone")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default=None,
        help="what --one_shot keeps. predictions: the classifier's. features: what a backbone is used for; a "
        "classifier is left out, and --data-path may be any folder of images (default: features for weights that timm "
        "has without a classifier, else predictions)",
    )
    group.add_argument(
        "--feature_tokens",
        choices=TOKENS,
        default="pooled",
        help="the features that --objective features keeps: of the class token and registers, the patches, all, or as "
        "the model pools them (default: %(default)s)",
    )
    group.add_argument(
        "--keep_output",
        action="store_true",
        help="with --objective features, also prune the embedding, and end in a linear layer that restores the width "
        "of the features (default: off, the embedding stays)",
    )
    group.add_argument(
        "--linear_probe",
        action="store_true",
        help="judge features by a linear classifier too, not by nearest neighbours alone (default: off)",
    )


def check_flags(args: Any, problems: Problems) -> None:
    """What --one_shot needs, and what it does not go with."""
    if (args.latency_target is None) == (args.max_drop is None):
        problems.add("--one_shot needs --latency_target" + (" or --max_drop, not both" if args.max_drop else ""))
    if args.max_drop is not None and args.latency_measured:
        problems.add("--latency_measured goes with --latency_target; with --max_drop there is no target to meet")
    if len(set(targets(args))) < len(targets(args)):
        problems.add(f"--latency_target names a target twice: {' '.join(f'{t:g}' for t in targets(args))}")
    for name in ("latency_target_ms", "macs_target", "params_target"):
        if getattr(args, name) is not None:
            problems.add(f"--{name} goes with training; --one_shot aims at --latency_target alone")
    for name in ("resume", "dry_run", "align", "compensate", "shrink_interval"):
        if getattr(args, name):
            problems.add(f"{options.flag(name)} goes with training; --one_shot has none")
    for name in ("keep_output", "linear_probe"):
        if getattr(args, name) and args.objective == "predictions":
            problems.add(f"--{name} goes with --objective features")
    problems.attempt(shards.check_indexed, args, "--one_shot")


def check_without(args: Any, problems: Problems) -> None:
    """Complaints about flags that only --one_shot takes, where it is not given."""
    if isinstance(args.latency_target, list):
        problems.add("--latency_target takes several values with --one_shot only")
    for name in ("max_drop", "analysis", "recover_minutes", "objective", "keep_output", "linear_probe"):
        if getattr(args, name):
            problems.add(f"--{name} goes with --one_shot")


def folder_name(args: Any, model: str) -> str:
    """Of a run's folder: the arguments that matter are in it."""
    aim = "_".join(["target", *map(str, targets(args))]) if args.latency_target else f"drop_{args.max_drop:g}"
    name = f"one_shot_{args.data_set.replace('/', '_')}_{model}_calib_{args.calib_images}_{aim}"
    name += f"_tokens_{args.tokens}" if args.tokens else ""
    name += f"_{args.objective}" if args.objective else ""
    name += f"_{args.feature_tokens}" if args.feature_tokens != "pooled" else ""
    name += "_keep_output" if args.keep_output else ""
    name += f"_recover_{args.recover_minutes:g}" if args.recover_minutes else ""
    return name + (f"_pricing_{args.pricing}" if args.pricing != "gradient" else "")


def targets(args: Any) -> list[float]:
    """The values of --latency_target, the widest model first; none with --max_drop."""
    given = args.latency_target if isinstance(args.latency_target, list) else [args.latency_target]
    return sorted((target for target in given if target is not None), reverse=True)
