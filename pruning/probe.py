"""What each width of each block is worth, measured: how far the outputs move when it alone is cut and the rest adapts.

A probe cuts one axis of one block of an aligned model, compensates for it in closed form, and runs the rest of the
dense model. The divergence of its outputs from the dense ones, on other images, is the price of that width: one
currency for all axes. No labels, no gradients; the time is quadratic in depth, and `pruning.pricing` is the quick way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.axes import Axis
from models.compact import compact
from models.masks import Masks
from models.tokens import by_content, spread_merge
from models.vit import Attention
from pruning import streams
from pruning.moments import PLAIN_RIDGE, Moments, compensate, correct
from pruning.objective import PREDICTIONS, Objective, mean_divergence
from pruning.refit import refit_
from pruning.streams import Branch

Curve = dict[int, float]  # divergence by width, in the objective's unit; 0 at the full width


class Prices(NamedTuple):
    """What widths are worth: of every block, the curves of its axes, and the curve of the embedding."""

    blocks: list[dict[str, Curve]]
    embed: Curve


FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of an axis: the widths that are probed
FITTED, JUDGED = 4, 16  # one calibration image in so many fits a probe, judges it
FRACTIONS_EMBED = (1 / 4, 1 / 2, 3 / 4)  # each costs a refit of the whole model


def widths_to_probe(full: int, group: int, fractions: tuple[float, ...] = FRACTIONS) -> list[int]:
    """Multiples of the group below the full width that are nearest to the fractions of it."""
    return sorted({max(1, round(full * f / group)) * group for f in fractions} - {full})


def narrow_queries(attention: Attention, qk: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The rows of qkv that are left with the first `qk` channels of queries and keys, and what then mixes them."""
    H, d = attention.num_heads, attention.qk
    units = torch.arange(H * d, device=attention.qkv.weight.device).view(H, d)
    narrow = copy.copy(attention)
    narrow.qk = qk
    first = units[:, :qk].flatten()
    return torch.cat([first, H * d + first, 2 * H * d + units.flatten()]), narrow.mix


class _Probe:
    """One branch of block `index`: its inputs and outputs over images to fit and to judge by, and its probes.

    rest: what the rest of the dense model makes of the stream after the branch.
    """

    def __init__(
        self,
        branch: Branch,
        fit: list[Tensor],
        judge: list[Tensor],
        read: slice,
        rest: Callable[[Tensor], Tensor],
        outputs: list[Tensor],
        objective: Objective,
    ) -> None:
        self.branch, self.read, self.rest, self.outputs, self.objective = branch, read, rest, outputs, objective
        self.fit = [branch.first(branch.norm(x)) for x in fit]
        self.fitted = [branch.mix(first) for first in self.fit]
        self.judge, self.judged = judge, [branch.first(branch.norm(x)) for x in judge]
        weight, bias = branch.last.weight.double(), branch.last.bias
        self.last = weight, None if bias is None else bias.double()
        self.moments = Moments(branch.last.in_features, device=weight.device)
        for mixed in self.fitted:
            self.moments.add(mixed[:, read])
        self.moments.all_reduce()

    def without_inputs(self, kept: Tensor) -> float:
        """The price of keeping only the inputs `kept` (indices) of the last layer."""
        weight, bias = compensate(*self.last, self.moments, kept)
        return self._price(lambda first: self.branch.mix(first)[..., kept], weight, bias)

    def without_rows(self, kept: Tensor, mix: Callable[[Tensor], Tensor]) -> float:
        """The price of keeping only the rows `kept` (indices) of the first layer, which `mix` then mixes."""
        weight, bias = self.last
        moments = Moments(len(weight.T), len(weight), weight.device)
        for first, mixed in zip(self.fit, self.fitted, strict=True):
            moments.add(mix(first[..., kept])[:, self.read], self.branch.last(mixed)[:, self.read])
        weight, bias = correct(weight, bias, moments.all_reduce(), PLAIN_RIDGE)
        return self._price(lambda first: mix(first[..., kept]), weight, bias)

    def without_branch(self) -> float:
        return self._price(None, *self.last)

    def _price(self, mix: Callable[[Tensor], Tensor] | None, weight: Tensor, bias: Tensor | None) -> float:
        weight, bias = weight.float(), None if bias is None else bias.float()
        gamma = 1 if self.branch.gamma is None else self.branch.gamma

        def outputs(x: Tensor, first: Tensor) -> Tensor:
            return self.rest(x if mix is None else x + gamma * nn.functional.linear(mix(first), weight, bias))

        places = zip(self.judge, self.judged, self.outputs, strict=True)
        return mean_divergence(((outputs(x, first), dense) for x, first, dense in places), self.objective)


