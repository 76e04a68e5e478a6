"""What pruning does inside the training loop, what it holds, and how that is saved."""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import resuming
import training
from engine import Precision, Progress
from latency.table import LatencyTable
from pruning import debug
from pruning.config import PruningConfig
from pruning.global_latency import Event, GlobalPruner
from pruning.saliency import Saliency
from utils import RunFailed, check_identical, is_main, say

CHECKPOINT = "checkpoint.pth"


@dataclass
class Setup:
    """What the arguments named, loaded and checked. inputs: see `resuming.inputs_of`."""

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
    inputs: dict[str, str] = field(default_factory=dict)


class PruningSteps:
    """Pruning inside the training loop: score after backward, keep removed weights at zero, remove at events."""

    def __init__(self, args: Any, setup: Setup, student: nn.Module, optimizer: torch.optim.Optimizer,
                 criterion: nn.Module) -> None:  # fmt: skip
        self.interval, self.student_eval, self.kl_coeff = args.interval_prune[0], args.student_eval, criterion.kl_coeff
        self.pruner, self.masks, self.folder = setup.pruner, setup.pruner.masks, setup.folder
        self.config, self.criterion = setup.config, criterion
        self.student, self.optimizer, self.model = student, optimizer, setup.model
        self.saliency = Saliency(setup.model, setup.model.dims, setup.config.criterion, setup.config.momentum)
        purge = setup.resumed and setup.resumed["step"]
        self.writer = SummaryWriter(setup.folder, purge_step=purge) if is_main() else None
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
        """Raises RunFailed, before the weights move, for a score that is not finite."""
        self.saliency.step()
        if odd := self.saliency.not_finite():
            raise RunFailed(f"the saliency of {odd[0]} is not finite in update {self.steps} of the run")

    def after_step(self, loss: Tensor) -> bool:
        """True once the run is over: the target is met or nothing may be removed any more."""
        self.masks.zero_weights_(self.model)
        self.steps += 1
        if self.steps % self.interval:
            return False
        try:
            scores = self.saliency.close_window()
            event = self.pruner.event(scores)
        except ValueError as error:
            raise RunFailed(f"pruning event {self.events + 1}: {error}") from None
        kept = [t.numpy(force=True).tobytes() for t in (*scores.values(), *self.masks.state_dict().values())]
        check_identical(f"pruning event {self.events + 1}: saliency or masks", b"".join(kept))
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
        debug.write_event(self.folder / "debug", self.events, self.masks, event, self.config.criterion)
        tags = debug.scalars(self.masks.dims) | {"dimension/Estimated_Latency": event.ratio, "train/loss": loss.item()}
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, self.steps)
        removed = ", ".join(f"{len(g.units)} {g.axis}" for g in event.groups)
        say(f"event {self.events}: predicted latency {event.ratio:.4f} of dense; removed {removed or 'nothing'}")

    def state_dict(self) -> dict[str, Any]:
        return dict(
            saliency=self.saliency.state_dict(), steps=self.steps, events=self.events, exhausted=self.exhausted,
            config=asdict(self.config),
        )  # fmt: skip

    def restore(self, state: dict[str, Any], masks: dict[str, Tensor]) -> None:
        self.saliency.load_state_dict(state["saliency"])
        self.steps, self.events, self.exhausted = state["steps"], state["events"], state["exhausted"]
        self.masks.load_state_dict(masks)
        self.masks.install_(self.model)
        self.set_phase()


@dataclass
class State:
    """What pruning moves, and so what a checkpoint holds."""

    steps: PruningSteps
    optimizer: torch.optim.Optimizer
    precision: Precision
    progress: Progress
    metrics: dict[str, Any] = field(default_factory=dict)


def save(name: str, args: Any, setup: Setup, state: State) -> None:
    if not is_main():
        return
    steps, progress = state.steps, state.progress.state_dict()
    dims = steps.masks.dims
    checkpoint.save(
        setup.folder / name, keep_older=name == CHECKPOINT, arch=setup.full.record, dims=dims.to_dict(),
        dim=dims.to_dim(), masks=steps.masks.state_dict(), model=setup.model.state_dict(),
        optimizer=state.optimizer.state_dict(), scaler=state.precision.scaler.state_dict(), pruner=steps.state_dict(),
        epoch=progress["epoch"], step=steps.steps, rng=checkpoint.rng_state(),
        metrics=state.metrics | progress["metrics"],
        args=resuming.saved_args(args, setup.full.path, setup.inputs),
    )  # fmt: skip


def read_resumed(args: Any, full: training.FullModel, config: PruningConfig, folder: Path,
                 inputs: dict[str, str]) -> dict[str, Any] | None:  # fmt: skip
    """The checkpoint to go on from, or None. Raises ValueError where it does not fit the arguments."""
    content = resuming.read(args, folder, CHECKPOINT, run="pruning", fitting=dict(arch=full.record), needed="pruner",
                            inputs=inputs, may_differ={"epochs"})  # the learning rate is constant  # fmt: skip
    if content is not None and content["pruner"]["config"] != asdict(config):
        raise ValueError(f"--resume: {args.pruning_config} is not the pruning config of that run")
    return content


def restore(setup: Setup, state: State) -> None:
    """Go on from the resumed checkpoint."""
    content = setup.resumed
    with resuming.restoring(content["path"]):
        setup.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.precision.scaler.load_state_dict(content["scaler"])
        state.steps.restore(content["pruner"], content["masks"])
        state.metrics = resuming.restore(content, state.progress, setup.folder)
    state.progress.ended = state.steps.done
