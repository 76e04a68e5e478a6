"""Dense weights as other programs save them, brought to timm's names and to the shapes of a model.

`extract` finds the state dict of a file and its names, `adapt` hands it to timm's own filter of the model, which
resamples positions and patches. Both return what they did as sentences, for the screen.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from typing import Any

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from files.checkpoint import CheckpointError

State = dict[str, Tensor]
AVERAGES = ("state_dict_ema", "model_ema", "teacher")  # keys of moving averages; DINO's teacher is one of the student
PLACES = ("state_dict", "model", "model_state_dict", "teacher", "student")  # keys of weights, the likelier first
STEM = "patch_embed.proj.weight"
THEIR_STEM = re.compile(r"(.*\.)?embeddings\.patch_embedding(s\.projection)?\.weight")  # transformers'
WRAPPERS = {"module", "_orig_mod", "model", "backbone", "net", "network", "student", "teacher"}
LEFT_OVER = re.compile(
    r"(mask_token|n_averaged|decoder.*|pooler\..*|pre_logits\..*|position_ids|"
    r"head\.(mlp|last_layer)\b.*|attn_pool\..*)"  # of pretraining, and SigLIP's pooling by attention
)
EMA = re.compile(r"(^|[._])ema([._]|$)")
TOKENS = ("cls_token", "dist_token", "reg_token")
TRANSFORMERS = (  # their names, and timm's (of DINOv2: its authors', which timm's filter takes)
    (r"^embeddings\.patch_embedding(s\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"^pre_layrnorm\.", "norm_pre."),  # CLIP's spelling
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^head\.probe$", "attn_pool.latent"),  # SigLIP's pool
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
QKV = re.compile(
    r"(blocks\.\d+\.)(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)\.(weight|bias)"
)
PAIR = re.compile(r"(blocks\.\d+\.mlp\.)(gate|up)_proj\.(weight|bias)")  # of gated MLPs since version 5
RANKS = dict(pos_embed=3, cls_token=3)  # dimensions that timm has
KINDS = (  # a pattern of names that cannot be read here, and whose they are
    (r"encoder_layer_\d+\.", "torchvision's names of a ViT"),
    (r"transformer\.resblocks\.", "CLIP's names"),
    (r"encoder\.layers\.\d+\.blocks\.", "Hugging Face's names of a Swin Transformer"),
    (r"(^|\.)encoder\.layer\.\d+\.", "Hugging Face's names"),
    (r"^layers\.\d+\.blocks\.", "names of a Swin Transformer"),
    (r"^stages\.\d+\.", "names of a model in stages"),
    (r"^layer[1-4]\.\d+\.", "names of a ResNet"),
    (r"^features\.\d+\.", "torchvision's names of a CNN"),
    (r"^lora_|\.lora_[AB]\.", "LoRA's adapters, not the weights they go with"),
    (r"^model\.", "Lightning's names"),
)


def is_state(value: Any) -> bool:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def extract(content: dict[str, Any], path: str, ema: bool = False) -> tuple[State, list[str]]:
    """The weights of a file that another program wrote, under timm's names as far as these are known.

    ema: the moving average. Raises CheckpointError where there are none, or several and it is not clear which.
    """
    key, state = _place(content, path, ema)
    notes = [] if key in ("", "state_dict", "model") else [f"{path}: {key} taken"]
    state = clean_state_dict(state)
    state, left = _transformers(state) or _unprefixed(state, path, ema or key in AVERAGES)
    if left:
        notes.append(f"{path}: left out {some(left)}")
    return state, notes


def _place(content: dict[str, Any], path: str, ema: bool) -> tuple[str, State]:
    """(key, state dict); the key is '' where the file is the state dict itself."""
    if ema:
        if key := next((key for key in AVERAGES if is_state(content.get(key))), ""):
            return key, content[key]
        if not any(EMA.search(name) for name in _names(content)):  # else `_unprefixed` chooses among the names
            raise CheckpointError(f"--use-ema: {path} holds no moving average of the weights")
    if is_state(content):
        return "", content
    keys = [key for key, value in content.items() if is_state(value) and key not in ("optimizer", "masks")]
    known = [key for key in PLACES if key in keys]
    if known or len(keys) == 1:
        return (key := (known or keys)[0]), content[key]
    names = ", ".join(map(str, [*content][:6]))
    held = f"it holds several: {', '.join(keys)}" if keys else f"it holds {names or 'nothing'}"
    raise CheckpointError(
        f"{path} holds no state dict: expected the keys arch, kwargs and model, or model or state_dict alone, "
        f"or tensors by name; {held}"
    )


def _names(content: dict[str, Any]) -> list[str]:
    inner = [content[key] for key in PLACES if is_state(content.get(key))]
    return [str(name) for state in (inner or [content]) for name in state]


def _unprefixed(state: State, path: str, ema: bool) -> tuple[State, list[str]]:
    """(the weights without what wraps them, names of tensors beside them)."""
    prefixes = sorted({n.removesuffix(STEM) for n in state if n == STEM or n.endswith(f".{STEM}")})
    if "" in prefixes:
        return state, []
    if len(prefixes) > 1:
        averages = [p for p in prefixes if EMA.search(p) or "teacher" in p]
        prefixes = averages if ema else [p for p in prefixes if p not in averages]
        if len(prefixes) != 1:
            found = ", ".join(p.rstrip(".") for p in prefixes) or "moving averages alone: give --use-ema"
            raise CheckpointError(f"{path} holds several models ({found}): save the one that is meant")
    if not prefixes:  # no ViT: take off what most names share
        first, count = Counter(name.partition(".")[0] for name in state).most_common(1)[0]
        if first not in WRAPPERS or 2 * count <= len(state):
            return state, []
        prefixes = [f"{first}."]
    inner = {k.removeprefix(prefixes[0]): v for k, v in state.items() if k.startswith(prefixes[0])}
    left = [name for name in state if not name.startswith(prefixes[0])]
    deeper, more = _unprefixed(clean_state_dict(inner), path, ema)
    return deeper, left + more


def _rejoin_(out: State, parts: dict[str, State]) -> None:
    """Put layers that timm has in one, or apart, into `out`: `parts` by timm's name and kind, and SigLIP's pool."""
    for kind in ("weight", "bias"):
        if (rows := out.pop(f"head.attention.in_proj_{kind}", None)) is not None:  # of q, k and v
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = rows.split([len(rows) // 3, len(rows) // 3 * 2])
    for name, of in parts.items():
        kinds = ("gate", "up") if ".mlp." in name else ("q", "k", "v")
        if len(of) == len(kinds):
            out[name] = torch.cat([of[kind] for kind in kinds])


def _transformers(state: State) -> tuple[State, list[str]] | None:
    """As `_unprefixed`, where the names are Hugging Face transformers', of any version; else None."""
    prefixes = [(match[1] or "") for name in state if (match := THEIR_STEM.fullmatch(name))]
    layers = re.compile(r"(encoder\.)?layers?\.0\.")
    if not prefixes or not any(layers.match(name.removeprefix(prefixes[0])) for name in state):
        return None
    prefix = prefixes[0]
    outer = prefix.rpartition(".")[0].rpartition(".")[0]  # Lightning's model.vit.… has its classifier beside vit
    outer = f"{outer}." if outer else ""
    out, parts, left = {}, {}, []
    for name, value in state.items():
        short = name.removeprefix(prefix)
        if short == name and prefix:
            short = name.removeprefix(outer)
            if "classifier." not in short:
                left.append(name)
                continue
        for pattern, timms in TRANSFORMERS:
            short = re.sub(pattern, timms, short)
        if match := QKV.fullmatch(short):
            parts.setdefault(f"{match[1]}attn.qkv.{match[3]}", {})[match[2]] = value
        elif match := PAIR.fullmatch(short):
            parts.setdefault(f"{match[1]}w12.{match[3]}", {})[match[2]] = value
        else:
            out[short] = value[(None,) * max(0, RANKS.get(short, 0) - value.dim())]
    _rejoin_(out, parts)
    return out, left


