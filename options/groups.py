"""Command-line flags, in groups that scripts share, and the checks of their values. Spellings are DeiT's and NViT's."""

from __future__ import annotations

import argparse
from typing import Any

from datasets import DATA_SETS
from loading import inat
from options.parser import KeyValues, amount


def add_model_args(parser: argparse.ArgumentParser, drops: bool = True) -> None:
    """drops: with the flags that only training reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        default=None,
        help="timm name of a plain ViT, or of a Swin Transformer where the script takes one (default: the "
        "checkpoint's, else deit_base_distilled_patch16_224)",
    )
    group.add_argument(
        "--model-kwargs",
        metavar="K=V",
        nargs="+",
        action=KeyValues,
        default={},
        help="timm arguments of the full-size model, e.g. img_size=32 patch_size=4 (default: none)",
    )
    group.add_argument(
        "--input-size", metavar="PIXELS", type=int, default=None, help="image side in pixels (default: the model's own)"
    )
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        default="",
        help="dense weights of the full-size model, with its arch and kwargs where the file has them; "
        "replaces --pretrained (default: none)",
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="take the dense weights that timm downloads for --model (default: off)",
    )
    if not drops:
        return
    group.add_argument("--drop", metavar="RATE", type=float, default=0.0, help="dropout rate (default: 0)")
    group.add_argument(
        "--drop-path",
        metavar="RATE",
        type=float,
        default=0.1,
        help="stochastic depth rate of the last block; it grows linearly over depth (default: 0.1)",
    )


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Where images come from and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", metavar="DIR", default="", help="data folder; DIGITS needs none (default: none)")
    group.add_argument(
        "--data-set",
        metavar="NAME",
        default="IMNET",
        help=f"{', '.join(DATA_SETS)}, or wds/NAME for shards from tools.to_shards; IMNET is any folder "
        "with train/ and val/ class folders (default: IMNET)",
    )
    group.add_argument(
        "--inat-category",
        choices=inat.CATEGORIES,
        default="name",
        help="level of the taxonomy that are the classes of INAT and INAT19 (default: name)",
    )
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=64,
        help="training images per process and step; evaluation takes 1.5 times as many (default: 64)",
    )
    group.add_argument("--num_workers", metavar="N", type=int, default=10, help="loader processes (default: 10)")
    group.add_argument(
        "--pin-mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="page-locked memory for faster transfers to a GPU",
    )
    group.add_argument(
        "--bad_images",
        choices=("error", "skip"),
        default="error",
        help="an unreadable image ends the run, or another training image stands in for it and "
        "evaluation leaves it out, which is counted and said (default: error)",
    )
    group.add_argument(
        "--dist-eval",
        action="store_true",
        help="share the validation images out among processes, each counted once (default: off)",
    )


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    """What training images go through."""
    group = parser.add_argument_group("augmentation")
    group.add_argument("--color-jitter", metavar="F", type=float, default=0.4, help="jitter factor (default: 0.4)")
    group.add_argument(
        "--hflip",
        metavar="P",
        type=float,
        default=0.5,
        help="probability of a mirror image; 0 for digits, letters, traffic signs (default: 0.5)",
    )
    group.add_argument(
        "--aa",
        metavar="POLICY",
        default="rand-m9-mstd0.5-inc1",
        help="timm's auto-augment policy, '' for none (default: rand-m9-mstd0.5-inc1)",
    )
    group.add_argument("--smoothing", metavar="F", type=float, default=0.1, help="label smoothing (default: 0.1)")
    group.add_argument(
        "--train-interpolation",
        default="bicubic",
        choices=("random", "bilinear", "bicubic"),
        help="interpolation when training images are resized (default: bicubic)",
    )
    group.add_argument(
        "--repeated-aug",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="repeated augmentation, with several processes",
    )
    group.add_argument(
        "--reprob", metavar="P", type=float, default=0.25, help="probability of random erasing (default: 0.25)"
    )
    group.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="what random erasing fills with (default: pixel)",
    )
    group.add_argument(
        "--recount", metavar="N", type=int, default=1, help="areas that random erasing takes (default: 1)"
    )
    group.add_argument("--mixup", metavar="A", type=float, default=0.8, help="mixup alpha, 0 for off (default: 0.8)")
    group.add_argument("--cutmix", metavar="A", type=float, default=1.0, help="cutmix alpha, 0 for off (default: 1)")
    group.add_argument(
        "--cutmix-minmax",
        metavar="F",
        type=float,
        nargs=2,
        default=None,
        help="lowest and highest ratio of the cut box, instead of alpha (default: none)",
    )
    group.add_argument(
        "--mixup-prob", metavar="P", type=float, default=1.0, help="probability that a batch is mixed (default: 1)"
    )
    group.add_argument(
        "--mixup-switch-prob",
        metavar="P",
        type=float,
        default=0.5,
        help="probability of cutmix where both are on (default: 0.5)",
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="what shares one mixing ratio (default: batch)",
    )


def add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    """timm's optimizers."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", metavar="NAME", default="adamw", help="timm's name of the optimizer (default: adamw)")
    group.add_argument("--opt-eps", metavar="F", type=float, default=1e-8, help="its epsilon (default: 1e-8)")
    group.add_argument(
        "--opt-betas", metavar="B", type=float, nargs="+", default=None, help="its betas (default: the optimizer's)"
    )
    group.add_argument(
        "--momentum", metavar="F", type=float, default=0.9, help="momentum, of optimizers that have one (default: 0.9)"
    )
    group.add_argument("--weight-decay", metavar="F", type=float, default=0.05, help="(default: 0.05)")
    group.add_argument(
        "--grad-accum-steps",
        metavar="N",
        type=int,
        default=1,
        help="batches per update; the global batch grows with it (default: 1)",
    )
    group.add_argument(
        "--clip-grad", metavar="NORM", type=float, default=None, help="largest gradient norm (default: no clipping)"
    )
    group.add_argument(
        "--lr",
        metavar="F",
        type=float,
        default=5e-4,
        help="learning rate per 512 images of global batch: it is scaled linearly (default: 5e-4)",
    )


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    """timm's schedulers."""
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "step", "multistep", "poly"),
        help="timm's scheduler, stepped every update (default: cosine)",
    )
    group.add_argument("--warmup-epochs", metavar="N", type=int, default=0, help="linear warm-up (default: 0)")
    group.add_argument("--warmup-lr", metavar="F", type=float, default=1e-6, help="where it starts (default: 1e-6)")
    group.add_argument("--min-lr", metavar="F", type=float, default=1e-5, help="where it ends (default: 1e-5)")
    group.add_argument(
        "--decay-epochs",
        metavar="N",
        type=int,
        default=30,
        help="epochs between steps of the step scheduler (default: 30)",
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
        help="epochs at --min-lr after the schedule, besides --epochs (default: 0)",
    )
    group.add_argument(
        "--lr-noise",
        metavar="F",
        type=float,
        nargs="+",
        default=None,
        help="share of the schedule from which (or between which two) noise is added (default: none)",
    )
    group.add_argument("--lr-noise-pct", metavar="F", type=float, default=0.67, help="its bound (default: 0.67)")
    group.add_argument("--lr-noise-std", metavar="F", type=float, default=1.0, help="its deviation (default: 1)")
    group.add_argument(
        "--decay-rate",
        "--dr",
        metavar="F",
        type=float,
        default=0.1,
        help="factor of each step of the step and multistep schedulers, power of poly (default: 0.1)",
    )


