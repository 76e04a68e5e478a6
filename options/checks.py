"""Checks of the values of flags, and how a flag is spelt."""

from __future__ import annotations

import argparse
import difflib
import math

from timm.optim import list_optimizers

from runtime.errors import Problems

UNDERSCORED = {  # flags that the published commands spell so
    "num_workers",
    "kl_loss_coeff",
    "original_loss_coeff",
    "prune_per_iter",
    "group_size",
    "latency_regularization",
    "latency_target",
    "output_dir",
    "start_epoch",
    "student_eval",
    "prune_dict",
    "interval_prune",
    "pruning_config",
    "pruning_exit",
    "latency_look_up_table",
    "latency_target_ms",
    "macs_target",
    "params_target",
    "width_multiple",
    "pruning_feed_percent",
    "pruning_floor",
    "hessian_error",
    "hessian_embed",
    "one_shot",
    "calib_images",
    "latency_measured",
    "prune_mode",
    "prune_iter",
    "prune_rate",
    "keep_rate",
    "merge_list",
    "merge_entries",
    "per_image",
    "depth_factor",
    "dense_merge",
    "freeze_param",
    "freeze_matrix",
    "saliency_loss",
    "shrink_interval",
    "bad_images",
    "checkpoint_errors",
}
RANGES = {  # flag: (what it must be, test); a flag that a script lacks, or that is None, passes
    "batch_size": ("above 0", lambda x: x > 0),
    "epochs": ("above 0", lambda x: x > 0),
    "log_interval": ("above 0", lambda x: x > 0),
    "drop": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "drop_path": ("in [0, 1)", lambda x: 0 <= x < 1),
    "distillation_alpha": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "hflip": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "lr": ("from 0 up", lambda x: 0 <= x < math.inf),
    "grad_accum_steps": ("above 0", lambda x: x > 0),
    "dist_timeout": ("above 0", lambda x: 0 < x < math.inf),
    "recovery_interval": ("from 0 up", lambda x: x >= 0),
    "num_workers": ("from 0 up", lambda x: x >= 0),
    "kl_loss_coeff": ("from 0 up", lambda x: 0 <= x < math.inf),
    "original_loss_coeff": ("from 0 up", lambda x: 0 <= x < math.inf),
    "distillation_tau": ("above 0", lambda x: 0 < x < math.inf),
    "clip_grad": ("above 0", lambda x: 0 < x < math.inf),
    "prune_per_iter": ("above 0", lambda x: x > 0),
    "group_size": ("above 0", lambda x: x > 0),
    "latency_regularization": ("from 0 up", lambda x: 0 <= x < math.inf),
    "latency_target": ("in (0, 1]", lambda x: 0 < x <= 1),
    "latency_target_ms": ("above 0", lambda x: 0 < x < math.inf),
    "macs_target": ("above 0", lambda x: 0 < x < math.inf),
    "params_target": ("above 0", lambda x: 0 < x < math.inf),
    "width_multiple": ("above 0", lambda x: x > 0),
    "pruning_feed_percent": ("in (0, 1]", lambda x: 0 < x <= 1),
    "pruning_floor": ("in [0, 1)", lambda x: 0 <= x < 1),
    "hessian_error": ("above 0", lambda x: 0 < x < math.inf),
    "hessian_embed": ("above 0", lambda x: 0 < x < math.inf),
    "distillation_alpha_full": ("above 0", lambda x: 0 < x < math.inf),
    "distillation_tau_full": ("above 0", lambda x: 0 < x < math.inf),
    "calib_images": ("above 0", lambda x: x > 0),
    "prune_iter": ("from 0 up", lambda x: x >= 0),
    "prune_rate": ("in [0, 1)", lambda x: 0 <= x < 1),
    "keep_rate": ("in (0, 1]", lambda x: 0 < x <= 1),
    "shrink_interval": ("from 0 up", lambda x: x >= 0),
}


def flag(name: str) -> str:
    """How an argument is spelt on the command line."""
    return f"--{name}" if name in UNDERSCORED else f"--{name.replace('_', '-')}"


def check_values(args: argparse.Namespace, problems: Problems) -> None:
    """Complaints about the values of flags, for every training script."""
    for name, value in vars(args).items():
        words, test = RANGES.get(name, ("", lambda x: True))
        if value is not None and not test(value):
            problems.add(f"{flag(name)} must be {words}, not {value}")
    if args.amp_dtype and not args.amp:
        problems.add("--amp-dtype goes with --amp")
    if hasattr(args, "opt") and not is_optimizer(args.opt):
        closest = difflib.get_close_matches(args.opt, list_optimizers(), n=3)
        problems.add(f"--opt: timm knows no optimizer {args.opt!r}; closest: {', '.join(closest) or 'adamw'}")
    if not getattr(args, "eval", False):
        _check_losses(args, problems)


def _check_losses(args: argparse.Namespace, problems: Problems) -> None:
    kind = args.distillation_type
    original = getattr(args, "original_loss_coeff", 1.0)  # SAViT's scripts always have that loss
    if not original and not args.kl_loss_coeff:
        problems.add("--kl_loss_coeff 0 and --original_loss_coeff 0 leave no loss")
    elif kind != "none" and not original:
        problems.add(f"--distillation-type {kind} needs --original_loss_coeff above 0: it is a part of that loss")
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixing and args.batch_size % 2:
        problems.add(f"mixup and cutmix need an even --batch-size, not {args.batch_size} (or --mixup 0 --cutmix 0)")


def is_optimizer(name: str) -> bool:
    """Whether timm knows the optimizer, with or without its lookahead_ prefix."""
    return name.lower().removeprefix("lookahead_") in list_optimizers()
