"""SAViT's pass over the data: scores on every batch, interactions on as many as their stated error needs.

The pass is a list of batches that the seed decides, images and augmentation included; processes share the list out and
add up what they measure, so that the result is the same for any number of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine import progress_bar
from losses import DistillationLoss, base_criterion
from models.vit import TokenLogits
from pruning.gates import Gates
from pruning.interaction import SampledMean, component_hessian
from pruning.savit import Importance, Scores
from runtime.console import say, table, warn
from runtime.errors import RunFailed
from runtime.precision import Precision
from runtime.ranks import rank, world_size
from training.parts import make_mixup, make_precision

GROUP = 8  # batches between looks at the error: a whole number of them per process, for up to 8 processes
REPEATS = 3  # views of an image with repeated augmentation
AGREEMENT = 0.99  # rank correlation of the scores in reduced precision with those in fp32


def _seed(*numbers: int) -> None:
    """Seed what transforms and mixup draw from."""
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(first))
    np.random.seed(first)
    torch.default_generator.manual_seed(int(second))


class Feed(Dataset):
    """Training images by position in the pass; what a position holds follows from the seed alone."""

    def __init__(self, dataset: Dataset, seed: int, repeated: bool) -> None:
        self.dataset, self.seed = dataset, seed
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        self.order = order.repeat_interleave(REPEATS)[: len(order)] if repeated else order

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        _seed(self.seed, position)
        return self.dataset[int(self.order[position])]


def batches_needed(args: Any, images: int) -> int:
    """Batches of the pass. Raises ValueError where the training images do not make as many."""
    available = images // args.batch_size
    least = 2 if args.need_hessian else 1
    needed = max(least, int(args.pruning_feed_percent * available))
    if available < needed:
        why = "--need_hessian states its error from at least 2 batches" if args.need_hessian else "scoring needs one"
        raise ValueError(
            f"{why}, the {images} training images make {available} of {args.batch_size}: "
            f"--batch-size can be at most {images // least}"
        )
    return needed


class Pass:
    """The batches of one pass over the data, as images and (mixed) targets on the device."""

    def __init__(self, args: Any, dataset: Dataset, batches: int, classes: int, device: torch.device) -> None:
        self.seed, self.device, self.batches = args.seed, device, batches
        self.mixup = make_mixup(args, classes)
        size = args.batch_size
        self.mine = range(rank(), batches, world_size())
        self.loader = DataLoader(
            Feed(dataset, args.seed, args.repeated_aug),
            batch_sampler=[range(t * size, (t + 1) * size) for t in self.mine],
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and device.type == "cuda",
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for t, (images, targets) in zip(self.mine, self.loader, strict=True):
            images, targets = (x.to(self.device, non_blocking=True) for x in (images, targets))
            if self.mixup is not None:
                _seed(self.seed, self.batches, t)
                images, targets = self.mixup(images, targets)
            yield images, targets

    def groups(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """This process's share of GROUP batches at a time: empty where the others have the rest."""
        bar = iter(progress_bar(self, len(self.mine), "scoring"))
        for start in range(0, self.batches, GROUP):
            stop = min(start + GROUP, self.batches)
            yield [next(bar) for t in self.mine if start <= t < stop]


def _sum_over_ranks(value: Tensor, device: torch.device) -> Tensor:
    if world_size() > 1:
        value = value.to(device)
        dist.all_reduce(value)
    return value.cpu()