def add_cnn_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Distillation from a CNN; returns the group, for what else distils."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distillation-type",
        choices=("none", "soft", "hard"),
        default="none",
        help="how the distillation token learns from a CNN teacher (default: none)",
    )
    group.add_argument(
        "--distillation-alpha",
        metavar="F",
        type=float,
        default=0.5,
        help="share of the CNN's loss, in [0, 1] (default: 0.5)",
    )
    group.add_argument(
        "--teacher-model",
        metavar="NAME",
        default="regnety_160.deit_in1k",
        help="timm name of the CNN teacher (default: regnety_160.deit_in1k, DeiT's)",
    )
    group.add_argument("--teacher-path", metavar="FILE", default="", help="its weights (default: what timm downloads)")
    return group


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    group = add_cnn_args(parser)
    group.add_argument(
        "--kl_loss_coeff",
        metavar="F",
        type=float,
        default=1000.0,
        help="weight of the full model's KL, a thousandth of it per batch-mean KL (default: 1000)",
    )
    group.add_argument(
        "--original_loss_coeff",
        metavar="F",
        type=float,
        default=0.0,
        help="weight of the task loss with its CNN distillation (default: 0)",
    )


def add_tau_arg(parser: argparse.ArgumentParser, use: str) -> None:
    parser.add_argument(
        "--distillation-tau", metavar="T", type=float, default=1.0, help=f"distillation temperature: {use} (default: 1)"
    )


