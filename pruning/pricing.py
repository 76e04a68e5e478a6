"""What each width of each block is worth, in time linear in depth: one forward pass, and a backward pass per probe.

A cut of a branch changes what the branch writes by d, after its own compensation on calibration images. With g the
gradient of c . f at the stream behind the branch, and c a cotangent of the objective (`pruning.objective`), the
divergence that the cut causes is, to second order,

    price = 1/2 mean over images and probes of (sum over tokens and channels of g d)^2.

No cut needs the rest of the model. Where a whole branch goes, the step is too large for the second order: the dearest
branches are measured by running the rest of the model, and the ratio found there is applied to the others.

Cutting the embedding takes d from the stem and from every branch: the channels that go. That overstates the price, as
the remaining channels are refitted, but by nearly the same factor at every width; one refit of the whole model gives
the factor. `pruning.probe` measures the same prices directly, in time quadratic in depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.axes import Axis
from models.compact import compact
from models.masks import Masks
from models.tokens import by_content, spread_merge
from pruning import streams
from pruning.cuts import Cuts, fit_cuts
from pruning.moments import all_reduced
from pruning.objective import PREDICTIONS, Objective, mean_divergence
from pruning.probe import Curve, Prices, widths_to_probe
from pruning.refit import refit_

FITTED, JUDGED = 4, 4  # one calibration image in so many compensates the cuts, judges them
BRANCH_JUDGED = 16  # and one in so many judges whole branches
PROBES = 2  # backward passes for every judging image
MEASURED = 12  # whole branches, at most
FRACTIONS_EMBED = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


class _Squares:
    """Sums of squares over images and probes, by key."""

    def __init__(self) -> None:
        self.sums: dict[tuple, Tensor] = {}
        self.samples = 0

    def add(self, key: tuple, values: Tensor) -> None:
        square = values.double().square().sum()
        self.sums[key] = self.sums[key] + square if key in self.sums else square

    def prices(self) -> dict[tuple, float]:
        """Half the means, over all processes."""
        keys = list(self.sums)
        total = torch.stack([*self.sums.values(), self.sums[keys[0]].new_tensor(float(self.samples))])
        *values, samples = all_reduced(total).tolist()
        return {key: value / (2 * samples) for key, value in zip(keys, values, strict=True)}


def _image_numbers(count: int) -> range:
    """Numbers of this process's images, which no other process gives its own."""
    if not dist.is_initialized():
        return range(count)
    return range(dist.get_rank(), dist.get_world_size() * count, dist.get_world_size())


class _Judge:
    """Sums over judging images of what every cut changes. It goes through the model once, and back once per probe."""

    def __init__(
        self, model: VisionTransformer, cuts: list[list[Cuts]], groups: dict[str, int], objective: Objective
    ) -> None:
        self.model, self.cuts, self.objective, self.squares = model, cuts, objective, _Squares()
        self.embeds = widths_to_probe(model.dims.embed, groups["embed"], FRACTIONS_EMBED)
        patches = model.patch_embed.num_patches
        axes = {i: groups.get(str(Axis("tokens", i))) for i in range(len(model.blocks))}
        self.tokens = {i: widths_to_probe(patches, group) for i, group in axes.items() if group}

    def see(self, images: Tensor, numbers: Sequence[int], probes: int) -> None:
        """Judging images (B, 3, H, W) on the model's device, with their numbers."""
        with torch.no_grad():
            x = streams.stem(self.model, images)
        inputs, inner, writes = [], [], [x]
        with torch.enable_grad():
            behind = [x.requires_grad_()]
            for branches in self.cuts:
                inputs.append(behind[-1].detach())
                for branch in (cuts.branch for cuts in branches):
                    first = branch.first(branch.norm(behind[-1]))
                    mixed = branch.mix(first)
                    written = branch.write(mixed)
                    behind.append(behind[-1] + written)
                    inner.append((first.detach(), mixed.detach()))
                    writes.append(written.detach())
            outputs = self.objective.outputs(self.model, behind[-1])
            cotangents = self.objective.cotangents(outputs.detach(), numbers, probes)
            for k, cotangent in enumerate(cotangents):
                gradients = torch.autograd.grad(outputs, behind, cotangent, retain_graph=k + 1 < probes)
                with torch.no_grad():
                    self._add(gradients, behind, inputs, inner, writes)
        self.squares.samples += probes * len(images)

    def _add(
        self,
        gradients: Sequence[Tensor],
        behind: list[Tensor],
        inputs: list[Tensor],
        inner: list[tuple[Tensor, Tensor]],
        writes: list[Tensor],
    ) -> None:
        place = 0
        for i, branches in enumerate(self.cuts):
            for cuts in branches:
                place += 1
                for key, change in cuts.changes(gradients[place], *inner[place - 1]):
                    self.squares.add((i, *key), change)
            for left in self.tokens.get(i, ()):
                change = self._merged(i, left, inputs[i]) - behind[place]
                key = i, "tokens", self.model.num_prefix_tokens + left
                self.squares.add(key, (gradients[place] * change).sum((1, 2)))
        for width in self.embeds:
            gone = sum((g[..., width:] * w[..., width:]).sum((1, 2)) for g, w in zip(gradients, writes, strict=True))
            self.squares.add((None, "embed", width), gone)

    def _merged(self, index: int, left: int, x: Tensor) -> Tensor:
        """A block's output with its patches merged around survivors that are spread evenly, or by content."""
        block, before = self.model.blocks[index], self.model.blocks[index].tokens
        grid, prefix = self.model.patch_embed.grid_size, self.model.num_prefix_tokens
        block.tokens = spread_merge(left, grid, index, prefix, by_content(self.model)).to(x.device)
        try:
            return block(x)
        finally:
            block.tokens = before


