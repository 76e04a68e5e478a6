"""How many tokens every block needs: measured, for a number that all blocks share.

Patches merge around survivors that are spread evenly over the grid, or by content with such anchors
(`models.tokens.spread`), so only their number has to be found. A block's price at a few counts is the KL divergence of
the predictions to the dense ones while the other blocks are at the counts found so far; an exact dynamic programme then
shares out the total. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.patch_grid import spread_evenly
from models.tokens import spread
from pruning import streams
from pruning.allocation import interpolated
from pruning.pm_vit import Structure
from pruning.probe import judged, probed_widths

ROUNDS = 2  # of measuring and sharing out


class _Counted:
    """A model whose blocks `layers` compute on a number of patches each, while `installed`."""

    def __init__(self, model: VisionTransformer, layers: Sequence[int], content: bool) -> None:
        self.model, self.layers, self.content = model, layers, content
        self.grid, self.prefix = model.patch_embed.grid_size, model.num_prefix_tokens
        self.patches = self.grid[0] * self.grid[1]

    def set(self, layer: int, count: int) -> None:
        """Let a block compute on so many patches."""
        tokens, reference = None, next(self.model.parameters())
        if count < self.patches:
            tokens = spread(count, self.grid, layer, self.prefix, self.content).to(reference)
        self.model.blocks[layer].tokens = tokens

    @contextmanager
    def installed(self, counts: Sequence[int]) -> Iterator[None]:
        """The counts of all layers in place; afterwards the blocks are as before."""
        before = [self.model.blocks[i].tokens for i in self.layers]
        try:
            for layer, count in zip(self.layers, counts, strict=True):
                self.set(layer, count)
            yield
        finally:
            for layer, tokens in zip(self.layers, before, strict=True):
                self.model.blocks[layer].tokens = tokens


def _curves(counted: _Counted, counts: Sequence[int], parts: list[Tensor], logits: list[Tensor]) -> list[dict]:
    """Of every layer the divergence at a few counts, the other layers at `counts`."""
    model, curves = counted.model, []
    stream = [streams.stem(model, images) for images in parts]
    widths = [*probed_widths(counted.patches, 1), counted.patches]
    for i, block in enumerate(model.blocks):
        if i in counted.layers:
            curves.append({})
            for count in widths:
                counted.set(i, count)
                found = (streams.head(model, model.blocks[i:](x)) for x in stream)
                curves[-1][count] = judged(zip(found, logits, strict=True))
            counted.set(i, counts[len(curves) - 1])
        stream = [block(x) for x in stream]
    return curves


def shared_out(curves: list[dict[int, float]], patches: int, total: int) -> list[int]:
    """Counts from 1 to `patches` of least divergence in all, which sum to `total` exactly."""
    widths = np.arange(1, patches + 1)
    best, picks = np.where(np.arange(total + 1) == 0, 0.0, np.inf), []
    for curve in curves:
        prices = interpolated(curve, widths)
        new, pick = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=int)
        for width, price in zip(widths[:total], prices, strict=False):
            reached = best[: total + 1 - width] + price
            better = reached < new[width:]
            new[width:][better], pick[width:][better] = reached[better], width
        best = new
        picks.append(pick)
    found, left = [], total
    for pick in reversed(picks):
        found.append(int(pick[left]))
        left -= found[-1]
    return found[::-1]


@torch.no_grad()
def probed(
    model: VisionTransformer, layers: Sequence[int], images: Tensor, total: int, batch: int, content: bool = False
) -> Structure:
    """The structure of `layers` with `total` centres in all; nothing is skipped, all patches weigh the same.

    model: in eval mode, left as it is; images: this process's calibration images (n, 3, H, W), read `batch` at a time;
    with several processes, each gives as many; content: patches merge by content.
    """
    counted, device = _Counted(model, layers, content), next(model.parameters()).device
    parts = [part.to(device) for part in images.split(batch)]
    logits = [model(part) for part in parts]
    counts = [total // len(layers) + (k < total % len(layers)) for k in range(len(layers))]
    tried: dict[tuple[int, ...], float] = {}
    for _ in range(ROUNDS):
        with counted.installed(counts):
            curves = _curves(counted, counts, parts, logits)
        counts = shared_out(curves, counted.patches, total)
        with counted.installed(counts):
            tried[tuple(counts)] = judged(zip(map(model, parts), logits, strict=True))
    best = min(tried, key=tried.get)
    centres = torch.stack([spread_evenly(counted.grid, i, n) for i, n in zip(layers, best, strict=True)])
    return Structure(tuple(layers), centres, torch.zeros_like(centres), torch.ones(centres.shape, dtype=torch.float64))