def _attention_curves(probe: _Probe, attention: Attention, groups: dict[str, int]) -> dict[str, Curve]:
    H, d = attention.num_heads, attention.qk
    units = torch.arange(H * d, device=attention.qkv.weight.device).view(H, d)
    curves = dict(heads={H: 0.0, 0: probe.without_branch()}, qk={d: 0.0}, v={d: 0.0})
    for heads in widths_to_probe(H, groups["heads"]):
        curves["heads"][heads] = probe.without_inputs(units[:heads].flatten())
    for v in widths_to_probe(d, groups["v"]):
        curves["v"][v] = probe.without_inputs(units[:, :v].flatten())
    for qk in widths_to_probe(d, groups["qk"]):
        curves["qk"][qk] = probe.without_rows(*narrow_queries(attention, qk))
    return curves


def _mlp_curve(probe: _Probe, full: int, group: int) -> Curve:
    units = torch.arange(full, device=probe.last[0].device)
    return {full: 0.0, 0: probe.without_branch()} | {
        width: probe.without_inputs(units[:width]) for width in widths_to_probe(full, group)
    }


def _token_curve(
    model: VisionTransformer,
    index: int,
    judge: list[Tensor],
    outputs: list[Tensor],
    group: int,
    objective: Objective,
) -> Curve:
    """Prices of the token counts of a block, its patches merged around survivors that are spread evenly, or by
    content where the model does that.

    judge: the stream before the block. Nothing compensates.
    """
    grid, prefix, block = model.patch_embed.grid_size, model.num_prefix_tokens, model.blocks[index]
    patches, before = grid[0] * grid[1], block.tokens
    curve = {prefix + patches: 0.0}
    for left in widths_to_probe(patches, group):
        block.tokens = spread_merge(left, grid, index, prefix, by_content(model)).to(judge[0].device)
        outs = (objective.outputs(model, model.blocks[index:](x)) for x in judge)
        curve[prefix + left] = mean_divergence(zip(outs, outputs, strict=True), objective)
    block.tokens = before
    return curve


@torch.no_grad()
def block_curves(
    model: VisionTransformer,
    fit: Tensor,
    judge: Tensor,
    groups: dict[str, int],
    batch: int,
    objective: Objective = PREDICTIONS,
) -> list[dict[str, Curve]]:
    """Per block, prices of the widths of heads, qk, v and mlp; width 0 of heads or mlp is the branch's absence.

    Where `groups` has them, of token counts too. model: aligned, full-size, in eval mode; fit, judge: images (n, 3, H,
    W) that a probe compensates with, and is judged on; groups: units per group, by axis. With several processes, each
    gives its own images, as many.
    """
    device, curves = next(model.parameters()).device, []
    judge = [images.to(device) for images in judge.split(batch)]
    outputs = [objective.outputs(model, model.blocks(streams.stem(model, images))) for images in judge]
    fit, judge = ([streams.stem(model, images.to(device)) for images in side] for side in (fit.split(batch), judge))
    for i, block in enumerate(model.blocks):
        later = model.blocks[i + 1 :]
        read = slice(None) if len(later) else objective.read(model)
        curve_of: dict[str, Curve] = {}
        if group := groups.get(str(Axis("tokens", i))):
            curve_of["tokens"] = _token_curve(model, i, judge, outputs, group, objective)
        for branch in streams.branches(block):
            is_attention = branch.last is block.attn.proj
            others = [streams.mlp(block)] if is_attention else []

            def rest(x: Tensor, others: list[Branch] = others, later: nn.Module = later) -> Tensor:
                for other in others:
                    x = x + other(x)
                return objective.outputs(model, later(x))

            probe = _Probe(branch, fit, judge, read, rest, outputs, objective)
            local = {kind: groups[str(Axis(kind, i))] for kind in ("heads", "qk", "v", "mlp")}
            if is_attention:
                curve_of |= _attention_curves(probe, block.attn, local)
            else:
                curve_of["mlp"] = _mlp_curve(probe, block.dims.mlp, local["mlp"])
            fit, judge = ([x + branch(x) for x in side] for side in (fit, judge))
        curves.append(curve_of)
    return curves


def embed_curve(
    model: VisionTransformer,
    fit: Tensor,
    judge: Tensor,
    group: int,
    batch: int,
    objective: Objective = PREDICTIONS,
) -> Curve:
    """Prices of embedding widths: each is a refit of the whole model at that width, judged on other images."""
    curve = {model.dims.embed: 0.0}
    for width in widths_to_probe(model.dims.embed, group, FRACTIONS_EMBED):
        masks = Masks.first(model.dims, replace(model.dims, embed=width), next(model.parameters()).device)
        curve[width] = refit_(model, compact(model, masks), masks, fit, batch, objective, judge)
    return curve


def measure_prices(
    model: VisionTransformer,
    images: Tensor,
    groups: dict[str, int],
    batch: int,
    objective: Objective = PREDICTIONS,
) -> Prices:
    """`block_curves` and `embed_curve` from a part of the calibration images, which is enough to compare widths."""
    fit, judge = images[: max(1, len(images) // FITTED)], images[-max(1, len(images) // JUDGED) :]
    curves = block_curves(model, fit, judge, groups, batch, objective)
    return Prices(curves, embed_curve(model, fit, judge, groups["embed"], batch, objective))
