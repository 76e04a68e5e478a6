"""Mixed precision, and the check that losses and gradients are finite."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.errors import RunFailed


class Precision:
    """Mixed precision: autocast to `dtype` (None: off), with loss scaling where float16 needs it.

    overflows: updates that the scaler has skipped in total; in_a_row: the current run of skipped updates.
    """

    MOST_IN_A_ROW = 30  # after so many halvings of 2^16 the scale is far below 1: the gradients are at fault

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.overflows = self.in_a_row = 0
        self.guard = FiniteGuard(self, every=1 if device.type == "cpu" else 10)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights, unless the gradients overflowed; then halve the scale of the next losses."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def overflowed(self, yes: bool) -> bool:
        """Count an update; True once too many in a row have overflowed."""
        self.overflows += yes
        self.in_a_row = self.in_a_row + 1 if yes else 0
        return self.in_a_row > self.MOST_IN_A_ROW


class _Update(NamedTuple):
    """The losses of one update's batches and its largest gradients by magnitude, which are still on the device."""

    epoch: int
    step: int
    batches: list[int]
    names: list[str]
    values: Tensor  # losses, then one of every gradient


class FiniteGuard:
    """Stops a run whose loss or gradients are not finite, and names epoch, step, batch and tensor.

    The losses and gradients of `every` updates are read together, so that a GPU is rarely waited for. With 1 the
    run stops before the weights move, else at most `every` - 1 updates later, and always in `settle`, which whoever
    writes a checkpoint calls first. Under loss scaling, which reads every update itself, `every` is 1.
    """

    def __init__(self, precision: Precision, every: int) -> None:
        self.precision, self.every = precision, every
        self._losses: list[tuple[int, Tensor]] = []
        self._waiting: list[_Update] = []

    def see(self, loss: Tensor, batch: int) -> None:
        """Remember the loss of a batch for `check`. batch: its number in the epoch, from 0."""
        self._losses.append((batch, loss.detach()))

    def check(self, model: nn.Module, epoch: int, step: int, last: bool = False) -> bool:
        """Whether the optimizer may use the gradients; False after an overflow under loss scaling.

        last: nothing may wait for a later update. Raises RunFailed for a loss that is not finite, and for such a
        gradient where nothing is scaled or the scale has been halved too often.
        """
        batches, losses = zip(*self._losses, strict=True)
        self._losses = []
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        largest = torch.stack(torch._foreach_norm([gradient for _, gradient in named], torch.inf)).float()
        values = torch.cat([torch.stack([loss.float() for loss in losses]), largest])
        update = _Update(epoch, step, [*batches], [name for name, _ in named], values)
        if self.precision.scaler.is_enabled():
            return self._check_scaled(update)
        self._waiting.append(update)
        if last or len(self._waiting) >= self.every:
            self.settle()
        return True

    def settle(self) -> None:
        """Read what waits to be checked. Raises RunFailed, naming the first that is not finite."""
        waiting, self._waiting = self._waiting, []
        if not waiting or bool(torch.cat([update.values for update in waiting]).isfinite().all()):
            return
        for update in waiting:
            if odd := self._odd_gradient(update):
                raise self._failed(update, odd)

    def _check_scaled(self, update: _Update) -> bool:
        sound = bool(update.values.isfinite().all())
        odd = "" if sound else self._odd_gradient(update)
        if self.precision.overflowed(not sound):
            raise self._failed(update, odd)
        return sound

    @staticmethod
    def _odd_gradient(update: _Update) -> str:
        """The first parameter whose gradient is not finite, '' for none. Raises RunFailed for such a loss."""
        finite = update.values.isfinite().tolist()
        for batch, sound in zip(update.batches, finite, strict=False):
            if not sound:
                raise RunFailed(f"the loss of batch {batch} is not finite in epoch {update.epoch}, step {update.step}")
        gradients = zip(update.names, finite[len(update.batches) :], strict=True)
        return next((name for name, sound in gradients if not sound), "")

    @staticmethod
    def _failed(update: _Update, name: str) -> RunFailed:
        first, last = update.batches[0], update.batches[-1]
        batches = f"batch {first}" + (f" to {last}" if last > first else "")
        name = name.removeprefix("module.").removeprefix("model.")
        where = f"in epoch {update.epoch}, step {update.step}"
        return RunFailed(f"the gradient of {name} ({batches}) is not finite {where}")
