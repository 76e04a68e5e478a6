"""Refit a cut model to the dense one, layer by layer from input to output, in closed form: no labels, no gradients.

Dense and pruned model walk side by side over calibration images. Every layer that reads the residual stream is fitted
to the dense layer's outputs, every layer that writes it to the dense stream minus the pruned one, so that errors are
corrected as they arise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.masks import Masks
from models.vit import Block
from pruning import streams
from pruning.moments import Moments, correct_
from pruning.objective import PREDICTIONS, Objective, judge
from pruning.streams import Branch

T = TypeVar("T")
HELD = 10  # every tenth image is held out of the fits at first: it chooses their ridges
JUDGED = 16  # one calibration image in so many is in no fit: it judges the result


@dataclass
class _Streams:
    """Residual streams of both models after as many layers, one tensor (B, N, E) per batch; held: not fitted."""

    dense: list[Tensor]
    pruned: list[Tensor]
    held: list[bool]

    @classmethod
    def of(cls, dense: VisionTransformer, pruned: VisionTransformer, images: Tensor, batch: int) -> _Streams:
        count = -(-len(images) // HELD)
        held, fitted = images[:count].split(batch), images[count:].split(batch)
        device = next(dense.parameters()).device
        parts = [part.to(device) for part in (*held, *fitted)]
        return cls(
            [streams.stem(dense, part) for part in parts],
            [streams.stem(pruned, part) for part in parts],
            [True] * len(held) + [False] * len(fitted),
        )

    def fit_(self, layer: nn.Linear, inputs: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        """Fit a layer of the pruned model, given its inputs and targets batch by batch."""
        sets = [Moments(layer.in_features, layer.out_features, layer.weight.device) for _ in range(2)]
        for x, target, held in zip(inputs, targets, self.held, strict=True):
            sets[held].add(x, target)
        correct_(layer, *(moments.all_reduce() for moments in sets))


def _refit_branch(
    big: Branch,
    small: Branch,
    rows: Tensor,
    kept: Tensor,
    s: _Streams,
    read: slice,
    merged: Sequence[Callable[[Tensor], Tensor]],
    biases: Sequence[tuple[Tensor, ...]],
) -> None:
    """Refit the layers of a branch, and move both streams past it.

    rows: of the dense first layers, side by side, that survive; kept: embedding channels that survive; read: tokens
    that count in what the branch writes; merged: per batch, from the dense model's tokens to those that the pruned
    block computes on; biases: per batch, what the pruned branch mixes with besides its first layers.
    """
    targets = []
    for i, (x, compress) in enumerate(zip(s.dense, merged, strict=True)):
        first = big.first(big.norm(x))
        targets.append(compress(first[..., rows]))
        s.dense[i] = x + big.write(big.mix(first))
    begin = 0
    for reader in small.readers.values():
        part = slice(begin, begin := begin + reader.out_features)
        s.fit_(reader, (small.norm(z) for z in s.pruned), (target[..., part] for target in targets))
    mixed = [small.mix(small.first(small.norm(z)), *bias) for z, bias in zip(s.pruned, biases, strict=True)]
    gamma = 1 if small.gamma is None else small.gamma
    pairs = zip(s.dense, s.pruned, merged, strict=True)
    missing = (((compress(x[..., kept]) - z) / gamma)[:, read] for x, z, compress in pairs)
    s.fit_(small.last, (m[:, read] for m in mixed), missing)
    s.pruned = [z + small.write(m) for z, m in zip(s.pruned, mixed, strict=True)]


def _rows_kept(block: str, branch: Branch, masks: Masks) -> Tensor:
    """Indices of the rows of a dense branch's first layers, side by side, that survive."""
    begin, parts = 0, []
    for name, reader in branch.readers.items():
        parts.append(begin + masks.kept(f"{block}.{name}.weight", 0))
        begin += reader.out_features
    return torch.cat(parts)


def unseen_of(images: Sequence[T]) -> Sequence[T]:
    """Of calibration images, or of their places, those that no fit sees: the last sixteenth."""
    return images[len(images) - max(1, len(images) // JUDGED) :]


@torch.no_grad()
def refit_(
    dense: VisionTransformer,
    pruned: VisionTransformer,
    masks: Masks,
    images: Tensor,
    batch: int,
    objective: Objective = PREDICTIONS,
    unseen: Tensor | None = None,
) -> float:
    """Refit the compact model `pruned`, cut from `dense` by `masks`, in place; both in eval mode.

    images: calibration images (n, 3, H, W), read `batch` at a time; with several processes, each gives its own, as
    many. Returns the objective's divergence on images that no fit has seen: `unseen`, by default the last sixteenth of
    `images`, which then takes no part in the fit.
    """
    if unseen is None:
        images, unseen = images[: -len(unseen_of(images))], unseen_of(images)
    s = _Streams.of(dense, pruned, images, batch)
    kept = masks.keep["embed"].nonzero().flatten()
    for i, (big, small) in enumerate(zip(dense.blocks, pruned.blocks, strict=True)):
        read = objective.read(dense) if i + 1 == len(dense.blocks) else slice(None)
        _refit_block(i, big, small, masks, kept, s, read)
    for k, (layer, _) in enumerate(objective.last_layers(pruned, s.pruned[0])):
        inputs = (objective.last_layers(pruned, z)[k][1] for z in s.pruned)
        targets = (taught(x) for taught, x in (objective.last_layers(dense, x)[k] for x in s.dense))
        s.fit_(layer, inputs, targets)
    return judge(pruned, dense, unseen, batch, objective)


def _refit_block(index: int, big: Block, small: Block, masks: Masks, kept: Tensor, s: _Streams, read: slice) -> None:
    """Refit both branches of a block, and move both streams past it. Arguments as of `_refit_branch`."""
    before, tokens = s.pruned, [small.tokens.groups_for(z) for z in s.pruned] if small.tokens else []
    merged = [t.compress for t in tokens] or [lambda x: x] * len(before)
    inside = s.pruned = [compress(z) for compress, z in zip(merged, before, strict=True)]
    none = [()] * len(before)
    biases = [() if t.bias is None else (t.bias,) for t in tokens] or none
    for branch_of, also in ((streams.attention, biases), (streams.mlp, none)):
        branch = branch_of(big)
        if branch_of(small):
            rows = _rows_kept(f"blocks.{index}", branch, masks)
            _refit_branch(branch, branch_of(small), rows, kept, s, read, merged, also)
        elif branch:
            s.dense = [x + branch(x) for x in s.dense]
    if tokens:
        parts = zip(tokens, s.pruned, inside, before, strict=True)
        s.pruned = [t.restore(out, z, x) for t, out, z, x in parts]
