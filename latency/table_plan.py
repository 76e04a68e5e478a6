"""What a latency table is measured for, and at which widths: from arguments to values, with all mistakes named."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latency.measure import DTYPES
from latency.points import GROUPS, grid_of
from latency.runtimes import Command, OnnxRuntime
from latency.stage import PUBLISHED_POINTS
from models import Arch, SwinDims
from models.pretrained import read_initial
from models.swin_dims import Dims
from options.parser import key_values

POINTS = dict(embed=7, heads=6, qk=5, v=5, mlp=13)
POINTS_FINE = dict(embed=8, heads=6, qk=8, v=8, mlp=16)  # of a narrow model, which is quick to measure
POINTS_CUDA = dict(embed=6, heads=6, qk=8, v=8, mlp=17)  # kernels step with the head width
POINTS_DEAR = dict(embed=3, heads=3, qk=3, v=3, mlp=4)  # where every point is compiled or exported: seconds each
POINTS_STAGE = dict(embed=5, heads=4, qk=4, v=4, mlp=8)  # of a Swin Transformer, which has several stages
NARROW = 128  # embedding
MAX_LEAVES = 200_000


def read_arch(args: Any) -> Arch:
    """The model: its points are blocks in which every token is a query, even if a checkpoint compresses them.

    Raises ValueError (ModelError for an unknown model).
    """
    name, kwargs = args.model, {}
    if args.initial_checkpoint:
        stored, kwargs, _ = read_initial(args.initial_checkpoint)
        name = name or stored
    if not name:
        raise ValueError("--model or --initial-checkpoint is needed")
    arch = Arch.of(name, **kwargs | key_values(args.model_kwargs, "--model-kwargs")).plain
    sizes = {k: v for k, v in dict(img_size=args.input_size, num_classes=args.num_classes).items() if v is not None}
    arch = replace(arch.with_kwargs(**sizes), merge=args.merge if arch.merges_tokens else "place")
    return arch


def grid_for(args: Any, dims: Dims | None, fixed: Collection[str] = (), prefix: int = 0) -> dict[str, Any]:
    """The points of every axis, of a Swin Transformer by stage; only their number is checked where there are no `dims`.

    Raises ValueError.
    """
    given = key_values(args.points, "--points")
    if odd := [f"{axis}={n}" for axis, n in given.items() if axis not in GROUPS or type(n) is not int or n < 2]:
        raise ValueError(f"--points: {' '.join(odd)}: expected whole numbers above 1 for {', '.join(GROUPS)}")
    stages = len(dims.stages) if dims else 1
    usual = POINTS_CUDA if args.device == "cuda" else POINTS
    if isinstance(dims, SwinDims):
        usual = POINTS_STAGE
    elif dims and args.device != "cuda" and dims.embed <= NARROW:
        usual = POINTS_FINE
    counts = (POINTS_DEAR if args.compile or args.runtime else usual) | given
    attention = math.prod(n for axis, n in counts.items() if axis != "mlp") * (1 + len(args.tokens))
    if (total := stages * (attention + math.prod(PUBLISHED_POINTS.values()))) > MAX_LEAVES:
        raise ValueError(f"--points: {total:,} combinations, of at most {MAX_LEAVES:,}")
    if not dims:
        return {}
    grid = grid_of(counts, dims, fixed)
    if isinstance(dims, SwinDims):
        return grid
    own = dims.blocks[0].tokens
    if odd := [n for n in args.tokens if not prefix < n <= own]:
        raise ValueError(f"--tokens must be from {prefix + 1} to the model's {own}, not {odd[0]}")
    return grid | (dict(tokens=sorted({*args.tokens, own})) if args.tokens else {})


def runtime_of(args: Any) -> OnnxRuntime | Command | None:
    """Where ONNX files are measured, None for torch. Raises ValueError."""
    match args.runtime:
        case []:
            return None
        case ["onnxruntime"]:
            return OnnxRuntime(args.device, torch.get_num_threads())
        case ["command", line]:
            return Command(line)
    raise ValueError("--runtime must be onnxruntime, or command 'CMD {onnx}'; not " + " ".join(args.runtime))


def _check_plain(args: Any, arch: Arch) -> None:
    """Raises ValueError where a flag is for plain ViTs and the model is none."""
    if arch.is_swin and (flags := [f"--{name}" for name in ("tokens", "runtime") if getattr(args, name)]):
        raise ValueError(f"{' and '.join(flags)}: for plain ViTs, not for {arch.name}, a Swin Transformer")


def find_problems(args: Any) -> list[str]:
    """Everything that is wrong with the arguments, one line each."""
    problems = []
    for axis, minimum in dict(batch_size=1, rounds=2, input_size=1, num_classes=0).items():
        if (value := getattr(args, axis)) is not None and value < minimum:
            problems.append(f"--{axis.replace('_', '-')} must be at least {minimum}, not {value}")
    if args.dtype not in DTYPES:
        problems.append(f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype}")
    if args.device not in ("cpu", "cuda"):
        problems.append(f"--device must be cpu or cuda, not {args.device}")
    elif args.device == "cuda" and not torch.cuda.is_available() and not args.runtime:
        problems.append("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.merge == "content" and not args.tokens:
        problems.append("--merge content goes with --tokens N …, the counts of blocks that merge")
    if args.runtime and args.compile:
        problems.append("--compile is torch's; it does not go with --runtime")
    folder = Path(args.output).resolve().parent
    if not os.access(folder, os.W_OK) or Path(args.output).is_dir():
        missing = "" if folder.is_dir() else f": there is no folder {folder}"
        problems.append(f"--output: cannot write {args.output}{missing}")
    arch = _attempt(problems, read_arch, args)
    prefix = 0
    dims = _attempt(problems, lambda: arch.dims) if arch else None  # None: there is no such model
    if dims:
        _attempt(problems, _check_plain, args, arch)
        prefix = arch.prefix
    _attempt(problems, grid_for, args, dims, (), prefix)
    _attempt(problems, runtime_of, args)
    return problems


def _attempt(problems: list[str], check: Callable, *args: Any) -> Any:
    """The check's result, or None with its complaint noted."""
    try:
        return check(*args)
    except ValueError as error:
        problems.append(str(error))
        return None
