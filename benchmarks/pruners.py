"""Our pruners of the leaderboard, from calibration images to a model at any speed: NViT's rule, one-shot, SAViT.

None takes a gradient step, so that all see the same images once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_savit
from benchmarks.footing import BATCH, Bench, Pruner
from models import Masks, TokenLogits, compact
from pruning.align import align_
from pruning.allocation import allocate
from pruning.config import AXES as WIDTHS
from pruning.config import PruningConfig
from pruning.gate_saliency import GateSaliency
from pruning.gates import Gates
from pruning.global_latency import GlobalPruner
from pruning.one_shot import PRICING
from pruning.recovery import recover_
from pruning.refit import refit_, unseen_of
from pruning.saliency import EventMean, Saliency
from pruning.value import ValuePruner
from recipes import savit
from recipes.api import random_batches
from recipes.savit_scoring import GROUP, Scoring
from runtime.precision import Precision

LAMBDA, GROUPS_AT_ONCE = 5e-4, 8
SAVIT_BATCH = 32  # images
GRADIENT = {  # what each changes of the published rule
    "nvit": {},
    "nvit-align": dict(align="all"),
    "nvit-align-blocks": dict(align="blocks"),
    "nvit-compensate": dict(compensate=True),
    "nvit-value": dict(selection=ValuePruner),
    "nvit-gates": dict(saliency="gates"),
    "nvit-gate-samples": dict(saliency="gate_samples"),
    "nvit-gate-samples-teacher": dict(saliency="gate_samples", teacher=True),
    "nvit-value-gate-samples": dict(selection=ValuePruner, saliency="gate_samples"),
    "nvit-all": dict(selection=ValuePruner, saliency="gate_samples", teacher=True, align="all", compensate=True),
    "nvit-all-published-selection": dict(saliency="gate_samples", teacher=True, align="all", compensate=True),
    "magnitude": dict(saliency="magnitude"),
    "random": dict(saliency="random"),
}
ONE_SHOT = {
    "one-shot": {},
    "one-shot-measured-prices": dict(pricing="measured"),
    "one-shot-not-refitted": dict(refit=False),
    "one-shot-tokens": dict(tokens=True),
    "one-shot-tokens-alone": dict(tokens=True, widths=False),
    "one-shot-tokens-content": dict(tokens=True, content=True),
    "one-shot-tokens-content-alone": dict(tokens=True, widths=False, content=True),
}


def _scores(
    model: nn.Module, saliency: EventMean, teacher: nn.Module | None, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One pass over the images, in eval mode, without a step; teacher: where the saliency asks one."""
    both = TokenLogits(model)
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = both(x)
        if teacher:
            with torch.no_grad():
                taught = teacher(x)
            saliency.see(logits, taught)
        model.zero_grad()
        F.cross_entropy(sum(logits) / 2, y).backward()
        saliency.step()
    return saliency.close_window()


