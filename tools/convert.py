"""Import weights: python -m tools.convert PUBLISHED.pth OUTPUT.pth

Reads the dense layout of NViT's code (`dim`, and separate Q, K, V layers), the token matrices of Prune and Merge's
(`channels`), or dense weights as timm, Hugging Face and others save them (--model says of which model). Writes a
checkpoint of this project, which `models.load_dense`, finetune_dense.py and everything else take.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import replace
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor

import options
from files import checkpoint
from loading.preparation import Preparation
from models import ViTDims, build_vit, params, skeleton
from models.dims import DimsError
from models.pretrained import from_checkpoint
from runtime.console import say, say_next, warn
from runtime.errors import BadArguments
from runtime.script import run_script
from training.full_model import read_full_model
from training.preparing import of_weights
from training.sources import Source

ARCH = "deit_base_distilled_patch16_224"  # the only one that the published code has
DIM_KEYS = ("EMB", "head", "QK", "V", "MLP")
PM_ARCHS = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
PM_NAMES = dict(merge_matrix="merge_matrix", recover_matrix="reconstruct_matrix", token_mask="skip")
_LAYER = re.compile(r"(blocks\.\d+\.attn\.)([QKV])\.(weight|bias)")


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__, "example: python -m tools.convert published.pth nvit_b.pth", "tools.convert")
    parser.add_argument("published", metavar="FILE", help="checkpoint of the published code, or dense weights")
    parser.add_argument("output", metavar="OUTPUT.pth", help="where the converted checkpoint is written")
    parser.add_argument(
        "--model", metavar="NAME", default=None, help="timm name of dense weights' model (default: the file's)"
    )
    parser.add_argument(
        "--model-kwargs",
        metavar="K=V",
        nargs="+",
        action=options.KeyValues,
        default={},
        help="timm arguments of that model, e.g. img_size=32 patch_size=4 (default: none)",
    )
    parser.add_argument(
        "--use-ema", action="store_true", help="take the moving average of dense weights (default: off)"
    )
    return parser


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


def of_nvit(content: dict[str, Any], path: str) -> tuple[dict[str, Any], float]:
    """(the keys of a checkpoint of this project, what the token masks were off by). Raises ValueError."""
    dim, state = content.get("dim"), content.get("model")
    if not isinstance(dim, dict) or any(key not in dim for key in DIM_KEYS) or not isinstance(state, dict):
        raise ValueError(
            f"{path} is no checkpoint of the published NViT or Prune-and-Merge code: it needs the keys "
            f"model and dim, and {', '.join(DIM_KEYS)} in dim, or model and channels; for dense weights give "
            "--model NAME"
        )
    classes = len(state["head.bias"]) if "head.bias" in state else 1000
    parent = build_vit(ARCH, num_classes=classes)
    try:
        dims = ViTDims.from_dim({key: dim[key] for key in DIM_KEYS}, parent.dims.blocks[0].tokens)
    except DimsError as error:
        raise ValueError(f"{path}: {error}") from None
    model, off = to_timm(state, parent.patch_embed.patch_size[0])
    return dict(arch=dict(name=ARCH, kwargs=dict(num_classes=classes)), dims=dims, model=model), off


def of_pm_vit(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The keys of a checkpoint of this project. Raises ValueError.

    Token matrices keep every entry. A block with all of its tokens has none here: theirs must be identities. The
    published bias of the attention logits is never used, and left out.
    """
    channels, state = content["channels"], content.get("model")
    if not isinstance(state, dict) or "cls_token" not in state or "head.bias" not in state:
        raise ValueError(f"{path} is no Prune-and-Merge checkpoint: it needs a state dict under model")
    arch = PM_ARCHS.get(state["cls_token"].shape[-1])
    kwargs = dict(num_classes=len(state["head.bias"]), dense_merge=True)
    dims = ViTDims.of(skeleton(arch, **kwargs)) if arch else None
    if dims is None or not isinstance(channels, list | tuple) or len(channels) != len(dims.blocks):
        raise ValueError(f"{path} is none of the published models, DeiT-T, -S and -B with one count per block")
    try:
        dims = ViTDims(dims.embed, tuple(replace(b, tokens=n) for b, n in zip(dims.blocks, channels, strict=True)))
    except DimsError as error:
        raise ValueError(f"{path}: {error}") from None
    model = {}
    for name, value in state.items():
        *block, last = name.split(".")
        if last not in PM_NAMES or block[-1] != "attn":
            model.update({} if name.endswith("attn.bias") else {name: value})
        elif value.shape[0] == value.shape[-1] and value.dim() == 2:
            if not torch.allclose(value, torch.eye(len(value))):
                raise ValueError(f"{path}: {name} mixes tokens but leaves as many as there were: no place for it here")
        elif channels[int(block[1])] < len(state["pos_embed"][0]):
            model[".".join([*block[:-1], "tokens", PM_NAMES[last]])] = value if value.dim() == 2 else value == 0
    return dict(arch=dict(name=arch, kwargs=kwargs), dims=dims, model=model)


