"""Command-line flags, in groups that scripts share, and the checks of their values. Spellings are DeiT's and NViT's."""

from __future__ import annotations

import argparse
from typing import Any

from datasets import DATA_SETS
from loading import inat
from options.images import add_preparation_args
from options.parser import KeyValues, amount
from options.ranges import ABOVE_0, FOLDER_NAME, FROM_0, SHARE, SHARE_BELOW_1


def add_model_args(parser: argparse.ArgumentParser, drops: bool = True) -> None:
    """drops: with the flags that only training reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        default=None,
        help="timm name of a plain ViT, or of a Swin Transformer where the script takes one (default: the "
        "checkpoint's, else deit_base_distilled_patch16_224)",
        may_differ=True,
    )
    group.add_argument(
        "--model-kwargs",
        metavar="K=V",
        nargs="+",
        action=KeyValues,
        default={},
        help="timm arguments of the full-size model, e.g. img_size=32 patch_size=4 (default: none)",
        may_differ=True,
    )
    group.add_argument(
        "--input-size",
        metavar="PIXELS",
        type=int,
        default=None,
        help="image side in pixels (default: the model's own)",
        may_differ=True,
    )
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        default="",
        help="dense weights of the full-size model, with its arch and kwargs where the file has them. "
        "docs/formats.md says which files are read. Replaces --pretrained (default: none)",
        path=True,
    )
    group.add_argument(
        "--use-ema",
        action="store_true",
        help="take the moving average of those weights, which the file must hold (default: off)",
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="take the dense weights that timm downloads for --model (default: off)",
    )
    if not drops:
        return
    group.add_argument(
        "--drop", metavar="RATE", type=float, default=0.0, help="dropout rate (default: %(default)s)", check=SHARE
    )
    group.add_argument(
        "--drop-path",
        metavar="RATE",
        type=float,
        default=0.1,
        help="stochastic depth rate of the last block; it grows linearly over depth (default: %(default)s)",
        check=SHARE_BELOW_1,
    )


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Where images come from and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path", metavar="DIR", default="", help="data folder; DIGITS needs none (default: none)", path=True
    )
    group.add_argument(
        "--data-set",
        metavar="NAME",
        default="IMNET",
        help=f"{', '.join(DATA_SETS)}, or wds/NAME for shards from tools.to_shards; IMNET is any folder "
        "with train/ and val/ class folders (default: %(default)s)",
    )
    group.add_argument(
        "--inat-category",
        choices=inat.CATEGORIES,
        default="name",
        help="level of the taxonomy that are the classes of INAT and INAT19 (default: %(default)s)",
    )
    _add_loader_args(group)


def _add_loader_args(group: Any) -> None:
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=64,
        help="training images per process and step; evaluation takes 1.5 times as many (default: %(default)s)",
        check=ABOVE_0,
        may_differ=True,
    )
    group.add_argument(
        "--num_workers",
        metavar="N",
        type=int,
        default=10,
        help="loader processes (default: %(default)s)",
        check=FROM_0,
        may_differ=True,
    )
    group.add_argument(
        "--pin-mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="page-locked memory for faster transfers to a GPU",
        may_differ=True,
    )
    group.add_argument(
        "--bad_images",
        choices=("error", "skip"),
        default="error",
        help="an unreadable image ends the run, or another training image stands in for it and "
        "evaluation leaves it out, which is counted and said (default: %(default)s)",
        may_differ=True,
    )
    group.add_argument(
        "--exif",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="turn photographs as their EXIF orientation says",
    )
    add_preparation_args(group)
    group.add_argument(
        "--dist-eval",
        action="store_true",
        help="share the validation images out among processes, each counted once (default: off)",
        may_differ=True,
    )


def add_run_args(
    parser: argparse.ArgumentParser, output: str, trains: bool = True, output_dir: str = "", named: bool = False
) -> None:
    """output: help of --output_dir; output_dir: its default; trains: with the flags that only training reads; named:
    the run's folder is made in --output_dir, and --run_name names it.
    """
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", metavar="DIR", default=output_dir, help=output, path=True)
    if named:
        group.add_argument(
            "--run_name",
            metavar="NAME",
            default=None,
            help="name of the run's folder (default: made of the main arguments, as published)",
            path=True,
            check=FOLDER_NAME,
        )
    group.add_argument(
        "--device", default="cuda", help="cuda or cpu (default: cuda, and cpu where there is no GPU)", may_differ=True
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of all randomness (default: %(default)s)")
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
        help="a process that does not answer for so long ends the run (default: %(default)s)",
        check=ABOVE_0,
        may_differ=True,
    )
    group.add_argument(
        "--log-interval",
        metavar="STEPS",
        type=int,
        default=50,
        help="steps between looks at the loss (default: %(default)s)",
        check=ABOVE_0,
        may_differ=True,
    )
    if trains:
        _add_training_run_args(group)


def _add_training_run_args(group: Any) -> None:
    group.add_argument(
        "--epochs", metavar="N", type=int, default=300, help="training epochs (default: %(default)s)", check=ABOVE_0
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for training and measuring (default: off)",
        may_differ=True,
    )
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute each block in the backward pass: less memory, more time (default: off)",
        may_differ=True,
    )
    group.add_argument(
        "--recovery-interval",
        metavar="STEPS",
        type=int,
        default=0,
        help="updates between checkpoints inside an epoch (default: 0, at its end only)",
        check=FROM_0,
        may_differ=True,
    )
    group.add_argument(
        "--checkpoint_errors",
        choices=("stop", "warn"),
        default="stop",
        help="what a checkpoint that cannot be written does, inside the run (default: %(default)s)",
        may_differ=True,
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
        may_differ=True,
    )
    group.add_argument(
        "--start_epoch",
        metavar="E",
        type=int,
        default=None,
        help="epoch to resume with; must agree with the checkpoint (default: the checkpoint's)",
        may_differ=True,
    )


def add_target_args(group: Any) -> None:
    """Budgets beside the published --latency_target, and what widths come in."""
    group.add_argument(
        "--latency_target_ms",
        metavar="MS",
        type=float,
        default=None,
        help="stop at this predicted latency, in ms per batch of the table (default: none)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--macs_target",
        metavar="N",
        type=amount,
        default=None,
        help="stop at this share of the dense model's MACs, or above 1 at this number of one image's, "
        "e.g. 4.2G (default: none)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--params_target",
        metavar="N",
        type=amount,
        default=None,
        help="the same of parameters, e.g. 0.4 or 34M (default: none)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--width_multiple",
        metavar="N",
        type=int,
        default=1,
        help="groups of embedding, QK, V and MLP are multiples of this, so that the widths that are "
        "pruned end at multiples (default: %(default)s)",
        check=ABOVE_0,
    )