class Gradient(Pruner):
    """Scores by gradients, and a cut by them: the published rule with the changes of a row of GRADIENT."""

    def __init__(
        self,
        bench: Bench,
        seed: int,
        *,
        align: str = "",
        compensate: bool = False,
        teacher: bool = False,
        saliency: str = "weights",
        selection: type[GlobalPruner] = GlobalPruner,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.bench, self.compensate, self.selection = bench, compensate, selection
        self.images, self.dense = bench.images(seed), bench.model()
        if align:
            align_(self.dense, self.images.split(BATCH), embedding=align == "all")
        masks, config = Masks(self.dense.dims), PruningConfig()
        self.groups = config.group_sizes(self.dense.dims)
        published = saliency not in ("random", "magnitude") and selection is not ValuePruner
        self.regularization = LAMBDA if published else 0.0
        if saliency == "random":
            self.scores = {
                axis: torch.rand(n, dtype=torch.float64) / self.groups[axis]
                for axis, n in self.dense.dims.sizes().items()
            }
            return
        scored = copy.deepcopy(self.dense)
        if saliency in ("weights", "magnitude"):
            criterion = config.criterion if saliency == "weights" else saliency
            estimate = Saliency(scored, scored.dims, criterion)
        else:
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            estimate = GateSaliency(scored, masks, saliency, 0.0, scaler, taught=teacher)
        teacher = TokenLogits(self.dense) if teacher else None
        self.scores = _scores(scored, estimate, teacher, self.images, bench.calibration(seed)[1])

    @torch.no_grad()
    def __call__(self, aim: float) -> nn.Module:
        masks = Masks(self.dense.dims)
        pruner = self.selection(
            masks,
            self.bench.table,
            self.groups,
            regularization=self.regularization,
            target=aim,
            per_event=GROUPS_AT_ONCE,
        )
        while not (event := pruner.event(self.scores)).reached and event.groups:
            pass
        if not event.reached:
            raise ValueError(f"nothing more may go at {event.ratio:.3f}")
        masked = copy.deepcopy(self.dense)
        masks.install_(masked)
        small = compact(masked, masks)
        if self.compensate:
            refit_(self.dense, small, masks, self.images, BATCH)
        return small


def merging_of(tokens: bool = False, content: bool = False, **_: Any) -> dict[str, bool]:
    """The arguments of a model whose tokens a row of ONE_SHOT compresses."""
    return {name: True for name, used in dict(content_merge=content, lean_last=tokens).items() if used}


class OneShot(Pruner):
    """This project's one-shot pruning: aligned, priced, allocated, and refitted or not; of widths, tokens or both,
    tokens merged by place or by content."""

    def __init__(
        self,
        bench: Bench,
        seed: int,
        refit: bool = True,
        widths: bool = True,
        tokens: bool = False,
        content: bool = False,
        pricing: str = "gradient",
    ) -> None:
        super().__init__()
        self.bench, self.refit = bench, refit
        self.dense = bench.model(**merging_of(tokens, content)).requires_grad_(False)
        self.images = bench.images(seed)
        self.grid = self.dense.patch_embed.grid_size if tokens else None
        masks = Masks(self.dense.dims, grid=self.grid)
        self.groups = PruningConfig().group_sizes(masks, left_alone=() if widths else WIDTHS)
        align_(self.dense, self.images.split(BATCH))
        self.prices = PRICING[pricing](self.dense, self.images, self.groups, BATCH)

    def __call__(self, aim: float) -> nn.Module:
        choices = allocate(self.bench.table, self.dense.dims, self.groups, *self.prices, aim)
        if not choices:
            raise ValueError("no widths are as quick by the table")
        return compact(self.dense, Masks.first(self.dense.dims, choices[0][0], grid=self.grid)).requires_grad_(True)

    def finish(self, model: nn.Module) -> nn.Module:
        if self.refit:
            refit_(self.dense, model, Masks.first(self.dense.dims, model.dims, grid=self.grid), self.images, BATCH)
        return model

    def recover(self, model: nn.Module, images: Tensor, minutes: float) -> nn.Module:
        """`model` after so many minutes of distillation on unlabelled images, in place."""
        recover_(model, self.dense, random_batches(images, BATCH, 0.5), 60 * minutes, unseen_of(self.images), BATCH)
        return model


class SAViT(Pruner):
    """SAViT with interactions and the defaults of main_savit.py; an aim is a share of the MACs."""

    def __init__(self, bench: Bench, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        flags = ["--need_hessian", "--mixup", "0", "--cutmix", "0", "--seed", str(seed)]
        self.args = main_savit.get_args_parser().parse_args(flags)
        self.model = bench.model().requires_grad_(False)
        precision = Precision(torch.device("cpu"), None)
        scoring = Scoring(self.args, self.model, None, precision)
        labels = bench.calibration(seed)[1]
        batches = list(zip(bench.images(seed).split(SAVIT_BATCH), labels.split(SAVIT_BATCH), strict=True))
        with Gates(self.model).attach() as gates:
            for start in range(0, len(batches), GROUP):
                scoring.see(gates, batches[start : start + GROUP])
        self.importance = scoring.importance()

    @torch.no_grad()
    def __call__(self, aim: float) -> nn.Module:
        self.args.pruning_flops_percentage = 1 - aim
        masks, _ = savit.select(self.args, self.model, self.importance, torch.device("cpu"))
        masked = copy.deepcopy(self.model)
        masks.install_(masked)
        return compact(masked, masks).requires_grad_(True)
