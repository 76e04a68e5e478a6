"""The one training loop and the one evaluation, for every script."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

from utils import RunFailed, is_main, world_size


class Precision:
    """Mixed precision: autocast to `dtype` (None: off), with loss scaling where float16 needs it."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class FiniteGuard:
    """Stops a run whose loss is not finite, naming the step.

    On a CPU the loss is looked at before it is used; on a GPU a flag stays on the device, and `check` reads it at the
    log interval and before anything is saved, so that no step waits for the host.
    """

    def __init__(self, device: torch.device, epoch: int = 0) -> None:
        self.epoch = epoch
        self.immediate = device.type == "cpu"
        self.first_bad = torch.full((), math.inf, device=device)

    def see(self, loss: Tensor, step: int) -> None:
        bad = ~torch.isfinite(loss.detach())
        self.first_bad = torch.minimum(self.first_bad, torch.where(bad, float(step), math.inf))
        if self.immediate:
            self.check()

    def check(self) -> None:
        if math.isfinite(step := self.first_bad.item()):
            raise RunFailed(f"the loss is not finite in epoch {self.epoch}, step {int(step)}")


def progress(iterable: Iterable, total: int, label: str) -> tqdm:
    """A progress bar on a terminal of the main rank; silent elsewhere, where the log has the same figures."""
    return tqdm(iterable, total=total, desc=label, leave=False, disable=None if is_main() else True, dynamic_ncols=True)


def nothing(*_: Any) -> None:
    """The hook of a method that does nothing there."""


class Meters:
    """Running means of a step's values, fetched from the device only when asked for."""

    def __init__(self) -> None:
        self.means: dict[str, AverageMeter] = {}
        self._pending: list[tuple[dict[str, Tensor], int]] = []

    def add(self, values: dict[str, Tensor], count: int) -> None:
        self._pending.append((values, count))

    def fetch(self) -> dict[str, float]:
        for values, count in self._pending:
            for name, value in values.items():
                self.means.setdefault(name, AverageMeter()).update(float(value), count)
        self._pending.clear()
        return {name: meter.avg for name, meter in self.means.items()}


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    epoch: int,
    *,
    mixup: Callable | None = None,
    clip_grad: float | None = None,
    before_step: Callable[[int], Any] = nothing,
    after_backward: Callable[[], Any] = nothing,
    after_step: Callable[[Tensor], bool | None] = nothing,
    log_interval: int = 50,
) -> dict[str, float]:
    """One pass over `loader`; returns mean losses and the last learning rate.

    model gives both tokens' logits (`models.TokenLogits`), criterion(logits, images, targets) a loss and its parts.
    before_step gets the number of updates since training began (timm's `scheduler.step_update`); after_backward runs
    with gradients unscaled and weights not yet moved; after_step(loss) runs with the weights moved, and ends the epoch
    early by returning True. The caller chooses train or eval mode. Raises RunFailed when the loss is not finite.
    """
    meters, guard, device = Meters(), FiniteGuard(precision.device, epoch), precision.device
    bar = progress(loader, len(loader), f"epoch {epoch}")
    for step, (images, targets) in enumerate(bar):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        before_step(epoch * len(loader) + step)
        with precision.autocast():
            loss, parts = criterion(model(images), images, targets)
        guard.see(loss, step)
        optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        after_backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        meters.add(dict(loss=loss.detach()) | parts, len(images))
        if step % log_interval == 0:
            guard.check()
            bar.set_postfix({name: f"{mean:.4f}" for name, mean in meters.fetch().items()}, refresh=False)
        if after_step(loss.detach()):
            break
    guard.check()
    return meters.fetch() | dict(lr=optimizer.param_groups[0]["lr"])


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, precision: Precision, sharded: bool = False) -> dict[str, float]:
    """Top-1 and top-5 (percent) and cross-entropy of the mean of both tokens' logits, every sample counted once.

    sharded: each rank holds a part of the data (`--dist-eval`), so the sums are all-reduced; else all hold the same.
    Raises RunFailed when the outputs are not finite.
    """
    model.eval()
    device = precision.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, loss sum, samples
    for images, targets in progress(loader, len(loader), "evaluate"):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with precision.autocast():
            logits = model(images)
        logits = (sum(logits) / 2 if isinstance(logits, tuple) else logits).float()
        hits = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        count = torch.tensor(float(len(targets)), device=device)
        totals += torch.stack([hits[:, 0].sum(), hits.sum(), loss, count]).double()
    if sharded and world_size() > 1:
        dist.all_reduce(totals)
    top1, top5, loss, samples = totals.tolist()
    if not math.isfinite(loss):
        raise RunFailed("the model's outputs are not finite")
    return dict(acc1=100 * top1 / samples, acc5=100 * top5 / samples, loss=loss / samples, samples=samples)
