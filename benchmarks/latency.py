"""Predicted against measured speed-up of compact models at latency targets, with widths that this project chooses.

    python -m benchmarks.latency TABLE [--targets 0.54 0.50 0.39 0.19] [--dims-dir DIR] [--measure-batch N]

The table says model, batch, dtype and whether it is compiled. Widths come from a pruning run without training: saliency
of freshly initialised weights on random images, λ as published, groups removed until each target is met.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from latency.table import LatencyTable
from latency.whole import BUILDS, ROUNDS, measure_ratios, random_images
from models import Arch, Masks, ViTDims, build_vit, macs, params
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner
from pruning.saliency import Saliency
from runtime.console import table
from runtime.device import device_name

WINDOW = 2  # steps that saliency is averaged over
STEP_IMAGES = 8


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a table of this device")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.54, 0.50, 0.39, 0.19], help="ratios to dense")
    parser.add_argument(
        "--latency_regularization",
        type=float,
        default=5e-4,
        help="lambda of saliency - lambda x latency (default: %(default)s)",
    )
    parser.add_argument("--prune_per_event", type=int, default=2, help="groups")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measurements of each (default: {ROUNDS})")
    parser.add_argument("--builds", type=int, default=BUILDS, help=f"fresh builds of every model (default: {BUILDS})")
    parser.add_argument("--dims-dir", default="", help="folder to write the widths to, as dims_TARGET.json")
    return parser


def saliency(arch: str, kwargs: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Scores of every unit of a freshly initialised model, from random images and labels."""
    torch.manual_seed(0)
    model = build_vit(arch, **kwargs).to(device).train()
    scores = Saliency(model, model.dims, "taylor_sq", 0.9)
    for _ in range(WINDOW):
        images = random_images(Arch.of(arch, **kwargs), STEP_IMAGES, device)
        labels = torch.randint(model.num_classes, (STEP_IMAGES,), device=device)
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        scores.step()
    return {axis: score.cpu() for axis, score in scores.close_window().items()}  # selection is many small steps


def choose(
    lut: LatencyTable, dense: ViTDims, scores: dict[str, torch.Tensor], target: float, args: argparse.Namespace
) -> tuple[ViTDims, float]:
    """(widths that meet the target, seconds that the selection took)."""
    pruner = GlobalPruner(
        Masks(dense),
        lut,
        PruningConfig().group_sizes(dense),
        regularization=args.latency_regularization,
        target=target,
        per_event=args.prune_per_event,
    )
    begin = time.perf_counter()
    while not pruner.reached and pruner.event(scores).groups:
        pass
    return pruner.masks.dims, time.perf_counter() - begin


def main(args: argparse.Namespace) -> None:
    lut = LatencyTable.load(args.table)
    meta = lut.meta
    arch, kwargs, batch, dtype, compiled = (meta[k] for k in ("model", "model_kwargs", "batch", "dtype", "compile"))
    device = torch.device("cuda" if torch.cuda.is_available() and "thread" not in meta["device"] else "cpu")
    dense = ViTDims.of(build_vit(arch, **kwargs))
    scores = saliency(arch, kwargs, device)
    chosen = [choose(lut, dense, scores, target, args)[0] for target in args.targets]
    for target, dims in zip(args.targets, chosen, strict=True) if args.dims_dir else ():
        (Path(args.dims_dir) / f"dims_{target}.json").write_text(json.dumps(dims.to_dict()))
    ratios, seconds, *_ = outcome = measure_ratios(
        Arch.of(arch, **kwargs), chosen, batch, device, dtype, bool(compiled), rounds=args.rounds, builds=args.builds
    )
    print(outcome.note or "undisturbed")
    rows = []
    for target, dims, measured in zip(args.targets, chosen, ratios, strict=True):
        predicted = lut.ratio(dims, dense)
        rows.append(
            [
                f"{target:g}",
                f"{predicted:.4f}",
                f"{measured:.4f}",
                f"{predicted / measured - 1:+.1%}",
                f"{1 / predicted:.2f}x",
                f"{1 / measured:.2f}x",
                f"{batch / (seconds * measured):,.0f}",
                f"{macs(arch, dims, **kwargs) / 1e9:.2f}",
                f"{params(arch, dims, **kwargs) / 1e6:.1f}",
                str(dims.embed),
            ]
        )
    how = f", compiled ({compiled})" if compiled else ""
    print(
        f"{arch}, {device_name(device)}, batch {batch}, {dtype}{how}, torch {torch.__version__}; dense "
        f"{1e3 * seconds:.2f} ms, {batch / seconds:,.0f} images/s"
    )
    print(
        table(
            [
                "target",
                "predicted",
                "measured",
                "error",
                "predicted speed-up",
                "measured",
                "images/s",
                "GMACs",
                "M params",
                "embed",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