class Scoring:
    """What is measured on the batches: scores, and interactions until their stated error is reached."""

    def __init__(self, args: Any, model: nn.Module, cnn: nn.Module | None, precision: Precision) -> None:
        mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        self.model, self.both, self.precision = model, TokenLogits(model), precision
        self.criterion = DistillationLoss(
            base_criterion(mixing, args.smoothing),
            cnn,
            args.distillation_type,
            args.distillation_alpha,
            args.distillation_tau,
        )
        self.components, self.form, self.wanted_error = args.pruning_layers, args.hessian_form, args.hessian_error
        self.scores = Scores(model.dims, args.pruning_layers, args.pruning_method)
        self.interactions = SampledMean(len(args.pruning_layers)) if args.need_hessian else None

    def loss(self, images: Tensor, targets: Tensor, precision: Precision) -> Tensor:
        with precision.autocast():
            logits = self.both(images)
        return self.criterion(tuple(t.float() for t in logits), images, targets)

    def measure(self, gates: Gates, images: Tensor, targets: Tensor, precision: Precision) -> Tensor:
        return self.scores.measure(gates, len(images), lambda: self.loss(images, targets, precision))

    def check_precision(self, gates: Gates, first: list[tuple[Tensor, Tensor]]) -> None:
        """Reduced precision stays only where it ranks the units of the first batch as fp32 does."""
        full, correlation = Precision(self.precision.device, None), torch.zeros(1)
        if rank() == 0:
            measured = (self.scores.per_component(self.measure(gates, *first[0], p)) for p in (self.precision, full))
            correlation += min(spearmanr(a, b).statistic for a, b in zip(*measured, strict=True))
        worst = float(_sum_over_ranks(correlation, self.precision.device))
        name = str(self.precision.dtype).removeprefix("torch.")
        if worst >= AGREEMENT:
            say(f"scoring in {name}: it ranks the first batch's units as fp32 does (correlation {worst:.4f})")
        else:
            warn(
                f"scoring in fp32: {name} ranks the first batch's units too differently (correlation {worst:.4f}, "
                f"needed {AGREEMENT})"
            )
            self.precision = full

    def see(self, gates: Gates, group: list[tuple[Tensor, Tensor]]) -> None:
        """Take in a group of batches, this process's share; all processes together."""
        device, full = self.precision.device, Precision(self.precision.device, None)
        measured = [self.measure(gates, *batch, self.precision) for batch in group]
        self.scores.add(_sum_over_ranks(sum(measured, torch.zeros_like(self.scores.sums)), device))
        if self.interactions is None or self.interactions.largest_error <= self.wanted_error:
            return
        packed = [
            SampledMean.pack(component_hessian(gates, self.components, lambda b=b: self.loss(*b, full), self.form))
            for b in group
        ]
        self.interactions.merge(_sum_over_ranks(sum(packed, torch.zeros_like(self.interactions.sums)), device))

    def importance(self) -> Importance:
        """Raises RunFailed where it is not finite."""
        try:
            if self.interactions is None:
                return self.scores.importance()
            return self.scores.importance(self.interactions.mean, self.interactions.standard_error)
        except ValueError as error:
            raise RunFailed(str(error)) from None


def measure(
    args: Any, model: nn.Module, dataset: Dataset, cnn: nn.Module | None, device: torch.device
) -> tuple[Importance, dict[str, Any]]:
    """Importance of the units of `model` (in eval mode, frozen), and the pass as a description. Raises RunFailed."""
    batches = batches_needed(args, len(dataset))
    scoring = Scoring(args, model, cnn, make_precision(args, device))
    with Gates(model).attach() as gates:
        for number, group in enumerate(Pass(args, dataset, batches, model.num_classes, device).groups()):
            if number == 0 and scoring.precision.dtype is not None:
                scoring.check_precision(gates, group)
            scoring.see(gates, group)
            if number * GROUP % args.log_interval < GROUP:
                seen = min((number + 1) * GROUP, batches)
                say(f"scored {seen} of {batches} batches of {args.batch_size}: loss {scoring.scores.loss:.4f}")
    importance = scoring.importance()
    data = dict(
        data_set=args.data_set,
        images=batches * args.batch_size,
        batches=batches,
        batch_size=args.batch_size,
        seed=args.seed,
        repeated_aug=args.repeated_aug,
        loss=scoring.scores.loss,
        hessian_batches=0,
    )
    if scoring.interactions is not None:
        used, error = scoring.interactions.count, scoring.interactions.largest_error
        data["hessian_batches"] = used
        say(f"interactions from {used} of {batches} batches, largest error {100 * error:.1f} %")
        say(interaction_table(importance))
        if error > args.hessian_error:
            warn(
                f"the interactions' error is above --hessian_error {args.hessian_error} after all batches of "
                f"--pruning_feed_percent {args.pruning_feed_percent}"
            )
    return importance, data


def interaction_table(importance: Importance) -> str:
    """Every entry of the interactions with its standard error."""
    rows = [
        [name, *(f"{h:+.4g} ± {e:.1g}" for h, e in zip(row, errors, strict=True))]
        for name, row, errors in zip(
            importance.components, importance.hessian.tolist(), importance.error.tolist(), strict=True
        )
    ]
    return table(["1'H1", *importance.components], rows)
