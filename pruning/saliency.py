"""Saliency of every unit of every axis, in one vectorised pass over the parameters per training step.

NViT (arXiv 2110.04869) section 3.2, Eq. 1-6: the gate criterion of a group S collapses to (sum over its weights of
w dL/dw)^2. Both factors are taken before the optimizer step; the published code multiplies the weight after it with the
gradient before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.axes import Axis, local_name
from models.swin_dims import Dims

# Which axes score a parameter, by its name inside the block. As published: qk sums Q only and v sums V only (the other
# side gives the same sum), mlp sums fc1, norms and tokens enter nowhere.
SCORED = {
    "patch_embed.proj.weight": ("embed",),
    "patch_embed.proj.bias": ("embed",),
    "attn.qkv.weight": ("heads", "qk", "v", "embed"),
    "attn.qkv.bias": ("heads", "qk", "v"),
    "attn.proj.weight": ("embed",),
    "attn.proj.bias": ("embed",),
    "mlp.fc1.weight": ("mlp", "embed"),
    "mlp.fc1.bias": ("mlp",),
    **{f"mlp.{layer}.weight": ("mlp", "embed") for layer in ("fc1_g", "fc1_x")},  # of a gated MLP in two layers
    **{f"mlp.{layer}.bias": ("mlp",) for layer in ("fc1_g", "fc1_x")},
    "mlp.fc2.weight": ("embed",),
    "mlp.fc2.bias": ("embed",),
    "downsample.reduction.weight": ("embed",),  # a stage's own, which it writes, and that of the stage before
}
CONSTANTS = dict(heads=1 / 12, qk=1 / 2, v=1 / 2, mlp=1.0)  # published; embed's 1/12 is 1/depth, of its stage


class EventMean:
    """Scores of all units, summed over training steps and averaged over pruning events.

    sizes: units of every axis; momentum: weight of the past in the moving average over events, bias-corrected (the
    published code does not correct, so that its first scores after a reset are ten times too small).
    """

    def __init__(self, sizes: dict[str, int], momentum: float, device: torch.device) -> None:
        self.sizes, self.momentum = sizes, momentum
        self.accumulated = torch.zeros(sum(self.sizes.values()), device=device)  # one axis behind the other
        self.average = torch.zeros_like(self.accumulated)
        self.steps = torch.zeros((), device=device)
        self._odd = torch.zeros_like(self.accumulated, dtype=torch.bool)
        self.events = 0

    def see(self, logits: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor]) -> None:
        """A training step's outputs beside a teacher's, before the backward pass."""

    def discard(self) -> None:
        """Forget a training step that is skipped: what `see` and hooks have gathered since the last `step`."""

    def step(self) -> None:
        """Add this step's scores: after backward, with gradients unscaled and weights not yet moved."""
        raise NotImplementedError

    def _add(self, scores: Tensor) -> None:
        odd = ~torch.isfinite(scores)
        finite = ~odd.any()  # a step with such a score is left out whole, and nothing waits for the device
        self.accumulated += torch.where(finite, scores, 0.0)
        self.steps += finite
        self._odd |= odd

    def not_finite(self) -> list[str]:
        """Axes with a score that was not finite since the last event, in steps that were left out."""
        parts = self._odd.cpu().split(list(self.sizes.values()))
        return [axis for axis, part in zip(self.sizes, parts, strict=True) if part.any()]

    def close_window(self) -> dict[str, Tensor]:
        """Scores (float64, on the CPU) per axis at a pruning event: the mean over the steps since the last, averaged.

        Raises ValueError when no finite step was seen.
        """
        if not self.steps.item():
            raise ValueError("no training step with finite gradients since the last pruning event: nothing to rank by")
        window = self.accumulated / self.steps
        self.events += 1
        self.average = self.momentum * self.average + (1 - self.momentum) * window
        scores = (self.average / (1 - self.momentum**self.events)).double().cpu()
        for gathered in (self.accumulated, self.steps, self._odd):
            gathered.zero_()
        return dict(zip(self.sizes, scores.split(list(self.sizes.values())), strict=True))

    def forget(self) -> None:
        """Restart the moving average: the loss it was gathered under has changed."""
        self.average.zero_()
        self.events = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(accumulated=self.accumulated, steps=self.steps, average=self.average, events=self.events)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("accumulated", "steps", "average"):
            getattr(self, name).copy_(state[name])
        self.events = state["events"]


class Saliency(EventMean):
    """The published scores, from weights and their gradients.

    criterion: `taylor_sq` (published 23) (c sum w g)^2; `taylor_elementwise` (22) sum (w g)^2; `magnitude` (2) sum w^2.
    """

    CRITERIA = ("taylor_sq", "taylor_elementwise", "magnitude")

    def __init__(self, model: nn.Module, dims: Dims, criterion: str, momentum: float = 0.0) -> None:
        device = next(model.parameters()).device
        super().__init__(dims.sizes(), momentum, device)
        self.criterion, self._axes_of = criterion, dims.axes_of
        self._sums = torch.zeros_like(self.average)  # this step's sum of every unit
        self._views = dict(zip(self.sizes, self._sums.split(list(self.sizes.values())), strict=True))
        self._constant = torch.cat([self._constant_of(axis, n, dims) for axis, n in self.sizes.items()]).to(device)
        self._plan = [
            (p, self._destinations(name, p)) for name, p in model.named_parameters() if local_name(name) in SCORED
        ]

    def _constant_of(self, axis: str, units: int, dims: Dims) -> Tensor:
        squared = self.criterion == "taylor_sq"
        kind, _, stage = Axis.parse(axis)
        constant = 1 / len(dims.stages[stage or 0].blocks) if kind == "embed" else CONSTANTS[kind]
        return torch.full((units,), constant if squared else 1.0)

    def _destinations(
        self, name: str, parameter: nn.Parameter
    ) -> list[tuple[int, slice, list[int], list[int], Tensor]]:
        """Where a parameter's sums go: (dimension, rows of it, their shape as axes, axes to sum, the axis's sums)."""
        scored, places = SCORED[local_name(name)], []
        for position, dim in enumerate(self._axes_of(name)):
            start, seen = 0, set()
            for segment in dim:
                shape = [self.sizes[axis] for axis in segment]
                rows = slice(start, start + torch.Size(shape).numel())
                start = rows.stop
                for axis in segment:
                    kind = Axis.parse(axis).kind
                    if kind in scored and not (kind == "qk" and axis in seen):
                        others = [i for i, other in enumerate(segment) if other != axis]
                        places.append((position, rows, shape, others, self._views[axis]))
                    seen.add(axis)
        return places

    @torch.no_grad()
    def step(self) -> None:
        """Add this step's scores: after backward, with gradients unscaled and weights not yet moved."""
        self._sums.zero_()
        for parameter, places in self._plan:
            if self.criterion == "magnitude":
                product = parameter.float().square()
            elif parameter.grad is None:
                continue
            else:
                product = parameter.float() * parameter.grad
            if self.criterion == "taylor_elementwise":
                product = product.square()
            along: dict[int, Tensor] = {}
            for position, rows, shape, others, sums in places:
                if position not in along:
                    rest = [i for i in range(product.dim()) if i != position]
                    along[position] = product.sum(rest) if rest else product
                part = along[position][rows].view(shape)
                sums.add_(part.sum(others) if others else part)
        scores = self._sums * self._constant
        if self.criterion == "taylor_sq":
            scores.square_()
        self._add(scores)
