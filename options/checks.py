"""Checks of the values of flags, all at once."""

from __future__ import annotations

import argparse
import difflib

from timm.optim import list_optimizers

from options.parser import FLAGS, flag
from runtime.errors import Problems


def check_values(args: argparse.Namespace, problems: Problems) -> None:
    """Complaints about the values of flags, for every training script."""
    for name, value in vars(args).items():
        check = FLAGS[name].check if name in FLAGS else None
        numbers = value if isinstance(value, list | tuple) else [value]
        if check and value is not None and (odd := [number for number in numbers if not check.holds(number)]):
            problems.add(f"{flag(name)} must be {check.words}, not {' '.join(map(str, odd))}")
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