def adapt(state: State, model: nn.Module, name: str, path: str) -> tuple[State, list[str]]:
    """A state dict for timm's model `name`, of which `model` may be without storage, by timm's own filter.

    Positions and patches of another size are resampled, positions of prefix tokens are moved to where the model has
    them, what only pretraining needs is left out. Raises CheckpointError.
    """
    before, notes = dict(state), []
    try:
        if getattr(model, "pos_embed", None) is not None and "pos_embed" in state:
            state, notes = _move_prefix(before, model, path)
        module = sys.modules[timm.model_entrypoint(name).__module__]
        if chosen := getattr(module, "checkpoint_filter_fn", None):
            scales = dict(adapt_layer_scale=True) if any(".gamma_" in key for key in state) else {}
            state = chosen(dict(state), model, **scales)
    except (AttributeError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"the weights of {path} do not fit {name}: {reason}{kind(before)}") from None
    for key, what in (("pos_embed", "position embedding"), (STEM, "patch embedding")):
        moved = key == "pos_embed" and "register_tokens" in before  # DINOv2's class token has taken its position
        was, now = (t[key].shape[1:] if key in t and t[key].dim() > 2 else () for t in (before, state))
        if was and now and was != now and not (moved and was[0] == now[0] + 1):
            notes.append(f"{path}: {what} resampled from {_size(before[key])} to {_size(state[key])}")
    own = model.state_dict()
    left = [k for k in state if k not in own and LEFT_OVER.fullmatch(k)]
    if extra := [k for k in TOKENS if k in state and k not in own]:  # of another recipe of the same blocks
        left += extra + [k for k in state if k.startswith("head_dist.") and k not in own]
    if left:
        notes.append(f"{path}: left out {some(left)}: {name} has none")
    return {k: v for k, v in state.items() if k not in left}, notes


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[1]} tokens" if tensor.dim() == 3 else "x".join(map(str, tensor.shape[-2:]))


