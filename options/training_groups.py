"""Flags of training: augmentation, optimizer, schedule, distillation, moving average, targets."""

from __future__ import annotations

import argparse

from options.groups import add_data_args, add_model_args, add_resume_args, add_run_args
from options.ranges import ABOVE_0, FROM_0, SHARE


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    """What training images go through."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--color-jitter", metavar="F", type=float, default=0.4, help="jitter factor (default: %(default)s)"
    )
    group.add_argument(
        "--hflip",
        metavar="P",
        type=float,
        default=0.5,
        help="probability of a mirror image; 0 for digits, letters, traffic signs (default: %(default)s)",
        check=SHARE,
    )
    group.add_argument(
        "--aa",
        metavar="POLICY",
        default="rand-m9-mstd0.5-inc1",
        help="timm's auto-augment policy, '' for none (default: %(default)s)",
    )
    group.add_argument(
        "--smoothing", metavar="F", type=float, default=0.1, help="label smoothing (default: %(default)s)"
    )
    group.add_argument(
        "--train-interpolation",
        default=None,
        choices=("random", "bilinear", "bicubic"),
        help="how training images are resized (default: as --interpolation says)",
        may_differ=True,  # what came of it is compared
    )
    group.add_argument(
        "--repeated-aug",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="repeated augmentation, with several processes",
    )
    group.add_argument(
        "--reprob", metavar="P", type=float, default=0.25, help="probability of random erasing (default: %(default)s)"
    )
    group.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="what random erasing fills with (default: %(default)s)",
    )
    group.add_argument(
        "--recount", metavar="N", type=int, default=1, help="areas that random erasing takes (default: %(default)s)"
    )
    _add_mixing_args(group)


def _add_mixing_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mixup", metavar="A", type=float, default=0.8, help="mixup alpha, 0 for off (default: %(default)s)"
    )
    group.add_argument(
        "--cutmix", metavar="A", type=float, default=1.0, help="cutmix alpha, 0 for off (default: %(default)s)"
    )
    group.add_argument(
        "--cutmix-minmax",
        metavar="F",
        type=float,
        nargs=2,
        default=None,
        help="lowest and highest ratio of the cut box, instead of alpha (default: none)",
    )
    group.add_argument(
        "--mixup-prob",
        metavar="P",
        type=float,
        default=1.0,
        help="probability that a batch is mixed (default: %(default)s)",
    )
    group.add_argument(
        "--mixup-switch-prob",
        metavar="P",
        type=float,
        default=0.5,
        help="probability of cutmix where both are on (default: %(default)s)",
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="what shares one mixing ratio (default: %(default)s)",
    )


def add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    """timm's optimizers."""
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--opt", metavar="NAME", default="adamw", help="timm's name of the optimizer (default: %(default)s)"
    )
    group.add_argument("--opt-eps", metavar="F", type=float, default=1e-8, help="its epsilon (default: %(default)s)")
    group.add_argument(
        "--opt-betas", metavar="B", type=float, nargs="+", default=None, help="its betas (default: the optimizer's)"
    )
    group.add_argument(
        "--momentum",
        metavar="F",
        type=float,
        default=0.9,
        help="momentum, of optimizers that have one (default: %(default)s)",
    )
    group.add_argument("--weight-decay", metavar="F", type=float, default=0.05, help="(default: %(default)s)")
    group.add_argument(
        "--grad-accum-steps",
        metavar="N",
        type=int,
        default=1,
        help="batches per update; the global batch grows with it (default: %(default)s)",
        check=ABOVE_0,
        may_differ=True,
    )
    group.add_argument(
        "--clip-grad",
        metavar="NORM",
        type=float,
        default=None,
        help="largest gradient norm (default: no clipping)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--lr",
        metavar="F",
        type=float,
        default=5e-4,
        help="learning rate per 512 images of global batch: it is scaled linearly (default: %(default)s)",
        check=FROM_0,
    )


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    """timm's schedulers."""
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "step", "multistep", "poly"),
        help="timm's scheduler, stepped every update (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-epochs", metavar="N", type=int, default=0, help="linear warm-up (default: %(default)s)"
    )
    group.add_argument(
        "--warmup-lr", metavar="F", type=float, default=1e-6, help="where it starts (default: %(default)s)"
    )
    group.add_argument("--min-lr", metavar="F", type=float, default=1e-5, help="where it ends (default: %(default)s)")
    group.add_argument(
        "--decay-epochs",
        metavar="N",
        type=int,
        default=30,
        help="epochs between steps of the step scheduler (default: %(default)s)",
    )
    group.add_argument(
        "--decay-milestones",
        metavar="E",
        type=int,
        nargs="+",
        default=[90, 180, 270],
        help="epochs at which the multistep scheduler steps (default: 90 180 270)",
    )
    group.add_argument(
        "--cooldown-epochs",
        metavar="N",
        type=int,
        default=0,
        help="epochs at --min-lr after the schedule, besides --epochs (default: %(default)s)",
    )
    group.add_argument(
        "--lr-noise",
        metavar="F",
        type=float,
        nargs="+",
        default=None,
        help="share of the schedule from which (or between which two) noise is added (default: none)",
    )
    group.add_argument("--lr-noise-pct", metavar="F", type=float, default=0.67, help="its bound (default: %(default)s)")
    group.add_argument(
        "--lr-noise-std", metavar="F", type=float, default=1.0, help="its deviation (default: %(default)s)"
    )
    group.add_argument(
        "--decay-rate",
        "--dr",
        metavar="F",
        type=float,
        default=0.1,
        help="factor of each step of the step and multistep schedulers, power of poly (default: %(default)s)",
    )


