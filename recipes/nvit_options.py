"""Flags of pruning to a latency target, with training and one-shot."""

from __future__ import annotations

import json
from typing import Any

import options
from models import Arch
from options.ranges import ABOVE_0, FROM_0, SHARE_ABOVE_0
from pruning.gate_saliency import KINDS
from recipes.calibration import WHEN
from runtime.errors import Problems


def add_pruning_args(parser: Any) -> None:
    """How a pruning run chooses, scores and keeps what it can."""
    group = parser.add_argument_group("pruning")
    group.add_argument("--pruning", action="store_true", help="prune; without it the dense model is evaluated")
    group.add_argument(
        "--pruning_config",
        metavar="FILE",
        default="pruning_configs/group8_m23_m09.json",
        help="criterion, momentum, group sizes (default: %(default)s)",
        path=True,
    )
    group.add_argument(
        "--prune_dict",
        metavar="JSON",
        default='{"Global":0}',
        help="a label for the run, and the most units to remove, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--interval_prune",
        metavar="STEPS",
        type=int,
        nargs="+",
        default=[100],
        help="training steps between pruning events (default: 100)",
    )
    group.add_argument(
        "--prune_per_iter",
        metavar="UNITS",
        type=int,
        default=1024,
        help="units to remove at each event: prune_per_iter / group_size groups (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--group_size",
        metavar="UNITS",
        type=int,
        default=16,
        help="units that prune_per_iter counts as one group (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--student_eval",
        metavar="BOOL",
        type=options.boolean,
        default=False,
        help="run the student in eval mode after the first event (default: %(default)s)",
    )
    _add_latency_args(group)
    _add_table_args(group)
    _add_method_args(group)
    _add_weight_args(group)


def _add_latency_args(group: Any) -> None:
    group.add_argument(
        "--latency_regularization",
        metavar="F",
        type=float,
        default=0.0,
        help="lambda in saliency - lambda x latency, in squared loss per second of the table (default: %(default)s)",
        check=FROM_0,
    )
    group.add_argument(
        "--latency_target",
        metavar="RATIO",
        type=float,
        nargs="+",
        action=options.OneOrMore,
        default=None,
        help="stop at this share of the dense model's latency, in (0, 1]: as measured, where the table is of this "
        "device, else as predicted; several with --one_shot (default: none)",
        check=SHARE_ABOVE_0,
    )
    group.add_argument(
        "--latency_predicted",
        action="store_true",
        help="meet --latency_target as the table predicts it, without measuring (default: off)",
    )
    group.add_argument(
        "--latency_measured",
        action="store_true",
        help="meet --latency_target as measured on this device, wherever the table is from (default: off)",
    )


def _add_table_args(group: Any) -> None:
    group.add_argument(
        "--latency_look_up_table",
        metavar="FILE",
        default="",
        help="latency table, from python -m latency.build_table (default: a coarse one of this device, measured in a "
        "minute and kept for the next time)",
        path=True,
    )
    group.add_argument(
        "--latency_batch_size",
        metavar="N",
        type=int,
        default=8,
        help="deployment batch of a table that is not named (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--table_cache",
        metavar="DIR",
        default="",
        help="where tables that are not named are kept (default: vit-compression in the user's cache folder)",
        path=True,
    )
    group.add_argument(
        "--strict_table",
        action="store_true",
        help="refuse a table of another device, thread count, type or runtime than the run's, instead of a warning "
        "(default: off)",
        may_differ=True,
    )


