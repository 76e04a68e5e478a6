"""Cuts of a branch to the widths that are priced, compensated in closed form, as changes of what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.axes import Axis
from models.vit import Block
from pruning import streams
from pruning.moments import PLAIN_RIDGE, Moments, compensate, correct
from pruning.probe import narrow_queries, widths_to_probe
from pruning.streams import Branch


@dataclass
class Cuts:
    """The compensated cuts of one branch, as changes of what its last layer gives.

    linear: changes of weight (E, n) and bias; remixed: another mix of the first layer's rows `kept`, and the last
    layer's weight and bias for it. Keys are (axis, width).
    """

    branch: Branch
    linear: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    remixed: dict[tuple[str, int], tuple[Tensor, Callable, Tensor, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, block: Block, branch: Branch, groups: dict[str, int], stream: list[Tensor], read: slice) -> Cuts:
        """Fitted on the stream before the branch, which is moved past it. groups: units per group, by kind of axis."""
        cuts, last = cls(branch), branch.last
        weight, bias = last.weight.double(), None if last.bias is None else last.bias.double()
        moments = Moments(last.in_features, device=weight.device)
        firsts = [branch.first(branch.norm(x)) for x in stream]
        mixed = [branch.mix(first) for first in firsts]
        for values in mixed:
            moments.add(values[:, read])
        moments.all_reduce()

        def keep(axis: str, width: int, kept: Tensor) -> None:
            fitted, moved = compensate(weight, bias, moments, kept)
            change = (-weight).index_add(1, kept, fitted)
            cuts.linear[axis, width] = change.float(), None if bias is None else (moved - bias).float()

        is_attention = last is block.attn.proj
        if is_attention:
            H, d = block.attn.num_heads, block.attn.qk
            units = torch.arange(H * d, device=weight.device).view(H, d)
            for heads in widths_to_probe(H, groups["heads"]):
                keep("heads", heads, units[:heads].flatten())
            for v in widths_to_probe(d, groups["v"]):
                keep("v", v, units[:, :v].flatten())
            for qk in widths_to_probe(d, groups["qk"]):
                kept, mix = narrow_queries(block.attn, qk)
                pairs = Moments(last.in_features, last.out_features, weight.device)
                for first, values in zip(firsts, mixed, strict=True):
                    pairs.add(mix(first[..., kept])[:, read], last(values)[:, read])
                fitted, moved = correct(weight, bias, pairs.all_reduce(), PLAIN_RIDGE)
                cuts.remixed["qk", qk] = kept, mix, fitted.float(), None if bias is None else moved.float()
        else:
            units = torch.arange(block.dims.mlp, device=weight.device)
            for width in widths_to_probe(len(units), groups["mlp"]):
                keep("mlp", width, units[:width])
        gone = -last.weight, None if bias is None else -last.bias
        cuts.linear["heads" if is_attention else "mlp", 0] = gone
        stream[:] = [x + branch.write(values) for x, values in zip(stream, mixed, strict=True)]
        return cuts

    def changes(self, gradient: Tensor, first: Tensor, mixed: Tensor) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """Of every cut the sum of g d over tokens and channels, (B,). gradient: (B, N, E), behind the branch."""
        if self.branch.gamma is not None:
            gradient = gradient * self.branch.gamma
        outer, total = torch.einsum("bne,bni->bei", gradient, mixed), gradient.sum(1)
        for key, (weight, bias) in self.linear.items():
            linear = torch.einsum("bei,ei->b", outer, weight)
            yield key, linear if bias is None else linear + total @ bias
        for key, (kept, mix, weight, bias) in self.remixed.items():
            change = nn.functional.linear(mix(first[..., kept]), weight, bias) - self.branch.last(mixed)
            yield key, (gradient * change).sum((1, 2))


@torch.no_grad()
def fit_cuts(
    model: VisionTransformer, images: Tensor, groups: dict[str, int], batch: int, read: slice
) -> list[list[Cuts]]:
    """The cuts of every block's branches, compensated on images."""
    device = next(model.parameters()).device
    stream = [streams.stem(model, part.to(device)) for part in images.split(batch)]
    cuts = []
    for i, block in enumerate(model.blocks):
        local = {kind: groups[str(Axis(kind, i))] for kind in ("heads", "qk", "v", "mlp")}
        tokens = read if i + 1 == len(model.blocks) else slice(None)
        cuts.append([Cuts.of(block, branch, local, stream, tokens) for branch in streams.branches(block)])
    return cuts