def _move_prefix(state: State, model: nn.Module, path: str) -> tuple[State, list[str]]:
    """Positions for as many prefix tokens as the model has, from those of a file with others."""
    positions = state["pos_embed"]
    if positions.dim() != 3 or positions.shape[0] != 1:
        return state, []
    wanted = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    held = sum(state[k].shape[1] for k in TOKENS if k in state and state[k].dim() == 3)
    held += state["register_tokens"].shape[1] if "register_tokens" in state else 0
    total = positions.shape[1]
    possible = [n for n in dict.fromkeys((wanted, held, 0, 1, 2)) if math.isqrt(max(0, total - n)) ** 2 == total - n]
    if wanted in possible or not possible or "register_tokens" in state:
        return state, []  # timm's filter knows what to do
    held = possible[0]
    prefix, grid = positions[:, :held], positions[:, held:]
    if not wanted and held and "cls_token" in state:  # timm adds none: the class token brings its own
        tokens = [k for k in TOKENS if k in state]
        parts = prefix.split([state[k].shape[1] for k in tokens], 1) if held > 1 else [prefix]
        moved = dict(pos_embed=grid) | {k: state[k] + part for k, part in zip(tokens, parts, strict=False)}
    else:
        filled = torch.zeros(1, max(0, wanted - held), positions.shape[-1], dtype=positions.dtype)
        moved = dict(pos_embed=torch.cat([prefix[:, :wanted], filled, grid], 1))
    return state | moved, [f"{path}: positions of {held} prefix tokens, the model has {wanted}"]


def some(names: list[str]) -> str:
    """Three names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def kind(state: State) -> str:
    """What a state dict looks like, as the end of a message; '' for nothing that is known."""
    for pattern, whose in KINDS:
        if any(re.search(pattern, name) for name in state):
            return f"; these are {whose}"
    stem = state.get(STEM)
    if stem is None or stem.dim() != 4:
        return ""
    depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    pooled = ", averaged (global_pool=avg)" if "fc_norm.weight" in state and "norm.weight" not in state else ""
    return f"; the file's model has embedding {stem.shape[0]}, {depth} blocks, patches of {stem.shape[-1]}{pooled}"


def _plural(what: str, count: int) -> str:
    first, space, rest = what.partition(" ") if what.startswith(("name ", "tensor ")) else (what, "", "")
    return f"{first}{'s' * (count != 1)}{space}{rest}"


def mismatch(own: State, state: State) -> str:
    """Why a state dict does not fit a model's, '' where it does: how many names and shapes, and three of each."""
    lacking = [k for k in own if k not in state]
    odd = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(v.shape)}, not {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    whole = [k for k, v in state.items() if k in own and own[k].is_floating_point() > v.is_floating_point()]
    lists = (
        ("missing name", lacking),
        ("name without a place", odd),
        ("other shape", shapes),
        ("tensor of whole numbers, as if quantised", whole),
    )
    parts = [f"{len(names):,} {_plural(what, len(names))}: {some(names)}" for what, names in lists if names]
    return "; ".join(parts) + kind(state) if parts else ""
