"""How many tokens every block needs: measured, for a number that all blocks share.

Patches merge around survivors that are spread evenly over the grid, or by content around such anchors
(`models.tokens.spread_merge`), so only the number of survivors is chosen. The price of a block at a few counts is the
KL divergence of the predictions from the dense ones, with the other blocks at the counts chosen so far. An exact
dynamic programme then shares out the total. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.patch_grid import spread_evenly
from models.tokens import spread_merge
from pruning import streams
from pruning.allocation import interpolate
from pruning.objective import mean_divergence
from pruning.pm_vit import Structure
from pruning.probe import widths_to_probe

ROUNDS = 2  # of pricing and sharing out


class _Blocks:
    """A model whose blocks `layers` each compute on a chosen number of patches, inside `install`."""

    def __init__(self, model: VisionTransformer, layers: Sequence[int], content: bool) -> None:
        self.model, self.layers, self.content = model, layers, content
        self.grid, self.prefix = model.patch_embed.grid_size, model.num_prefix_tokens
        self.patches = self.grid[0] * self.grid[1]

    def set(self, layer: int, count: int) -> None:
        """Let a block compute on so many patches."""
        tokens, reference = None, next(self.model.parameters())
        if count < self.patches:
            tokens = spread_merge(count, self.grid, layer, self.prefix, self.content).to(reference)
        self.model.blocks[layer].tokens = tokens

    @contextmanager
    def install(self, counts: Sequence[int]) -> Iterator[None]:
        """Put the counts of all layers in place; on leaving, the blocks are as before."""
        before = [self.model.blocks[i].tokens for i in self.layers]
        try:
            for layer, count in zip(self.layers, counts, strict=True):
                self.set(layer, count)
            yield
        finally:
            for layer, tokens in zip(self.layers, before, strict=True):
                self.model.blocks[layer].tokens = tokens


def _curves(blocks: _Blocks, counts: Sequence[int], parts: list[Tensor], logits: list[Tensor]) -> list[dict]:
    """Of every layer the divergence at a few counts, the other layers at `counts`."""
    model, curves = blocks.model, []
    stream = [streams.stem(model, images) for images in parts]
    widths = [*widths_to_probe(blocks.patches, 1), blocks.patches]
    for i, block in enumerate(model.blocks):
        if i in blocks.layers:
            curves.append({})
            for count in widths:
                blocks.set(i, count)
                outputs = (streams.head(model, model.blocks[i:](x)) for x in stream)
                curves[-1][count] = mean_divergence(zip(outputs, logits, strict=True))
            blocks.set(i, counts[len(curves) - 1])
        stream = [block(x) for x in stream]
    return curves


def share_out(curves: list[dict[int, float]], patches: int, total: int) -> list[int]:
    """Counts from 1 to `patches` of least divergence in all, which sum to `total` exactly."""
    widths = np.arange(1, patches + 1)
    best, picks = np.where(np.arange(total + 1) == 0, 0.0, np.inf), []
    for curve in curves:
        prices = interpolate(curve, widths)
        new, pick = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=int)
        for width, price in zip(widths[:total], prices, strict=False):
            reached = best[: total + 1 - width] + price
            better = reached < new[width:]
            new[width:][better], pick[width:][better] = reached[better], width
        best = new
        picks.append(pick)
    counts, left = [], total
    for pick in reversed(picks):
        counts.append(int(pick[left]))
        left -= counts[-1]
    return counts[::-1]


@torch.no_grad()
def choose_counts(
    model: VisionTransformer, layers: Sequence[int], images: Tensor, total: int, batch: int, content: bool = False
) -> Structure:
    """The structure of `layers` with `total` centres in all; nothing is skipped, all patches weigh the same.

    model: in eval mode, left as it is; images: this process's calibration images (n, 3, H, W), read `batch` at a time;
    with several processes, each gives as many; content: patches merge by content.
    """
    blocks, device = _Blocks(model, layers, content), next(model.parameters()).device
    parts = [part.to(device) for part in images.split(batch)]
    logits = [model(part) for part in parts]
    counts = [total // len(layers) + (k < total % len(layers)) for k in range(len(layers))]
    tried: dict[tuple[int, ...], float] = {}
    for _ in range(ROUNDS):
        with blocks.install(counts):
            curves = _curves(blocks, counts, parts, logits)
        counts = share_out(curves, blocks.patches, total)
        with blocks.install(counts):
            tried[tuple(counts)] = mean_divergence(zip(map(model, parts), logits, strict=True))
    best = min(tried, key=tried.get)
    centres = torch.stack([spread_evenly(blocks.grid, i, n) for i, n in zip(layers, best, strict=True)])
    return Structure(tuple(layers), centres, torch.zeros_like(centres), torch.ones(centres.shape, dtype=torch.float64))
