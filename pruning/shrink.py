"""A student that is compacted while it is pruned: its masks, optimizer state and scores, small and full-size.

Removed units are zeros that a masked student still computes. `Shrunk` knows which units of the full-size model the
small one has, so that checkpoints hold the masked form whatever is being trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.arch import build_vit
from models.compact import compact, expand_
from models.masks import Masks


class Student(nn.Module):
    """What the training loop trains: its model may be replaced between two steps."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.wrapped(images)

    def no_sync(self) -> Any:
        return self.wrapped.no_sync()


def _converted(state: dict[str, Any], parameter: Tensor, convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's state of one parameter. Raises ValueError for one that has neither its shape nor none."""
    found = {}
    for name, value in state.items():
        of_weights = isinstance(value, Tensor) and value.dim() > 0
        if of_weights and value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer's {name} has not the shape of the weights: a smaller student cannot take it over"
            )
        found[name] = convert(value) if of_weights else value
    return found


class Shrunk:
    """The place of a student in its full-size model.

    outer: survivors of the full-size model that the student has; masks: over all of it; optimizer: its parameters are
    those of the student.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> None:
        self.outer = masks.fresh()
        self.optimizer = optimizer
        names = {p: name for name, p in model.named_parameters()}
        self._names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    @property
    def is_full(self) -> bool:
        return self.outer.dims == self.outer.full

    def units(self, axis: str, units: Tensor) -> Tensor:
        """Units of the student as units of the full-size model (indices)."""
        return self.outer.keep[axis].nonzero().flatten().to(units.device)[units]

    def lifted(self, masks: Masks) -> Masks:
        """Masks over the student as masks over the full-size model."""
        found = self.outer.fresh()
        for axis, keep in self.outer.keep.items():
            survives = keep.clone()
            survives[keep] = masks.keep[axis]
            found.remove(axis, (~survives).nonzero().flatten())
        return found

    def shrink(self, model: nn.Module, masks: Masks) -> nn.Module:
        """The compact student of a masked one, whose place in the optimizer it takes. Raises ValueError."""
        small = compact(model, masks)
        before, after = dict(model.named_parameters()), dict(small.named_parameters())
        state = defaultdict(dict)
        for name, parameter in after.items():
            if before[name] in self.optimizer.state:
                old = self.optimizer.state[before[name]]
                state[parameter] = _converted(old, before[name], lambda value, name=name: masks.cut(name, value))
        self.optimizer.state = state
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [after[name] for name in names if name in after]
        self.outer = self.lifted(masks)
        return small

    def expanded(self, model: nn.Module, masks: Masks) -> tuple[nn.Module, Masks]:
        """The student as a masked full-size model, and its masks."""
        if self.is_full:
            return model, masks
        full = build_vit(model.arch, self.outer.full, **model.arch_kwargs)
        reference = next(model.parameters())
        full = full.to(device=reference.device, dtype=reference.dtype).train(model.training)
        expand_(full, self.outer, model)
        lifted = self.lifted(masks)
        lifted.install_(full)
        return full, lifted

    def optimizer_state(self, model: nn.Module) -> dict[str, Any]:
        """The optimizer's `state_dict` as of the full-size model."""
        plain = self.optimizer.state_dict()
        if self.is_full:
            return plain
        parameters, state, groups, index = dict(model.named_parameters()), {}, [], 0
        for group, names in zip(plain["param_groups"], self._names, strict=True):
            groups.append(group | dict(params=list(range(index, index + len(names)))))
            for name in names:
                if (p := parameters.get(name)) is not None and p in self.optimizer.state:
                    like = p.new_zeros(self._shapes[name])
                    state[index] = _converted(
                        self.optimizer.state[p],
                        p,
                        lambda value, name=name, like=like: self.outer.paste(name, value, like),
                    )
                index += 1
        return dict(state=state, param_groups=groups)

    def paste_scores(self, scores: Tensor) -> Tensor:
        """Scores of the student's units, one axis behind the other, among the full-size model's: 0 for the others."""
        keep = torch.cat([self.outer.keep[axis] for axis in self.outer.full.sizes()])
        return scores.new_zeros(len(keep)).masked_scatter_(keep, scores)
