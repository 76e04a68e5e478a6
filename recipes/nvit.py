"""NViT inside the training loop: what the run holds, and what it does after every backward pass and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latency.table import LatencyTable
from losses import NViTLoss
from models import Masks
from models.swin_dims import Dims
from pruning.config import PruningConfig
from pruning.gate_saliency import GateSaliency
from pruning.global_latency import Event, GlobalPruner
from pruning.saliency import EventMean, Saliency
from pruning.shrink import Student
from pruning.targets import CLOSE, next_aim, targets_of
from pruning.token_saliency import TokenSaliency
from pruning.value import ValuePruner
from recipes import nvit_log
from recipes.calibration import Compensation
from runtime.console import say
from runtime.errors import RunFailed
from runtime.precision import Precision
from runtime.ranks import check_identical, is_main
from training.curves import Curves
from training.full_model import FullModel
from training.parts import Data, wrap_for_training


@dataclass
class Setup:
    """What the arguments named, loaded and checked. inputs: see `resuming.inputs_of`."""

    device: torch.device
    full: FullModel
    data: Data
    student: Student
    cnn: nn.Module | None
    table: LatencyTable
    config: PruningConfig
    pruner: GlobalPruner
    folder: Path
    resumed: dict[str, Any] | None
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The student's, whatever it has been compacted to."""
        return self.student.model


def make_pruner(
    args: Any, full: FullModel, masks: Masks, table: LatencyTable, config: PruningConfig, cap: int
) -> GlobalPruner:
    """What chooses the units, as --selection and the targets say."""
    dense = full.dims
    more = targets_of(
        dense,
        table,
        full.arch,
        latency_ms=args.latency_target_ms,
        macs_=args.macs_target,
        params_=args.params_target,
    )
    sizes = config.group_sizes(masks, args.width_multiple, full.arch.left_alone)
    kind = ValuePruner if args.selection == "value" else GlobalPruner
    return kind(
        masks,
        table,
        sizes,
        regularization=args.latency_regularization,
        cap=cap or None,
        target=None if args.one_shot else args.latency_target,
        targets=more,
        dense=dense,
        per_event=args.prune_per_iter // args.group_size,
    )


