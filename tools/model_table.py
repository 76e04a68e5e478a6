"""Write docs/models.md, which of timm's ViTs can be pruned: python -m tools.model_table [--output FILE]"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed, RotaryEmbeddingMixed
from timm.models.vision_transformer import Block
from torch import nn

import options
from models.dims import BLOCK_AXES
from models.mlps import MLPS
from models.parents import ModelError, left_alone, skeleton
from models.tokens import can_be_lean
from pruning.align import why_not_rotated
from runtime.console import say
from runtime.folders import write_text
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
MODULES = ("vision_transformer", "deit", "eva", "naflexvit")
ONE_BLOCK = dict(depth=1)  # timm's blocks are alike, and one is built in milliseconds
AXES = ("embed", *BLOCK_AXES, "tokens")
HEADING = """# Models

Which of the ViTs of timm {version} can be pruned: {taken} of {total} names in {modules}. Written by
`python -m tools.model_table` from the structure of each model; no weights are loaded.

- **axes**: what can be removed (`tokens` are merged rather than removed). The methods work on axes, not on names: what
  a method does with an axis, it does in every model that has it.
- **head**: outputs of timm's own head, classes or a projection. Where there are 0, one-shot pruning (by features)
  starts from the weights as they are, and the other methods once a classifier was trained.
- **alignment of the embedding**: rotated, or sorted by importance where something stands in the way of a rotation.
- **lean last block**: whether the head reads prefix tokens alone, so that the last block need compute no other.

Swin Transformers are no plain ViTs and have [their own rules](swin.md).
"""


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__, "example: python -m tools.model_table", "tools.model_table")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=ROOT / "docs" / "models.md",
        help="file to write (default: docs/models.md)",
    )
    return parser


def names() -> list[str]:
    """Every ViT of timm's four modules of ViTs, sorted."""
    return sorted(name for module in MODULES for name in timm.list_models(module=module))


def _grouped(block: nn.Module) -> bool:
    attention = getattr(block, "attn", None)
    return getattr(attention, "num_kv_heads", None) not in (None, getattr(attention, "num_heads", None))


def obstacles(model: nn.Module) -> list[str]:
    """Parts of a timm model that a plain ViT does not have and that pruning here cannot describe."""
    block, modules = model.blocks[0], [*model.modules()]
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    mixed = any(isinstance(m, RotaryEmbeddingMixed) for m in modules)
    rotary = "learned (mixed) rotary position embedding" if mixed else "rotary position embedding"
    stem, pool = getattr(model, "patch_embed", getattr(model, "embeds", None)), getattr(model, "attn_pool", None)
    found = {
        f"blocks are {type(block).__name__}": type(block) is not Block,
        f"attention is {type(attention).__name__}": attention is not None and type(attention).__name__ != "Attention",
        "fewer heads of keys than of queries": any(_grouped(b) for b in model.blocks),
        f"MLP is {type(mlp).__name__}": mlp is not None and not isinstance(mlp, MLPS),
        rotary: getattr(model, "rope", None) is not None,
        f"pool is {type(pool).__name__}": pool is not None and type(pool) is not AttentionPoolLatent,
        f"stem is {type(stem).__name__}": stem is not None and not isinstance(stem, PatchEmbed),
    }
    return [obstacle for obstacle, present in found.items() if present]


def _why_not(name: str, error: ModelError) -> str:
    with torch.device("meta"):
        try:
            model = timm.create_model(name, **ONE_BLOCK)
        except AssertionError:  # it says of every block how many heads it has
            model = timm.create_model(name)
    return f"{type(model).__name__}: {'; '.join(obstacles(model))}" if obstacles(model) else str(error)


def row(name: str) -> tuple[str, ...]:
    """Name, taken or not, axes, head, alignment, lean last block, and what is in the way."""
    try:
        model = skeleton(name, **ONE_BLOCK)
    except ModelError as error:
        return name, "no", "", "", "", "", _why_not(name, error)
    alone = left_alone(name, **ONE_BLOCK)
    axes = ", ".join(axis for axis in AXES if axis not in alone)
    reason = why_not_rotated(model)
    alignment = f"sorted: {reason}" if reason else "rotated"
    lean = "yes" if can_be_lean(model) else "no"
    kept = "; ".join(f"{axis} is left alone: {why}" for axis, why in alone.items())
    return name, "yes", axes, str(model.num_classes), alignment, lean, kept


def page() -> str:
    """The whole page."""
    rows = [row(name) for name in names()]
    taken = sum(cells[1] == "yes" for cells in rows)
    modules = ", ".join(f"`{module}`" for module in MODULES)
    columns = ("name", "taken", "axes", "head", "alignment of the embedding", "lean last block", "in the way")
    lines = [columns, ("---",) * len(columns), *((f"`{name}`", *cells) for name, *cells in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    heading = HEADING.format(version=timm.__version__, taken=taken, total=len(rows), modules=modules)
    return f"{heading}\n{table}\n"


def main(args: argparse.Namespace) -> None:
    write_text(args.output, page())
    say(f"written: {args.output}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