@torch.no_grad()
def _without_branches(
    model: VisionTransformer, chosen: set[tuple[int, str]], images: Tensor, batch: int, objective: Objective
) -> dict[tuple[int, str], float]:
    """Measured divergence without each of the chosen branches: (block, `heads` or `mlp`)."""
    device, totals = next(model.parameters()).device, {}
    for part in images.split(batch):
        x, pending = streams.stem(model, part.to(device)), {}
        for i, block in enumerate(model.blocks):
            for branch in streams.branches(block):
                key = i, "heads" if branch.last is block.attn.proj else "mlp"
                written = branch(x)
                if key in chosen:
                    rest = x if key[1] == "mlp" or not block.dims.mlp else x + streams.mlp(block)(x)
                    pending[key] = objective.outputs(model, model.blocks[i + 1 :](rest))
                x = x + written
        dense = objective.outputs(model, x)
        for key, outputs in pending.items():
            totals.setdefault(key, []).append((outputs, dense))
    return {key: mean_divergence(totals[key], objective) for key in sorted(totals)}


def _correct_branches_(
    prices: dict[tuple, float],
    model: VisionTransformer,
    images: Tensor,
    batch: int,
    objective: Objective,
) -> None:
    """Replace the prices of the dearest branches by measured ones, and raise the others by the ratio found there."""
    whole = sorted((key for key in prices if key[2] == 0), key=lambda key: -prices[key])
    chosen = whole[:MEASURED]
    measured = _without_branches(model, {key[:2] for key in chosen}, images, batch, objective)
    measured = {(*key, 0): value for key, value in measured.items()}
    pairs = [(prices[key], measured[key]) for key in chosen if min(prices[key], measured[key]) > 0]
    if len(pairs) > 2:
        formula, found = np.log(np.array(pairs)).T
        slope, offset = np.polyfit(formula, found - formula, 1)
        for key in whole[MEASURED:]:
            prices[key] *= max(1.0, float(np.exp(offset + slope * np.log(max(prices[key], 1e-30)))))
    prices.update(measured)


def _embed_curve(
    model: VisionTransformer,
    prices: dict[int, float],
    fit: Tensor,
    judge: Tensor,
    batch: int,
    objective: Objective,
) -> Curve:
    """Prices of embedding widths by the formula, times the factor that a refit at the middle width shows."""
    if not prices:
        return {model.dims.embed: 0.0}
    middle = min(prices, key=lambda width: abs(width - model.dims.embed / 2))
    masks = Masks.first(model.dims, replace(model.dims, embed=middle), next(model.parameters()).device)
    measured = refit_(model, compact(model, masks), masks, fit, batch, objective, judge)
    factor = measured / prices[middle] if prices[middle] > 0 else 1.0
    return {width: factor * price for width, price in prices.items()} | {model.dims.embed: 0.0}


def price(
    model: VisionTransformer,
    images: Tensor,
    groups: dict[str, int],
    batch: int,
    objective: Objective = PREDICTIONS,
) -> Prices:
    """Prices of every width of an aligned full-size model in eval mode, from a part of its calibration images.

    images: (n, 3, H, W), read `batch` at a time; with several processes, each gives its own, as many. groups: units per
    group, by axis; token counts are priced where it has them. Width 0 of heads or mlp is the branch's absence.
    """
    fit, judge = images[: max(1, len(images) // FITTED)], images[-max(1, len(images) // JUDGED) :]
    cuts = fit_cuts(model, fit, groups, batch, objective.read(model))
    judging = _Judge(model, cuts, groups, objective)
    device = next(model.parameters()).device
    numbers = _image_numbers(len(judge))
    for start in range(0, len(judge), batch):
        judging.see(judge[start : start + batch].to(device), numbers[start : start + batch], PROBES)
    prices = judging.squares.prices()
    _correct_branches_(prices, model, judge[-max(1, len(images) // BRANCH_JUDGED) :], batch, objective)
    curves: list[dict[str, Curve]] = []
    for block, branches in zip(model.blocks, cuts, strict=True):
        full = {axis: getattr(block.dims, axis) for axis in ("heads", "qk", "v", "mlp")}
        kinds = [("heads", "qk", "v") if c.branch.last is block.attn.proj else ("mlp",) for c in branches]
        curves.append({axis: {full[axis]: 0.0} for group in kinds for axis in group})
    embed: dict[int, float] = {}
    for (block, axis, width), value in prices.items():
        curve = embed if block is None else curves[block].setdefault(axis, {model.dims.blocks[block].tokens: 0.0})
        curve[width] = value
    return Prices(curves, _embed_curve(model, embed, fit, judge, batch, objective))