class PruningSteps:
    """Pruning inside the training loop: score after backward, keep removed weights at zero, remove at events.

    precision: scales the loss, and knows whether it was finite; compensation: see there; measure: the measured ratio of
    widths to the dense model, the same on all ranks, where that must meet the target (None: the predicted one must).
    """

    def __init__(
        self,
        args: Any,
        setup: Setup,
        optimizer: torch.optim.Optimizer,
        criterion: NViTLoss,
        precision: Precision,
        compensation: Compensation,
        measure: Callable[[Dims], float] | None = None,
    ) -> None:
        self.measure, self.points = measure, []  # (predicted, measured) where the predicted target was met
        self.args, self.setup, self.optimizer, self.criterion = args, setup, optimizer, criterion
        self.interval, self.kl_coeff, self.precision = args.interval_prune[0], criterion.kl_coeff, precision
        self.pruner, self.student, self.compensation = setup.pruner, setup.student, compensation
        self.student.prepare(optimizer, lambda model: wrap_for_training(args, model, setup.device))
        self.saliency = self._make_saliency()
        self.tokens = None
        if args.tokens:
            self.tokens = TokenSaliency(setup.model, self.student.masks, setup.config.momentum, precision.scaler)
        purge = setup.resumed and setup.resumed["step"]
        self.curves = Curves(setup.folder, purge_step=purge)
        self.steps = self.events = 0
        self.exhausted = False  # no group may be removed any more
        self.set_phase()

    @property
    def done(self) -> bool:
        return self.exhausted or self.pruner.reached

    def _make_saliency(self) -> EventMean:
        config, args, model = self.setup.config, self.args, self.student.model
        if args.saliency == "weights":
            return Saliency(model, model.dims, config.criterion, config.momentum)
        scaler, taught = self.precision.scaler, args.saliency_loss == "teacher"
        return GateSaliency(model, self.student.masks, args.saliency, config.momentum, scaler, taught)

    def _saliencies(self) -> list[EventMean]:
        return [self.saliency, self.tokens] if self.tokens else [self.saliency]

    def set_phase(self) -> None:
        """Until the first event the student equals the full model, and its KL is off."""
        self.criterion.kl_coeff = self.kl_coeff if self.events else 0.0
        self.student.train(not (self.events and self.args.student_eval))

    def loss(self, logits: tuple[Tensor, Tensor], images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its parts; the saliency may differentiate another."""
        taught = None
        if self.args.saliency_loss == "teacher":
            taught = self.criterion.teach(images)
            self.saliency.see(logits, taught)
        return self.criterion(logits, images, targets, taught)

    def after_backward(self) -> None:
        self.student.masks.drop_gradients_(self.student.model)
        for saliency in self._saliencies():
            saliency.step()

    def after_overflow(self) -> None:
        """An update that is skipped: what its backward pass left behind belongs to no update."""
        for saliency in self._saliencies():
            saliency.discard()

    def after_step(self, loss: Tensor) -> bool:
        """True once the run is over: the target is met or nothing may be removed any more. Raises RunFailed."""
        student = self.student
        student.masks.zero_weights_(student.model)
        self.steps += 1
        if self.steps % self.interval:
            return False
        self.precision.guard.settle()
        self.compensation.remember(student.model)
        try:
            scores: dict[str, Tensor] = {}
            for saliency in self._saliencies():
                if (odd := saliency.not_finite()) and not self.precision.scaler.is_enabled():
                    raise ValueError(f"the saliency of {odd[0]} was not finite in an update since the last event")
                scores |= saliency.close_window()
            event = self.pruner.event(scores)
        except ValueError as error:
            raise RunFailed(f"pruning event {self.events + 1}: {error}") from None
        kept = [t.numpy(force=True).tobytes() for t in (*scores.values(), *student.masks.state_dict().values())]
        check_identical(f"pruning event {self.events + 1}: saliency or masks", b"".join(kept))
        student.masks.install_(student.model, self.optimizer)
        self.events += 1
        self.exhausted = not event.groups
        if self.measure and self.pruner.reached:
            self._aim_lower()
        self.compensation.apply_(student.model, student.masks, student.lift_masks(), last=self.done)
        if self.events == 1:
            for saliency in self._saliencies():
                saliency.forget()
        self.curves.saliency(scores, student.masks.keep, self.steps)
        self._report(event, loss)
        if self.args.shrink_interval and self.events % self.args.shrink_interval == 0:
            self._shrink()
        self.set_phase()
        return self.done

    def _aim_lower(self) -> None:
        """Measure the compact student where the predicted target is met; above the target, pruning goes on."""
        predicted, measured = self.pruner.ratio, self.measure(self.student.lift_masks().dims)
        self.points.append((predicted, measured))
        self._set_limit()
        outcome = "which meets the target" if self.pruner.reached else "which is above the target: pruning goes on"
        say(f"measured {measured:.4f} of the dense latency, predicted {predicted:.4f}, {outcome}")

    def _set_limit(self) -> None:
        """The predicted ratio to stop at, so that what is measured meets the target."""
        target = self.args.latency_target
        if self.points and self.points[-1][1] > target:
            limit = min(next_aim(self.points, target - CLOSE / 2), (1 - CLOSE) * self.points[-1][0])
            self.pruner.targets[0] = replace(self.pruner.targets[0], limit=limit)

    def _shrink(self) -> None:
        """Go on with the compact student of all that is left. Raises RunFailed."""
        gone = self.pruner.removed  # of what the cap allows: narrower masks no longer know
        saliency, keep = self.saliency.state_dict(), torch.cat(list(self.student.masks.keep.values()))
        try:
            self.student.shrink()
        except ValueError as error:
            raise RunFailed(f"--shrink_interval: {error}") from None
        if self.pruner.cap is not None:
            self.pruner.cap -= gone
        self.saliency = self._make_saliency()
        self.saliency.load_state_dict(saliency | {name: saliency[name][keep] for name in ("accumulated", "average")})

    def _report(self, event: Event, loss: Tensor) -> None:
        if not is_main():
            return
        masks = self.student.lift_masks()
        event = replace(event, groups=[replace(g, units=self.student.units(g.axis, g.units)) for g in event.groups])
        nvit_log.write_event(self.setup.folder / "debug", self.events, masks, event, self.setup.config.criterion)
        tags = nvit_log.scalars(masks.dims) | {"dimension/Estimated_Latency": event.ratio, "train/loss": loss.item()}
        self.curves.scalars(tags, self.steps)
        removed = ", ".join(f"{len(g.units)} {g.axis}" for g in event.groups)
        say(f"event {self.events}: predicted latency {event.ratio:.4f} of dense; removed {removed or 'nothing'}")

    def state_dict(self) -> dict[str, Any]:
        """Of the full-size student, whatever has been compacted."""
        scores = self.saliency.state_dict()
        scores |= {name: self.student.paste_scores(scores[name]) for name in ("accumulated", "average")}
        outer = None if self.student.is_full else self.student.outer.state_dict()
        return dict(
            saliency=scores,
            tokens=self.tokens and self.tokens.state_dict(),
            steps=self.steps,
            events=self.events,
            exhausted=self.exhausted,
            points=self.points,
            shrunk=outer,
            dense=self.compensation.state_dict(),
            config=asdict(self.setup.config),
        )

    def restore(self, state: dict[str, Any], masks: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` and the masks of a checkpoint hold."""
        self.saliency.load_state_dict(state["saliency"])
        if self.tokens:
            self.tokens.load_state_dict(state["tokens"])
        self.steps, self.events, self.exhausted = state["steps"], state["events"], state["exhausted"]
        self.points = [tuple(point) for point in state.get("points", [])]
        self._set_limit()
        self.compensation.load_state_dict(state["dense"])
        student = self.student
        full = student.masks.fresh()
        full.load_state_dict(masks)
        if state["shrunk"] is not None:
            student.masks.load_state_dict(state["shrunk"])
            self._shrink()
        student.masks.load_state_dict({a: keep[student.outer.keep[a]] for a, keep in full.keep.items()})
        student.masks.install_(student.model)
        self.set_phase()
