"""Convert the importance pickles of the published SAViT code into this project's importance files.

    python -m tools.convert_importance PICKLES --model deit_base_patch16_224 --data-set IMNET --output DIR

PICKLES holds criteria_m2l0_final.pickle, …l1…, …l2… and hessian.pickle (optional). A pickle can run any code: only the
classes that a list of numpy arrays is made of are let through. Gradients and Fisher information are not in those files,
so that runs from the result take --hessian_formula published or paper; the weights they were of are not named either,
and so not checked.
"""

from __future__ import annotations

import argparse
import io
import pickle
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
from models import ViTDims
from models.vit import build_vit
from pruning.gates import COMPONENTS, axes_of_component
from pruning.savit import Importance, published_sizes
from recipes import importance_files
from runtime.console import say, say_next
from runtime.errors import BadArguments, Problems
from runtime.folders import make_folder
from runtime.script import run_script
from training.sources import structural_kwargs

PUBLISHED = COMPONENTS[:3]  # heads, mlp, embed: layers 0, 1 and 2
ALLOWED = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
} | {("numpy", "ndarray"), ("numpy", "dtype")}


class ArraysOnly(pickle.Unpickler):
    """Unpickles lists of numpy arrays and nothing else. Raises UnpicklingError for any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
        return super().find_class(module, name)


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python -m tools.convert_importance pickles --model deit_base_patch16_224 --data-set IMNET "
        "--output importance",
        "tools.convert_importance",
    )
    parser.add_argument("pickles", type=Path, help="folder of the published pickles")
    parser.add_argument("--model", required=True, help="timm name of the model that was scored")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action=options.KeyValues,
        default={},
        metavar="K=V",
        help="its timm arguments, num_classes included (default: none)",
    )
    parser.add_argument("--data-set", required=True, help="--data-set of the runs that will read the files")
    parser.add_argument(
        "--pruning_method", type=int, default=2, help="number in the pickles' names (default: %(default)s)"
    )
    parser.add_argument(
        "--hessian_embed",
        type=float,
        default=6.0,
        help="--hessian_embed of the published run, which is inside its pickle (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser


def read_pickle(path: Path) -> Any:
    """Raises ValueError for a file that is missing or holds anything but arrays."""
    try:
        return ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is not a pickle of arrays: {' '.join(str(error).split())}") from None


def scores(folder: Path, dims: ViTDims, method: int) -> dict[str, torch.Tensor]:
    """By axis. Raises ValueError where the arrays are not those of the model."""
    values = {}
    for number, component in enumerate(PUBLISHED):
        path = folder / f"criteria_m{method}l{number}_final.pickle"
        arrays, axes = read_pickle(path), axes_of_component(dims, component)
        shapes = [np.shape(array) for array in arrays]
        if shapes != (expected := [(dims.sizes()[axis],) for axis in axes]):
            raise ValueError(f"{path} is of another model: shapes {shapes[:2]} …, not {expected[:2]} …")
        values |= {axis: torch.from_numpy(np.array(a, dtype=np.float64)) for axis, a in zip(axes, arrays, strict=True)}
    return values


def interactions(path: Path, dims: ViTDims, hessian_embed: float) -> torch.Tensor | None:
    """1'H1 from the published mean over block pairs; its lower triangle, which that code never read, is dropped."""
    if not path.exists():
        return None
    upper = np.triu(np.array(read_pickle(path), dtype=np.float64))
    if upper.shape != (3, 3):
        raise ValueError(f"{path} has shape {upper.shape}, not (3, 3)")
    sizes = published_sizes(dims, hessian_embed)
    c = np.array([sizes[component] for component in PUBLISHED])
    return torch.from_numpy((upper + np.triu(upper, 1).T) * np.outer(c, c))


def main(args: argparse.Namespace) -> None:
    problems = Problems()
    model = problems.attempt(build_vit, args.model, **args.model_kwargs)
    problems.raise_if_any()
    say(f"about to unpickle files of {args.pickles} and of nothing else, letting only numpy arrays through")
    scores_of = problems.attempt(scores, args.pickles, model.dims, args.pruning_method)
    hessian = problems.attempt(interactions, args.pickles / "hessian.pickle", model.dims, args.hessian_embed)
    problems.raise_if_any()
    try:
        make_folder(args.output)
    except ValueError as error:
        raise BadArguments([str(error)]) from None
    zeros = {axis: torch.zeros_like(values) for axis, values in scores_of.items()}
    unknown = None if hessian is None else torch.full_like(hessian, torch.nan)
    record = dict(
        arch=args.model,
        kwargs=structural_kwargs(args.model_kwargs),
        classes=model.num_classes,
        dims=model.dims.to_dict(),
        weights=None,
    )
    none = {axis: value.clone() for axis, value in zeros.items()}  # a file holds no tensor twice
    importance = Importance(PUBLISHED, args.pruning_method, scores_of, zeros, none, hessian, unknown)
    importance_files.save(args.output, importance, record, dict(data_set=args.data_set, converted_from="pickles"))
    say_next(
        f"main_savit.py --finetune WEIGHTS --data-set {args.data_set} --data-path IMAGES --hessian_formula "
        f"published --pruning_pickle_from {shlex.quote(str(args.output))} --output_dir runs/savit"
    )
    say(f"written: {args.output / importance_files.TENSORS}, {args.output / importance_files.DESCRIPTION}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