def add_ema_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("moving average of the weights")
    group.add_argument(
        "--model-ema", action=argparse.BooleanOptionalAction, default=True, help="keep one, evaluated beside the model"
    )
    group.add_argument("--model-ema-decay", metavar="F", type=float, default=0.99996, help="(default: 0.99996)")


def add_run_args(parser: argparse.ArgumentParser, output: str, trains: bool = True) -> None:
    """trains: with the flags that only training reads."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", metavar="DIR", default="", help=output)
    group.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda, and cpu where there is no GPU)")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of all randomness (default: 0)")
    group.add_argument("--amp", action="store_true", help="mixed precision (default: off)")
    group.add_argument(
        "--amp-dtype",
        choices=("bfloat16", "float16"),
        default=None,
        help="its type (default: bfloat16 where the device has it, else float16)",
    )
    group.add_argument(
        "--dist-timeout",
        metavar="SECONDS",
        type=float,
        default=1800,
        help="a process that does not answer for so long ends the run (default: 1800)",
    )
    group.add_argument(
        "--log-interval", metavar="STEPS", type=int, default=50, help="steps between looks at the loss (default: 50)"
    )
    if not trains:
        return
    group.add_argument("--epochs", metavar="N", type=int, default=300, help="training epochs (default: 300)")
    group.add_argument("--compile", action="store_true", help="torch.compile for training and measuring (default: off)")
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute each block in the backward pass: less memory, more time (default: off)",
    )
    group.add_argument(
        "--recovery-interval",
        metavar="STEPS",
        type=int,
        default=0,
        help="updates between checkpoints inside an epoch (default: 0, at its end only)",
    )
    group.add_argument(
        "--checkpoint_errors",
        choices=("stop", "warn"),
        default="stop",
        help="what a checkpoint that cannot be written does, inside the run (default: stop)",
    )


def add_resume_args(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("resume")
    group.add_argument(
        "--resume",
        metavar="FILE",
        nargs="?",
        const="auto",
        default="",
        help=f"go on from FILE, or from {name} of this run's folder (default: start anew)",
    )
    group.add_argument(
        "--start_epoch",
        metavar="E",
        type=int,
        default=None,
        help="epoch to go on with; must agree with the checkpoint (default: the checkpoint's)",
    )


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
    add_run_args(parser, output)
    add_resume_args(parser, "ft_checkpoint.pth")


def add_target_args(group: Any) -> None:
    """Budgets beside the published --latency_target, and what widths come in."""
    group.add_argument(
        "--latency_target_ms",
        metavar="MS",
        type=float,
        default=None,
        help="stop at this predicted latency, in ms per batch of the table (default: none)",
    )
    group.add_argument(
        "--macs_target",
        metavar="N",
        type=amount,
        default=None,
        help="stop at this share of the dense model's MACs, or above 1 at this number of one image's, "
        "e.g. 4.2G (default: none)",
    )
    group.add_argument(
        "--params_target",
        metavar="N",
        type=amount,
        default=None,
        help="the same of parameters, e.g. 0.4 or 34M (default: none)",
    )
    group.add_argument(
        "--width_multiple",
        metavar="N",
        type=int,
        default=1,
        help="groups of embedding, QK, V and MLP are multiples of this, so that the widths that are "
        "pruned end at multiples (default: 1)",
    )