def _add_method_args(group: Any) -> None:
    group.add_argument(
        "--selection",
        choices=("published", "value"),
        default="published",
        help="what goes first. published: the lowest saliency - lambda x latency. value: the lowest saliency per "
        "second saved; whole branches may go, and the last event is solved exactly (default: %(default)s)",
    )
    group.add_argument(
        "--saliency",
        choices=("weights", *KINDS),
        default="weights",
        help="how units are scored. weights: from weights and gradients, as --pruning_config says. gates: from a gate "
        "behind every unit. gate_samples: the same, squared per image (default: %(default)s)",
    )
    group.add_argument(
        "--saliency_loss",
        choices=("training", "teacher"),
        default="training",
        help="the loss whose derivative the gates take: the training loss, or the cross-entropy with labels drawn from "
        "the dense model's predictions (default: %(default)s)",
    )
    group.add_argument(
        "--tokens",
        choices=("place", "content"),
        nargs="?",
        const="place",
        default=None,
        help="also prune the patches that each block computes on. place merges removed patches into their neighbours; "
        "content, with --one_shot only, into the patches they are most like. --tokens alone means place. A latency "
        "table that is named must hold several token counts (default: off)",
    )


def _add_weight_args(group: Any) -> None:
    group.add_argument(
        "--align",
        choices=("blocks", "all"),
        nargs="?",
        const="blocks",
        default=None,
        help="before pruning, rotate and sort units so that few of them carry the most, without changing the model's "
        "outputs: heads and MLP units (blocks), or the embedding too (all). --align alone means blocks (default: off)",
    )
    group.add_argument(
        "--compensate",
        choices=WHEN,
        default=None,
        help="refit the remaining weights on calibration images: at every event to the student before it, or at the "
        "end to the dense model (default: off)",
    )
    group.add_argument(
        "--shrink_interval",
        metavar="EVENTS",
        type=int,
        default=0,
        help="compact the student after every N pruning events, to train faster (default: 0, never)",
        check=FROM_0,
    )
    options.add_target_args(group)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the planned events with an estimate of time and memory, then exit (default: off)",
        may_differ=True,
    )


def check_start(args: Any, start: Any, problems: Problems) -> None:
    """Complaints about what needs a full-width model where the run starts from a `start` that is narrower."""
    for name in ("one_shot", "align", "compensate", "tokens"):
        if start and getattr(args, name):
            problems.add(f"{options.flag(name)} starts from a full-width model; {args.initial_checkpoint} is pruned")


def check(args: Any, problems: Problems) -> None:
    """Complaints about flags of pruning with training that do not go together."""
    if args.saliency == "weights" and args.saliency_loss != "training":
        problems.add(f"--saliency_loss {args.saliency_loss} needs --saliency gates or gate_samples")
    if args.saliency != "weights" and args.compile:
        problems.add(f"--saliency {args.saliency} does not go with --compile: gates are hooks, new in every step")
    if args.selection == "value" and args.latency_regularization:
        problems.add("--latency_regularization is the lambda of --selection published; --selection value has none")
    if args.tokens == "content":
        problems.add("--tokens content goes with --one_shot: with training a patch is scored by its place")
    if args.tokens and args.compile:
        problems.add("--tokens does not go with --compile: blocks change their form at every event")
    if args.tokens and args.shrink_interval:
        problems.add("--tokens does not go with --shrink_interval yet")
    if args.shrink_interval and args.opt.startswith("lookahead_"):
        problems.add(f"--shrink_interval does not go with --opt {args.opt}: its slow weights keep their shape")


def check_family(args: Any, arch: Arch, problems: Problems) -> None:
    """Complaints about flags that a Swin Transformer is not pruned with."""
    if not arch.is_swin:
        return
    usual = dict(one_shot=False, tokens=None, align=None, compensate=None, selection="published", saliency="weights")
    for name in (name for name, value in usual.items() if getattr(args, name) != value):
        value = "" if getattr(args, name) is True else f" {getattr(args, name)}"
        problems.add(f"{options.flag(name)}{value} is for plain ViTs, not for {arch.name}, a Swin Transformer")


def parse_prune_dict(text: str) -> tuple[str, int]:
    """(label, units) of --prune_dict. Raises ValueError."""
    try:
        (label, cap), *more = json.loads(text).items()
    except (json.JSONDecodeError, AttributeError, ValueError):
        label, cap, more = None, None, []
    if more or not isinstance(cap, int) or isinstance(cap, bool) or cap < 0:
        raise ValueError(f'--prune_dict must be one label and a count, like {{"Global":39000}}, not {text}')
    return label, cap
