"""One readable file that builds a compact model with torch and timm alone, put together from this project's source.

`build`, `load` and `transform` are copied into that file as they stand here, so what is tested is what is shipped.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform
from torch import nn

from models import attention, content, mlps, pooling, tokens, vit
from models.dims import BlockDims
from models.pooling import pool_by_attention_
from models.tokens import COMPRESSIONS, merging
from models.vit import Block

HEADER = '''"""{title}

Needs torch and timm, and nothing else; config.json and model.safetensors lie beside this file.

    from model import load, transform
    model, prepare = load(), transform()
    logits = model(prepare(image).unsqueeze(0))  # image: a PIL image; logits: (1, classes)
"""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import create_transform
from timm.layers import AttentionPoolLatent, DropPath, GluMlp, LayerScale, Mlp
from torch import Tensor, nn

HERE = Path(__file__).parent


class BlockDims(NamedTuple):
    """Widths of one block: 0 heads is no attention branch, 0 mlp no MLP branch."""

    heads: int
    qk: int
    v: int
    mlp: int
    tokens: int
    queries: int | None = None
'''


def build(config: dict[str, Any]) -> nn.Module:
    """The model that config.json describes, with fresh weights: timm's, but for the blocks."""
    blocks = [BlockDims(**block) for block in config["dims"]["blocks"]]
    left, kwargs = iter(blocks), dict(config["arch"]["kwargs"])
    ours = {name: kwargs.pop(name, False) for name in COMPRESSIONS}

    def block(**timm_kwargs: Any) -> Block:
        dims = next(left)
        tokens = merging(dims.tokens, config["tokens"], config["prefix_tokens"], ours)
        return Block(dims=dims, scale=config["scale"], tokens=tokens, **timm_kwargs)

    with torch.device("meta"):
        pool = timm.create_model(config["arch"]["name"], **kwargs).attn_pool
    widths = dict(embed_dim=config["dims"]["embed"], depth=len(blocks)) | (dict(global_pool="") if pool else {})
    model = timm.create_model(
        config["arch"]["name"],
        **kwargs | widths,
        block_fn=block,
    )
    if pool:
        pool_by_attention_(model, pool)
    if ours["lean_last"] and blocks:
        model.blocks[-1].num_queries = config["prefix_tokens"]
    return model


def load(folder: Path) -> nn.Module:
    """The model with its weights, in eval mode: images (B, 3, H, W) -> logits (B, classes)."""
    model = build(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def transform(folder: Path) -> Callable:
    """What prepares a PIL image for the model."""
    return create_transform(**json.loads((folder / "config.json").read_text())["preprocess"])


def definitions(module: ModuleType, names: set[str] | None = None) -> str:
    """Source of a module's classes, functions and constants (of those `names` alone), with comments; no imports."""
    source = inspect.getsource(module)
    lines, parts, begin = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        called = {getattr(node, "name", None)} | {t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)}
        wanted = not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
        if wanted and (names is None or called & names):
            parts.extend(lines[begin : node.end_lineno])
        begin = node.end_lineno
    return "\n".join(parts)


def source(title: str) -> str:
    """The text of model.py."""
    ours = (f.replace("folder: Path", "folder: Path = HERE") for f in map(inspect.getsource, (build, load, transform)))
    compression = definitions(tokens, {"SKIPPED", "COMPRESSIONS", "evenly", "TokenMerge", "DenseTokenMerge", "merging"})
    parts = [
        HEADER.format(title=title),
        definitions(attention),
        definitions(content),
        compression,
        definitions(mlps, {"sized_mlp"}),
        definitions(vit, {"Attention", "Block"}),
        definitions(pooling),
        *ours,
    ]
    return "\n\n\n".join(part.strip() for part in parts) + "\n"
