"""The student of a pruning run: one owner of its model and masks, which compacts them while they are trained.

Removed units are zeros that a masked student still computes. A student that was compacted knows which units of the
full-size model it has left, so that checkpoints hold the masked full-size form whatever is being trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.arch import Model, build_vit
from models.compact import compact, expand_
from models.masks import Masks


def _convert(state: dict[str, Any], parameter: Tensor, convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's state of one parameter. Raises ValueError for one that has neither its shape nor none."""
    converted = {}
    for name, value in state.items():
        of_weights = isinstance(value, Tensor) and value.dim() > 0
        if of_weights and value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer's {name} has not the shape of the weights: a smaller student cannot take it over"
            )
        converted[name] = convert(value) if of_weights else value
    return converted


class Student(nn.Module):
    """What the training loop trains: a masked model that may be replaced, between two steps, by its compact one.

    masks: over the units that `model` has, narrowed in place with it; outer: survivors of the full-size model that
    `model` has.
    """

    def __init__(self, model: Model, masks: Masks) -> None:
        super().__init__()
        self.model, self.masks, self.outer = model, masks, masks.fresh()

    def prepare(self, optimizer: torch.optim.Optimizer, wrap: Callable[[Model], nn.Module]) -> None:
        """Before training. optimizer: of the model's parameters; wrap: makes of a model the module to train."""
        names = {p: name for name, p in self.model.named_parameters()}
        self.optimizer, self._wrap, self._trained = optimizer, wrap, wrap(self.model)
        self._names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self._shapes = {name: p.shape for name, p in self.model.named_parameters()}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._trained(images)

    def no_sync(self) -> Any:
        return self._trained.no_sync()

    @property
    def is_full(self) -> bool:
        return self.outer.dims == self.outer.full

    def units(self, axis: str, units: Tensor) -> Tensor:
        """Units of the student as units of the full-size model (indices)."""
        return self.outer.keep[axis].nonzero().flatten().to(units.device)[units]

    def lift_masks(self) -> Masks:
        """The student's masks as masks over the full-size model."""
        masks = self.outer.fresh()
        for axis, keep in self.outer.keep.items():
            survives = keep.clone()
            survives[keep] = self.masks.keep[axis]
            masks.remove(axis, (~survives).nonzero().flatten())
        return masks

    def shrink(self) -> None:
        """Become the compact student, which takes the masked one's place in the optimizer. Raises ValueError."""
        small = compact(self.model, self.masks)
        before, after = dict(self.model.named_parameters()), dict(small.named_parameters())
        state = defaultdict(dict)
        for name, parameter in after.items():
            if before[name] in self.optimizer.state:
                old = self.optimizer.state[before[name]]
                state[parameter] = _convert(old, before[name], lambda value, name=name: self.masks.cut(name, value))
        self.optimizer.state = state
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [after[name] for name in names if name in after]
        self.outer, self.model = self.lift_masks(), small
        self.masks.narrow_()
        self._trained = None  # the old buckets go before the new ones come
        self._trained = self._wrap(small)

    def expand(self) -> tuple[Model, Masks]:
        """The student as a masked full-size model, and its masks."""
        if self.is_full:
            return self.model, self.masks
        full = build_vit(self.model.arch, self.outer.full, **self.model.arch_kwargs)
        reference = next(self.model.parameters())
        full = full.to(device=reference.device, dtype=reference.dtype).train(self.model.training)
        expand_(full, self.outer, self.model)
        lifted = self.lift_masks()
        lifted.install_(full)
        return full, lifted

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's `state_dict` as of the full-size model."""
        plain = self.optimizer.state_dict()
        if self.is_full:
            return plain
        parameters, state, groups, index = dict(self.model.named_parameters()), {}, [], 0
        for group, names in zip(plain["param_groups"], self._names, strict=True):
            groups.append(group | dict(params=list(range(index, index + len(names)))))
            for name in names:
                if (p := parameters.get(name)) is not None and p in self.optimizer.state:
                    like = p.new_zeros(self._shapes[name])
                    state[index] = _convert(
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
