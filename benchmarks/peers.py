"""What the leaderboard sets beside our pruners of widths: tokens merged by content, ToMe, Torch-Pruning."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.footing import BATCH, Bench, Pruner
from benchmarks.tome import tome
from models import Masks
from pruning import token_merging
from pruning.refit import refit_
from pruning.token_counts import choose_counts

PROBED = 128  # images
TOKENS = {
    "prune-and-merge-content": {},
    "prune-and-merge-content-refitted": dict(refit=True),
}
TORCH_PRUNING = {
    "torch-pruning-taylor": dict(crit="taylor"),
    "torch-pruning-taylor-isomorphic": dict(crit="taylor", isomorphic=True),
    "torch-pruning-taylor-isomorphic-heads": dict(crit="taylor", isomorphic=True, heads=True),
    "torch-pruning-hessian-fixed": dict(crit="hessian-fixed"),
    "torch-pruning-l2": dict(crit="l2"),
}
SPARSEST = 0.95


class PruneAndMerge(Pruner):
    """Patches merged by content, the counts of all blocks probed; an aim is the share of patches that stay.

    The last block is lean: it computes only the tokens that the classifier reads.
    """

    def __init__(self, bench: Bench, seed: int, refit: bool = False) -> None:
        super().__init__()
        self.refit, self.images = refit, bench.images(seed)
        self.base = bench.model(lean_last=True).requires_grad_(False)

    def __call__(self, aim: float) -> nn.Module:
        depth = len(self.base.blocks)
        total = max(depth, round(aim * depth * self.base.patch_embed.num_patches))
        counts = choose_counts(self.base, range(depth), self.images[:PROBED], total, BATCH, content=True)
        small = token_merging.compress(self.base, counts, token_merging.Merging(where=token_merging.CONTENT))
        return small.requires_grad_(True)

    def finish(self, model: nn.Module) -> nn.Module:
        if self.refit:
            refit_(self.base, model, Masks(self.base.dims), self.images, BATCH)
        return model


class ToMe(Pruner):
    """Bipartite matching, written from the paper; as many merged in every block, the last one lean.

    An aim is one less the share of what could be merged: half of the patches in every block.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        super().__init__()
        self.base = bench.model()

    def __call__(self, aim: float) -> nn.Module:
        merging = len(self.base.blocks) - 1
        total = round((1 - aim) * merging * (self.base.patch_embed.num_patches // 2))
        merged = [*(total // merging + (i < total % merging) for i in range(merging)), None]
        return tome(self.base, merged).requires_grad_(True)


class TorchPruning(Pruner):
    """One of its modes; an aim is one less its sparsity."""

    def __init__(self, bench: Bench, seed: int, **mode: Any) -> None:
        super().__init__()
        import torch_pruning_baseline as baseline

        torch.manual_seed(seed)
        plain = dict(isomorphic=False, heads=False, no_norm=False, round_to=4)
        self.baseline, self.flags = baseline, SimpleNamespace(**plain | mode)
        self.base = baseline.bind(copy.deepcopy(bench.base))
        images, labels = bench.calibration(seed)
        self.gradients = None
        if mode["crit"] != "l2":
            batch = 1 if mode["crit"] == "hessian-fixed" else BATCH  # it goes back through the batch for every image
            self.gradients = baseline.gradients(self.base, mode["crit"], images, labels, batch)

    def __call__(self, aim: float) -> nn.Module:
        return self.baseline.prune(self.base, min(1 - aim, SPARSEST), self.gradients, self.flags)
