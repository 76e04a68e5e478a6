"""SnapViT (Simoncini et al., NeurIPS 2025) by its own code: github.com/WalterSimoncini/SnapViT, with its requirements.

Its published job: gradients of a DINO loss on crops score hidden units and heads, xNES weighs the blocks by how far the
features of pruned models are from the dense one's, and the least go, of all blocks together. The embedding stays.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.footing import Bench, Pruner

EVALUATIONS, COMPONENTS, JUDGED = 50, 192, 512  # of xNES; principal components and images that it judges by
FIRST, LAST = 1.2, 0.8  # weights of blocks that it starts from
RATIOS = {0.15: 0.0, 0.35: 0.2, 0.55: 0.4, 0.65: 0.5}  # of hidden units that go, and of heads
BEHIND = 0.15  # by how much less of the heads goes
KEPT = dict(min_hidden_dim_keep_ratio=0.05, min_head_keep_ratio=0.25)  # a head of four; published is 0.2


class Crops(Dataset):
    """Every image as what `augment` makes of it, and a label that nobody reads."""

    def __init__(self, images: torch.Tensor, augment: nn.Module) -> None:
        self.images, self.augment = images, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return self.augment(self.images[place]), 0


class SnapViT(Pruner):
    """Scored once; an aim is the share of hidden units that stay. folder: where its code lies."""

    def __init__(self, bench: Bench, seed: int, folder: Path) -> None:
        super().__init__()
        sys.path.insert(0, str(folder))
        from src.models.enums import PrunableModelType
        from src.models.prunable import load_prunable_model
        from src.utils.models import freeze_model

        torch.manual_seed(seed)
        model = self.adapt(copy.deepcopy(bench.base))
        scored = [f"blocks.{i}.{layer}" for i in range(len(model.blocks)) for layer in ("mlp.fc1", "attn.qkv")]
        freeze_model(model=model, exclusions=scored)
        self.prunable, augment = load_prunable_model(
            PrunableModelType.DINO, model, nn.Identity(), torch.device("cpu"), **KEPT
        )
        crops = DataLoader(Crops(bench.calibration(seed)[0], augment), batch_size=16)
        judged = bench.images(seed)[:JUDGED]
        judging = DataLoader(TensorDataset(judged, torch.zeros(len(judged))), batch_size=64)
        self.weights = self.weigh(crops, judging, seed)

    @staticmethod
    def adapt(model: nn.Module) -> nn.Module:
        """timm's model as its code loads one."""
        from src.utils.modules import DynamicHeadsAttention, OptionalLinear

        class Attention(DynamicHeadsAttention):
            def forward(self, x: torch.Tensor, attn_mask: None = None, **_: Any) -> torch.Tensor:
                return super().forward(x, attn_mask)  # later versions of timm pass more

        for block in model.blocks:
            block.attn = Attention.from_timm_attn(block.attn)
        for name in ("head", "head_dist"):
            if hasattr(model, name):
                setattr(model, name, OptionalLinear(linear=getattr(model, name)))
        return model.eval()

    def weigh(self, crops: DataLoader, judging: DataLoader, seed: int) -> torch.Tensor:
        """Weights of blocks and heads. Computes the gradients of `prunable` too."""
        from src.utils.ga import GAOptimizerType, optimize_function_ga
        from src.utils.ga.fitness import build_fitness_function
        from src.utils.ga.loss import GALossType

        depth, heads = self.prunable.num_blocks, self.prunable.default_num_heads
        fitness = build_fitness_function(
            model=self.prunable,
            teacher=self.prunable.teacher,
            pruning_data_loader=crops,
            eval_data_loader=judging,
            device=torch.device("cpu"),
            pruning_function=lambda model, solution: [
                self.prune(torch.tensor(solution, dtype=torch.float32), *ratios) for ratios in RATIOS.items()
            ],
            loss_types=[GALossType.COSINE_SIMILARITY],
            num_pca_components=COMPONENTS,
        )
        of_blocks = np.linspace(FIRST, LAST, depth)
        solution, *_ = optimize_function_ga(
            type_=GAOptimizerType.XNES,
            fitness_function=fitness,
            ndim_problem=depth + heads * depth,
            max_function_evaluations=EVALUATIONS,
            seed=seed,
            starting_point=np.concatenate([of_blocks, of_blocks.repeat(heads)]),
        )
        return torch.tensor(solution)

    def prune(self, weights: torch.Tensor, hidden: float, heads: float) -> nn.Module:
        """Without these shares of hidden units and heads."""
        from src.utils.models import deepcopy_model

        small = deepcopy_model(self.prunable)
        small.prune(
            data_loader=None,
            pruning_ratio=hidden,
            pruning_ratio_heads=heads,
            block_weights=weights.abs(),
            estimate_pruning_weights=False,
        )
        return small

    def __call__(self, aim: float) -> nn.Module:
        model = self.prune(self.weights, 1 - aim, max(0.0, 1 - aim - BEHIND)).model
        model.zero_grad()
        return model.requires_grad_(True)
