"""What pruning does inside the training loop, and what it holds."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import training
from latency.table import LatencyTable
from pruning import debug
from pruning.config import PruningConfig
from pruning.global_latency import Event, GlobalPruner
from pruning.saliency import Saliency
from utils import RunFailed, is_main, say


@dataclass
class Setup:
    """What the arguments named, loaded and checked."""

    device: torch.device
    full: training.FullModel
    data: training.Data
    model: nn.Module
    cnn: nn.Module | None
    table: LatencyTable
    config: PruningConfig
    pruner: GlobalPruner
    folder: Path
    resumed: dict[str, Any] | None


class PruningSteps:
    """Pruning inside the training loop: score after backward, keep removed weights at zero, remove at events."""

    def __init__(self, args: Any, setup: Setup, student: nn.Module, optimizer: torch.optim.Optimizer,
                 criterion: nn.Module) -> None:  # fmt: skip
        self.interval, self.student_eval, self.kl_coeff = args.interval_prune[0], args.student_eval, criterion.kl_coeff
        self.pruner, self.masks, self.folder = setup.pruner, setup.pruner.masks, setup.folder
        self.criterion_name, self.criterion = setup.config.criterion, criterion
        self.student, self.optimizer, self.model = student, optimizer, setup.model
        self.saliency = Saliency(setup.model, setup.model.dims, setup.config.criterion, setup.config.momentum)
        if not setup.resumed:
            training.clear_logs(setup.folder)
        self.writer = SummaryWriter(setup.folder) if is_main() else None
        self.steps = self.events = 0
        self.exhausted = False  # no group may be removed any more
        self.set_phase()

    @property
    def done(self) -> bool:
        return self.exhausted or self.pruner.reached

    def set_phase(self) -> None:
        """Until the first event the student equals the full model, and its KL is off."""
        self.criterion.kl_coeff = self.kl_coeff if self.events else 0.0
        self.student.train(not (self.events and self.student_eval))

    def after_backward(self) -> None:
        self.saliency.step()

    def after_step(self, loss: Tensor) -> bool:
        """True once the run is over: the target is met or nothing may be removed any more."""
        self.masks.zero_weights_(self.model)
        self.steps += 1
        if self.steps % self.interval:
            return False
        try:
            event = self.pruner.event(self.saliency.close_window())
        except ValueError as error:
            raise RunFailed(f"pruning event {self.events + 1}: {error}") from None
        self.masks.install_(self.model, self.optimizer)
        self.events += 1
        if self.events == 1:
            self.saliency.forget()
            self.set_phase()
        self._report(event, loss)
        self.exhausted = not event.groups
        return self.done

    def _report(self, event: Event, loss: Tensor) -> None:
        if not is_main():
            return
        debug.write_event(self.folder / "debug", self.events, self.masks, event, self.criterion_name)
        tags = debug.scalars(self.masks.dims) | {"dimension/Estimated_Latency": event.ratio, "train/loss": loss.item()}
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, self.steps)
        removed = ", ".join(f"{len(g.units)} {g.axis}" for g in event.groups)
        say(f"event {self.events}: predicted latency {event.ratio:.4f} of dense; removed {removed or 'nothing'}")

    def state_dict(self) -> dict[str, Any]:
        return dict(
            saliency=self.saliency.state_dict(), steps=self.steps, events=self.events, exhausted=self.exhausted
        )  # fmt: skip

    def restore(self, state: dict[str, Any], masks: dict[str, Tensor]) -> None:
        self.saliency.load_state_dict(state["saliency"])
        self.steps, self.events, self.exhausted = state["steps"], state["events"], state["exhausted"]
        self.masks.load_state_dict(masks)
        self.masks.install_(self.model)
        self.set_phase()
