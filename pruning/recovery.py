"""Recovery of a pruned model by the clock: distillation of the dense model's outputs, without labels.

AdamW over one cycle of the learning rate, which follows the time that has passed. The divergence on images that are not
trained on is looked at several times; the best state wins, the one before recovery included.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruning import streams
from pruning.objective import PREDICTIONS, Objective, judge

LR, WARM_UP = 1e-3, 0.1  # of the peak; share of the time until then
CHECKS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # shares of the time after which the guard looks


class Recovery(NamedTuple):
    """Divergence on unseen images before and after, and the updates that were made."""

    before: float
    after: float
    updates: int


class _Outputs(nn.Module):
    """What the objective compares, from images."""

    def __init__(self, model: VisionTransformer, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor) -> Tensor:
        return self.objective.outputs(self.model, self.model.blocks(streams.stem(self.model, images)))


def learning_rate(share: float) -> float:
    """The rate after a share of the time, in [0, 1]: linear up to LR, then a half cosine down to 0."""
    if share < WARM_UP:
        return LR * max(share / WARM_UP, 0.01)
    return LR * (1 + math.cos(math.pi * (min(share, 1.0) - WARM_UP) / (1 - WARM_UP))) / 2


def recover_(
    small: VisionTransformer,
    dense: VisionTransformer,
    batches: Iterator[Tensor],
    seconds: float,
    unseen: Tensor,
    batch: int,
    objective: Objective = PREDICTIONS,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] = lambda line: None,
) -> Recovery:
    """Distil `dense` into the compact `small`, in place, for so many seconds; both in eval mode.

    batches: endless, of training images (B, 3, H, W); unseen: images (n, 3, H, W) that are not among them, read `batch`
    at a time. Among several processes each gives its own, and the main one's clock counts. Every update is within the
    time, the guard's looks are not counted.
    """
    device = next(dense.parameters()).device
    trained = [p for p in small.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    student: nn.Module = _Outputs(small, objective)
    if dist.is_initialized():
        student = nn.parallel.DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
    teacher, optimizer = _Outputs(dense, objective), torch.optim.AdamW(trained, lr=LR)
    before = best = judge(small, dense, unseen, batch, objective)
    state, checks, updates, passed = copy.deepcopy(small.state_dict()), list(CHECKS), 0, 0.0
    while passed < seconds:
        begin, images = clock(), next(batches).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(passed / seconds)
        with torch.no_grad():
            wanted = teacher(images)
        with torch.enable_grad():
            objective.divergence(student(images), wanted).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        passed = _of_main(passed + clock() - begin, device)
        while checks and passed >= checks[0] * seconds:
            share = checks.pop(0)
            if checks and passed >= checks[0] * seconds:
                continue  # a long update went past several
            now = judge(small, dense, unseen, batch, objective)
            progress(
                f"recovery after {share * seconds:.0f} s, {updates} updates: divergence {now:.2e} {objective.unit}"
            )
            if now < best:
                best, state = now, copy.deepcopy(small.state_dict())
    small.load_state_dict(state)
    for parameter, flag in zip(trained, flags, strict=True):
        parameter.requires_grad_(flag).grad = None
    return Recovery(before, best, updates)


def _of_main(value: float, device: torch.device) -> float:
    """The main process's value, on all."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)
