"""Import a published NViT checkpoint: python -m tools.convert PUBLISHED.pth OUTPUT.pth

Reads the dense layout of the published code (`dim`, and separate Q, K, V layers) and writes a checkpoint of this
project, which `models.load_dense`, finetune_dense.py and everything else take.
"""
from __future__ import annotations

import argparse
import re
from typing import Any

import torch
from torch import Tensor

import checkpoint
from models import ViTDims, build_vit, params
from models.dims import DimsError
from models.pretrained import from_checkpoint
from utils import BadArguments, run_script, say, warn

ARCH = "deit_base_distilled_patch16_224"  # the only one that the published code has
DIM_KEYS = ("EMB", "head", "QK", "V", "MLP")
_LAYER = re.compile(r"(blocks\.\d+\.attn\.)([QKV])\.(weight|bias)")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", metavar="PUBLISHED.pth", help="checkpoint of the published NViT code")
    parser.add_argument("output", metavar="OUTPUT.pth", help="where the converted checkpoint is written")
    return parser


def read(path: str) -> dict[str, Any]:
    """Tensors and plain values; of classes, argparse.Namespace alone, which published checkpoints hold."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return checkpoint.read(path)


def to_timm(state: dict[str, Tensor], patch: int) -> tuple[dict[str, Tensor], float]:
    """(timm's names and shapes, the largest distance of a token mask from 1).

    The published stem is a 1 x 1 convolution over patches laid out as (row, column, colour); timm's is a convolution of
    (colour, row, column). Q, K, V become the fused qkv. Token masks scale the rows of Q, K and V of a token: they are
    trained but never prune, have no place in a plain ViT, and are left out.
    """
    fused: dict[str, dict[str, Tensor]] = {}
    out, off = {}, 0.0
    for name, value in state.items():
        if "token_mask" in name:
            off = max(off, (value - 1).abs().max().item())
        elif match := _LAYER.fullmatch(name):
            fused.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2]] = value
        elif name == "patch_embed.proj.weight" and value.shape[1] != 3:
            stem = value.reshape(len(value), patch, patch, -1)
            out[name] = stem.permute(0, 3, 1, 2).contiguous()
        else:
            out[name] = value
    for name, parts in fused.items():
        if set(parts) != set("QKV"):
            raise ValueError(f"{name} lacks {', '.join(sorted(set('QKV') - set(parts)))}")
        out[name] = torch.cat([parts[letter] for letter in "QKV"])
    return out, off


def convert(content: dict[str, Any], path: str) -> tuple[dict[str, Any], float]:
    """(the keys of a checkpoint of this project, what the token masks were off by). Raises ValueError."""
    if "channels" in content:
        raise ValueError(f"{path} is a Prune-and-Merge checkpoint: its token matrices have no place in a dense model")
    dim, state = content.get("dim"), content.get("model")
    if not isinstance(dim, dict) or any(key not in dim for key in DIM_KEYS) or not isinstance(state, dict):
        raise ValueError(f"{path} is no dense checkpoint of the published NViT code: it needs the keys model and dim, "
                         f"and {', '.join(DIM_KEYS)} in dim")  # fmt: skip
    classes = len(state["head.bias"]) if "head.bias" in state else 1000
    parent = build_vit(ARCH, num_classes=classes)
    try:
        dims = ViTDims.from_dim({key: dim[key] for key in DIM_KEYS}, parent.dims.blocks[0].tokens)
    except DimsError as error:
        raise ValueError(f"{path}: {error}") from None
    model, off = to_timm(state, parent.patch_embed.patch_size[0])
    epoch = content.get("epoch")
    keys = dict(
        arch=dict(name=ARCH, kwargs=dict(num_classes=classes)), dims=dims.to_dict(), dim=dims.to_dim(), model=model,
        epoch=epoch if isinstance(epoch, int) else None, metrics={}, args={},
    )  # fmt: skip
    return keys, off


def main(args: argparse.Namespace) -> None:
    try:
        keys, off = convert(read(args.published), args.published)
        from_checkpoint(dict.fromkeys(checkpoint.KEYS) | keys, args.published)  # it must load
    except ValueError as error:
        raise BadArguments([str(error)]) from None
    if off > 1e-3:
        warn(f"token masks are up to {off:.3f} from 1 and are left out: outputs differ from the published model's")
    checkpoint.save(args.output, **keys)
    dims = ViTDims.from_dict(keys["dims"])
    say(f"{args.output}: {params(ARCH, dims, **keys['arch']['kwargs']):,} parameters, widths {dims.to_dim()}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
