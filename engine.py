"""The training loop and the evaluation that every script shares."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

from runtime.errors import RunFailed
from runtime.precision import Precision
from runtime.ranks import is_main, world_size
from runtime.seeds import seed_everything


def progress_bar(iterable: Iterable, total: int, label: str, done: int = 0) -> tqdm:
    """A progress bar on the main rank's terminal; silent elsewhere, since the log has the same figures."""
    return tqdm(
        iterable,
        total=total,
        desc=label,
        leave=False,
        disable=None if is_main() else True,
        dynamic_ncols=True,
        initial=done,
    )


def do_nothing(*_: Any) -> None:
    """The default hook."""


class Meters:
    """Running means of the values of each step, fetched from the device only on demand."""

    def __init__(self) -> None:
        self.means: dict[str, AverageMeter] = {}
        self._pending: list[tuple[dict[str, Tensor], int]] = []

    def add(self, values: dict[str, Tensor], count: int) -> None:
        self._pending.append((values, count))

    def fetch(self) -> dict[str, float]:
        """The means so far. Waits for the device."""
        for values, count in self._pending:
            for name, value in values.items():
                self.means.setdefault(name, AverageMeter()).update(float(value), count)
        self._pending.clear()
        return {name: meter.avg for name, meter in self.means.items()}

    def state_dict(self) -> dict[str, list[float]]:
        self.fetch()
        return {name: [meter.sum, meter.count] for name, meter in self.means.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name, (total, count) in state.items():
            self.means[name] = meter = AverageMeter()
            meter.sum, meter.count, meter.avg = total, count, total / count


@dataclass
class Progress:
    """How far training has come: what a checkpoint needs to resume inside an epoch.

    epoch: the current epoch; step: how many of its `updates` are done; meters: its losses so far; ended: whether a hook
    ended the epoch early.
    """

    updates: int
    epoch: int = 0
    step: int = 0
    meters: Meters = field(default_factory=Meters)
    ended: bool = False

    def next_epoch(self) -> None:
        self.epoch, self.step, self.meters, self.ended = self.epoch + 1, 0, Meters(), False

    def state_dict(self) -> dict[str, Any]:
        """Under a checkpoint's keys: the last complete epoch, all updates, the losses of the current epoch."""
        running = self.meters.state_dict() if self.step else {}
        metrics = dict(running=running, updates=self.updates)
        return dict(epoch=self.epoch - 1, step=self.epoch * self.updates + self.step, metrics=metrics)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"] + 1
        self.step = max(0, state["step"] - self.epoch * self.updates)
        self.meters.load_state_dict(state["metrics"]["running"])


Criterion = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    progress: Progress,
    *,
    seed: int = 0,
    accumulate: int = 1,
    mixup: Callable | None = None,
    clip_grad: float | None = None,
    before_step: Callable[[int], Any] = do_nothing,
    after_backward: Callable[[], Any] = do_nothing,
    after_overflow: Callable[[], Any] = do_nothing,
    after_step: Callable[[Tensor], bool | None] = do_nothing,
    log_interval: int = 50,
) -> dict[str, float]:
    """Train the rest of the epoch that `progress` is in; returns its mean losses and the last learning rate.

    The model returns the logits of both tokens (`models.TokenLogits`), criterion(logits, images, targets) a loss and
    its parts. `loader` starts with the first batch that is left; an update takes `accumulate` batches. The random
    numbers of an update depend on the seed, the rank and the update's number alone. Hooks: before_step gets the number
    of the update since training began (timm's `scheduler.step_update`); after_backward runs with gradients unscaled and
    weights not yet moved, after_overflow in its place where loss scaling skips the update; after_step(loss) runs once
    the update is counted, and ends the epoch early by returning True. The caller chooses train or eval mode. Raises
    RunFailed for a loss or gradient that is not finite (`runtime.precision`).
    """
    meters, guard, overflows = progress.meters, precision.guard, precision.overflows
    left = range(progress.step, progress.step if progress.ended else progress.updates)
    bar = progress_bar(left, progress.updates, f"epoch {progress.epoch}", done=progress.step)
    with reading(loader) as batches:
        for step in bar:
            update = progress.epoch * progress.updates + step
            seed_everything(seed, update)
            before_step(update)
            optimizer.zero_grad()
            loss = torch.zeros((), device=precision.device)
            for number in range(accumulate):
                with contextlib.nullcontext() if number + 1 == accumulate or world_size() == 1 else model.no_sync():
                    part, values, count = _backward(model, criterion, next(batches), precision, mixup, 1 / accumulate)
                guard.see(part, step * accumulate + number)
                meters.add(dict(loss=part) | values, count)
                loss += part / accumulate
            precision.scaler.unscale_(optimizer)
            if guard.check(model, progress.epoch, step, last=step + 1 == progress.updates):
                after_backward()
                if clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            else:
                after_overflow()
            precision.step(optimizer)
            progress.step = step + 1
            if step % log_interval == 0:
                bar.set_postfix({name: f"{mean:.4f}" for name, mean in meters.fetch().items()}, refresh=False)
            progress.ended = bool(after_step(loss))
            if progress.ended:
                break
    skipped = dict(overflows=precision.overflows - overflows) if precision.scaler.is_enabled() else {}
    return meters.fetch() | dict(lr=optimizer.param_groups[0]["lr"]) | skipped


@contextlib.contextmanager
def reading(loader: Iterable) -> Iterator[Iterator]:
    """The batches of a loader, whose worker processes end with the context, whatever ends it.

    Raises RunFailed when a worker has died: the connection to it is lost, unless torch notices first.
    """
    batches = iter(loader)
    try:
        yield _iterate(batches)
    finally:
        getattr(batches, "_shutdown_workers", do_nothing)()


def _iterate(batches: Iterator) -> Iterator:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            raise RunFailed(f"a data loader worker died: {error}") from None
        yield batch


def _backward(
    model: nn.Module,
    criterion: Criterion,
    batch: tuple[Tensor, Tensor],
    precision: Precision,
    mixup: Callable | None,
    weight: float,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Add weight x the gradients of a batch of (images, targets); returns its loss, the loss's parts, its images."""
    images, targets = (t.to(precision.device, non_blocking=True) for t in batch)
    if mixup is not None:
        images, targets = mixup(images, targets)
    with precision.autocast():
        loss, parts = criterion(model(images), images, targets)
    precision.scaler.scale(loss * weight).backward()
    return loss.detach(), parts, len(images)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, precision: Precision, sharded: bool = False) -> dict[str, float]:
    """Top-1 and top-5 (percent) and cross-entropy of the mean of both tokens' logits; each sample counts once.

    sharded: each rank holds a part of the data (`--dist-eval`), so that the sums are all-reduced; otherwise every rank
    holds all of it. Raises RunFailed when the outputs are not finite, or there is no image.
    """
    model.eval()
    device = precision.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, loss sum, samples
    with reading(loader) as batches:
        for images, targets in progress_bar(batches, len(loader), "evaluate"):
            if not len(targets):  # no image of the batch could be read
                continue
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
    if not samples:
        raise RunFailed("there is no image to evaluate on")
    if not math.isfinite(loss):
        raise RunFailed("the model's outputs are not finite")
    return dict(acc1=100 * top1 / samples, acc5=100 * top5 / samples, loss=loss / samples, samples=samples)
