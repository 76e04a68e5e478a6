"""Saliency of the patches that a block computes on, in the training step's own backward pass: NViT's sixth axis.

A patch that is removed from a block's tokens is merged into the nearest survivor on the grid. To first order the loss
then moves by the derivative to both tokens, through the block, times the way of each to their common mean:

    c = g_k . (m - z_k) + g_d . (m - z_d),    m = (n_k z_k + n_d z_d) / (n_k + n_d)

z are the block's tokens, n the patches that each stands for, d the survivor nearest to k. Its square is the criterion
of NViT (arXiv 2110.04869, Eq. 5) for what changes. Squares are taken image by image: images move tokens in different
directions, so that their sum tells little.
Legend: B batch, T tokens of the model, P of them prefix, K tokens of a block, E embed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.axes import Axis
from models.masks import Masks
from models.patch_grid import nearest_on_grid
from pruning.saliency import EventMean


def partners(keep: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of every survivor of `keep` (N,) bool: the survivor nearest to it, and the patches that it stands for, (K,)."""
    survivors = keep.nonzero().flatten()
    rows, columns = survivors // grid[1], survivors % grid[1]
    squares = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()
    squares.fill_diagonal_(grid[0] ** 2 + grid[1] ** 2)
    return squares.argmin(1), torch.bincount(nearest_on_grid(keep, grid), minlength=len(survivors))


class TokenSaliency(EventMean):
    """Scores of every patch of every block, 0 for those that are removed; `masks` must be installed in `model`.

    With several processes, scores are averaged over them at every step.
    """

    def __init__(self, model: nn.Module, masks: Masks, momentum: float, scaler: torch.amp.GradScaler) -> None:
        sizes = {axis: n for axis, n in masks.sizes().items() if Axis.parse(axis).kind == "tokens"}
        super().__init__(sizes, momentum, next(model.parameters()).device)
        self.masks, self.scaler = masks, scaler
        self._seen: list[dict[int, list[Tensor]]] = []  # per forward pass and block: its tokens and its output
        self._near: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
        model.patch_embed.register_forward_pre_hook(lambda *_: self._begin())
        for i, block in enumerate(model.blocks):
            if block.dims.heads or block.dims.mlp:
                first = block.norm1 if block.dims.heads else block.norm2
                first.register_forward_pre_hook(lambda _, args, i=i: self._note(i, args[0]))
                block.register_forward_hook(lambda _, __, out, i=i: self._note(i, out))

    def _begin(self) -> None:
        if torch.is_grad_enabled():
            self._seen.append({})

    def _note(self, block: int, tensor: Tensor) -> None:
        noted = self._seen[-1].setdefault(block, []) if torch.is_grad_enabled() else None
        if noted is not None and len(noted) < 2:  # gradient checkpointing runs a block again in the backward pass
            tensor.retain_grad()
            noted.append(tensor)

    def _places(self, block: int) -> tuple[Tensor, ...]:
        """(survivors, the nearest of them, patches each stands for) of a block, looked up when the masks change."""
        alive = self.masks.alive(str(Axis("tokens", block)))
        if block not in self._near or self._near[block][0] != alive:
            keep = self.masks.keep[str(Axis("tokens", block))].cpu()
            places = keep.nonzero().flatten(), *partners(keep, self.masks.grid)
            self._near[block] = alive, tuple(t.to(self.average.device) for t in places)
        return self._near[block][1]

    def discard(self) -> None:
        """Forget the forward passes since the last step."""
        self._seen = []

    @torch.no_grad()
    def step(self) -> None:
        """Add this step's scores: after backward, with the gradients of activations still scaled."""
        scale = self.scaler.scale(torch.ones_like(self.steps))
        total = torch.zeros_like(self.average)
        views = dict(zip(self.sizes, total.split(list(self.sizes.values())), strict=True))
        for seen in self._seen:
            for block, (tokens, out) in seen.items():
                survivors, near, stands = self._places(block)
                moved = self._loss_change(tokens, out, survivors, near, stands) / scale  # B K
                each = (moved * len(moved) * len(self._seen)).square().mean(0) / len(self._seen)
                views[str(Axis("tokens", block))][survivors] += each
        self.discard()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        self._add(total)

    def _loss_change(self, tokens: Tensor, out: Tensor, survivors: Tensor, near: Tensor, stands: Tensor) -> Tensor:
        """The change c of the loss for every token of a block, image by image: (B, K)."""
        P = self.masks.prefix
        z, g = tokens[:, P:].float(), tokens.grad[:, P:].float()
        alone = (stands == 1)[:, None]
        g = g - alone * out.grad[:, P + survivors].float()  # what passes a block by does not go through it
        n = stands[:, None].to(g.dtype)
        weighted = (n[near] * g - n * g[:, near]) / (n + n[near])
        return (weighted * (z[:, near] - z)).sum(-1)