def of_dense(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of a checkpoint of this project, without a classifier where the weights have none. Raises ValueError."""
    full = read_full_model(Source(args.model, args.model_kwargs, weights=args.published, ema=args.use_ema))
    classes = len(full.state.get("head.weight", ()))
    full = full.with_kwargs(num_classes=classes)
    if classes:
        full.check_classifier()
    else:
        say(f"{args.published} has no classifier: converted as a model without one")
    model = full.build()
    prepared = of_weights(full).record
    return dict(arch=full.arch.record, dims=model.dims, model=model.state_dict(), data_config=prepared)


def convert(content: dict[str, Any], path: str) -> tuple[dict[str, Any], float]:
    """(the keys of a checkpoint of this project, what NViT's token masks were off by). Raises ValueError."""
    if isinstance(content.get("model"), dict):
        content = content | dict(model=clean_state_dict(content["model"]))
    return (of_pm_vit(content, path), 0.0) if "channels" in content else of_nvit(content, path)


def complete(keys: dict[str, Any], epoch: Any) -> dict[str, Any]:
    """With what every checkpoint has."""
    dims = keys["dims"]
    epoch = epoch if isinstance(epoch, int) else None
    if "data_config" not in keys:  # published code prepares images as DeiT's does
        size = skeleton(keys["arch"]["name"], **keys["arch"]["kwargs"]).patch_embed.img_size[0]
        keys = keys | dict(data_config=Preparation.usual(size).record)
    return keys | dict(dims=dims.to_dict(), dim=dims.to_dim(), epoch=epoch, metrics={}, args={})


def main(args: argparse.Namespace) -> None:
    try:
        content, off = checkpoint.read(args.published), 0.0
        if {"dim", "channels"} & set(content) or not (args.model or isinstance(content.get("arch"), str)):
            keys, off = convert(content, args.published)
        else:
            keys = of_dense(args)
        keys = complete(keys, content.get("epoch"))
        from_checkpoint(dict.fromkeys(checkpoint.KEYS) | keys, args.published)  # it must load
    except ValueError as error:
        raise BadArguments([str(error)]) from None
    if off > 1e-3:
        warn(f"token masks are up to {off:.3f} from 1 and are left out: outputs differ from the published model's")
    checkpoint.save(args.output, **keys)
    dims = ViTDims.from_dict(keys["dims"])
    arch, kwargs = keys["arch"]["name"], keys["arch"]["kwargs"]
    counts = sorted({b.tokens for b in dims.blocks})
    say_next(f"finetune_dense.py --eval --finetune {shlex.quote(args.output)} --data-path IMAGENET")
    say(
        f"{args.output}: {arch}, {params(arch, dims, **kwargs):,} parameters, widths {dims.to_dim()}, "
        f"{counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} tokens"
    )


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