def add_cnn_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Distillation from a CNN; returns the group, for what else distils."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distillation-type",
        choices=("none", "soft", "hard"),
        default="none",
        help="how the distillation token learns from a CNN teacher (default: %(default)s)",
    )
    group.add_argument(
        "--distillation-alpha",
        metavar="F",
        type=float,
        default=0.5,
        help="share of the CNN's loss, in [0, 1] (default: %(default)s)",
        check=SHARE,
    )
    group.add_argument(
        "--teacher-model",
        metavar="NAME",
        default="regnety_160.deit_in1k",
        help="timm name of the CNN teacher (default: regnety_160.deit_in1k, DeiT's)",
    )
    group.add_argument(
        "--teacher-path", metavar="FILE", default="", help="its weights (default: what timm downloads)", path=True
    )
    return group


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    group = add_cnn_args(parser)
    group.add_argument(
        "--kl_loss_coeff",
        metavar="F",
        type=float,
        default=1000.0,
        help="weight of the full model's KL, a thousandth of it per batch-mean KL (default: %(default)s)",
        check=FROM_0,
    )
    group.add_argument(
        "--original_loss_coeff",
        metavar="F",
        type=float,
        default=0.0,
        help="weight of the task loss with its CNN distillation (default: %(default)s)",
        check=FROM_0,
    )


def add_tau_arg(parser: argparse.ArgumentParser, use: str) -> None:
    parser.add_argument(
        "--distillation-tau",
        metavar="T",
        type=float,
        default=1.0,
        help=f"distillation temperature: {use} (default: %(default)s)",
        check=ABOVE_0,
    )


def add_ema_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("moving average of the weights")
    group.add_argument(
        "--model-ema", action=argparse.BooleanOptionalAction, default=True, help="keep one, evaluated beside the model"
    )
    group.add_argument("--model-ema-decay", metavar="F", type=float, default=0.99996, help="(default: %(default)s)")


def add_dense_training_args(parser: argparse.ArgumentParser, output: str) -> None:
    """Every group of a script that trains a dense model."""
    add_model_args(parser)
    add_data_args(parser)
    add_augmentation_args(parser)
    add_optimizer_args(parser)
    add_schedule_args(parser)
    add_distillation_args(parser)
    add_tau_arg(parser, "of the full model's KL and of soft CNN distillation")
    add_ema_args(parser)
    add_run_args(parser, output, named=True)
    add_resume_args(parser, "ft_checkpoint.pth")
