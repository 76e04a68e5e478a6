"""What several processes compute together, each from its share of the images; run as one of them by test_two_ranks."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import Masks, build_vit, compact
from pruning import pm_vit
from pruning.align import align_
from pruning.config import PruningConfig
from pruning.gate_saliency import GateSaliency
from pruning.gates import Gates
from pruning.objective import Features
from pruning.pricing import price
from pruning.probe import block_curves
from pruning.refit import refit_
from pruning.token_saliency import TokenSaliency
from recipes.savit_scoring import Scoring
from runtime.precision import Precision

Shares = list[tuple[Tensor, Tensor]]  # images (n, 3, S, S) and labels (n,) of every process, or of this one
OFF = torch.amp.GradScaler("cpu", enabled=False)
HELD = 4  # of a share of 40: a refit holds out the first tenth


def aligned(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    align_(model.double(), [images.double() for images, _ in shares])
    return model.state_dict()


def prices(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    fit, judge = (torch.cat([images[part] for images, _ in shares]) for part in (slice(24), slice(24, None)))
    curves = block_curves(model, fit, judge, PruningConfig().group_sizes(model.dims), 8)
    return {
        f"blocks.{i}.{axis}": torch.tensor(list(curve.values()))
        for i, found in enumerate(curves)
        for axis, curve in found.items()
    }


def priced(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    """By the second order. Images of one process are in the order in which several number theirs."""
    images = torch.stack([images[:32] for images, _ in shares], 1).flatten(0, 1)
    blocks, embed = price(model, images, PruningConfig().group_sizes(model.dims), 8)
    curves = {f"blocks.{i}.{axis}": curve for i, found in enumerate(blocks) for axis, curve in found.items()}
    return {name: torch.tensor(list(curve.values())) for name, curve in (curves | dict(embed=embed)).items()}


def variances(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    """Scales of the objective of features."""
    return dict(scale=Features.of(model, torch.cat([images for images, _ in shares]), 8, "all").scale)


def cut_half(model: VisionTransformer, grid: tuple[int, int] | None = None) -> Masks:
    """Masks without the first half of every axis, or of the patches of a grid."""
    masks = Masks(model.dims, grid=grid)
    for axis, n in masks.sizes().items():
        if axis.endswith(".tokens") or not grid:
            masks.remove(axis, torch.arange(n // 2))
    return masks


def refitted(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    masks = cut_half(model)
    small = compact(model, masks)
    images = [images[part] for part in (slice(HELD), slice(HELD, None)) for images, _ in shares]
    unseen = torch.cat([images[-8:] for images, _ in shares])
    divergence = refit_(model, small, masks, torch.cat(images), 8, unseen=unseen)
    return small.state_dict() | dict(divergence=torch.tensor(divergence))


def scored(model: VisionTransformer, shares: Shares, kind: type) -> dict[str, Tensor]:
    """By the gradients of one training step."""
    masks = cut_half(model, model.patch_embed.grid_size if kind is TokenSaliency else None)
    masks.install_(model)
    of_gates = ("gates",) if kind is GateSaliency else ()
    saliency = kind(model, masks, *of_gates, 0.0, OFF)
    images, labels = map(torch.cat, zip(*shares, strict=True))
    F.cross_entropy(model(images), labels).backward()
    saliency.step()
    return saliency.close_window()


def received(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    """Scores of patches by Prune and Merge."""
    batch = tuple(map(torch.cat, zip(*shares, strict=True)))
    scores = pm_vit.measure_importance(
        model, [0, 1], [batch], lambda images, labels: F.cross_entropy(model(images), labels, reduction="sum")
    )
    return dict(scores=scores)


def of_savit(model: VisionTransformer, shares: Shares) -> dict[str, Tensor]:
    args = Namespace(mixup=0, cutmix=0, cutmix_minmax=None, smoothing=0, need_hessian=False, hessian_error=0.1)
    args = Namespace(**vars(args), hessian_form="exact", pruning_layers=("heads", "mlp", "embed"), pruning_method=6)
    args = Namespace(**vars(args), distillation_type="none", distillation_alpha=0.5, distillation_tau=1.0)
    scoring = Scoring(args, model.requires_grad_(False), None, Precision(torch.device("cpu"), None))
    with Gates(model).attach() as gates:
        scoring.see(gates, shares)
    return scoring.importance().scores


TOGETHER: dict[str, Callable[[VisionTransformer, Shares], dict[str, Tensor]]] = dict(
    aligned=aligned,
    prices=prices,
    priced=priced,
    variances=variances,
    refitted=refitted,
    tokens=lambda model, shares: scored(model, shares, TokenSaliency),
    gates=lambda model, shares: scored(model, shares, GateSaliency),
    received=received,
    savit=of_savit,
)


def compute(kwargs: dict, state: dict[str, Tensor], shares: Shares) -> dict[str, dict[str, Tensor]]:
    """Results of everything in TOGETHER, of a model by its arguments and weights."""
    model = build_vit(**kwargs).eval()
    model.load_state_dict(state)
    return {name: function(copy.deepcopy(model), shares) for name, function in TOGETHER.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    given = torch.load(folder / "given.pt", weights_only=True)
    found = compute(given["kwargs"], given["state"], [given["shares"][rank]])
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
