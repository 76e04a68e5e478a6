"""Prune and Merge (IEEE TMM 2025, arXiv 2503.23455): which patches a block skips, merges and keeps.

One pass over training images scores every patch of every layer; two global thresholds make each a *centre* (a token of
its own), *merged* into a centre near it, or *skipped* by the block. Weights do not move while scoring.
Legend: L layers, N patches, B batch, H heads, T tokens, P of them prefix, K tokens of a compressed block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.patch_grid import spread_order
from models.vit import Attention, Block

MODES = ("attn", "head", "head_entropy", "random", "seq", "clus", "probe")
DEPTH_FACTOR = 0.025  # late layers lose more tokens


class CompressionError(ValueError):
    """Rates or layers that leave no structure; the message says what would do."""


@dataclass(frozen=True)
class Structure:
    """What becomes of the patches of the compressed layers: layers[i] is a block index, and row i is its patches.

    centres, skipped: (L, N) bool; weights: (L, N), scores in units that are comparable between layers.
    """

    layers: tuple[int, ...]
    centres: Tensor
    skipped: Tensor
    weights: Tensor


# -------------------------------------------------------------------------------------------------------------- scores
def key_importance(attention: Attention, qkv: Tensor, prefix: int, mode: str) -> Tensor:
    """What one attention layer says of each key: (B, T') per image, before absolute values; T' patches or groups.

    qkv: the layer's fused rows with their gradient, (B, T, H(2 qk + v)). `attn` is the published sum over heads and
    queries of A x dLoss/dA. With g_i the gradient of a query's output, dLoss/dA_ij = g_i . v_j and dLoss/dv_j is the
    sum over i of A_ij g_i, so that sum is v_j . dLoss/dv_j: no attention map is needed, and any kernel may compute it.
    `head` takes absolute values per head, so that heads do not cancel; `head_entropy` is the attention that a key
    receives, heads weighted by 1 / entropy: no labels.
    """
    B, T, _ = qkv.shape
    H, qk, width = attention.num_heads, attention.qk, attention.v
    if mode == "head_entropy":
        q, k, _ = qkv.detach().float().split([H * qk, H * qk, H * width], -1)
        q, k = attention.q_norm(q.view(B, T, H, qk)), attention.k_norm(k.view(B, T, H, qk))
        maps = torch.einsum("bihd,bjhd->bhij", attention.scale * q, k).softmax(-1)
        entropy = torch.special.entr(maps).sum(-1).mean(-1)  # B H
        return torch.einsum("bhij,bh->bj", maps, 1 / entropy.clamp_min(1e-6))[:, prefix:] / (H * T)
    v, gradient = (t[..., -H * width :].float().view(B, T, H, width) for t in (qkv.detach(), qkv.grad))
    heads = (v * gradient).sum(-1)[:, prefix:]  # B T' H
    return (heads.abs() if mode == "head" else heads).sum(-1) / (H * T)


@contextmanager
def record_qkv(model: VisionTransformer, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list of the fused qkv rows of `layers`, with their gradients after a backward pass. Weights get none."""
    rows: list[Tensor] = []
    frozen = [p for p in model.parameters() if p.requires_grad]

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
        rows.append(out)

    with ExitStack() as stack:
        for p in frozen:
            p.requires_grad_(False)
            stack.callback(p.requires_grad_, True)
        for i in layers:
            stack.callback(model.blocks[i].attn.qkv.register_forward_hook(note).remove)
        yield rows


def on_patches(block: Block, scores: Tensor) -> Tensor:
    """Scores of a block's tokens, (…, K - P), on the patches they stand for: R s, (…, N). Skipped patches have none."""
    if block.tokens is None:
        return scores
    _, R, _ = block.tokens.matrices()
    prefix = block.tokens.prefix
    return scores @ R[prefix:, prefix:].T.to(scores)


def measure_importance(
    model: VisionTransformer,
    layers: Sequence[int],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    mode: str = "attn",
    per_image: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Scores of every patch of `layers`, (L, N) float64, summed over batches and processes: S_l[j] of the paper.

    loss(images, targets) runs the model, which must be in eval mode. As published the absolute value is taken of each
    global batch's mean, in which images cancel; per_image takes it of every image. scaler: scales the loss, so that
    float16 holds its small derivatives; a batch that overflows is repeated at half the scale. Raises FloatingPointError
    for scores that are not finite at any scale.
    """
    device = next(model.parameters()).device
    if scaler is None or mode == "head_entropy":  # which differentiates nothing
        scaler = torch.amp.GradScaler(enabled=False)

    def score(images: Tensor, targets: Tensor) -> Tensor:
        """(L, B, N) of one batch, unscaled: scores are linear in the derivatives."""
        rows.clear()
        if mode == "head_entropy":
            with torch.no_grad():
                loss(images, targets)
        else:
            scaler.scale(loss(images.requires_grad_(), targets)).backward()
        found = [
            on_patches(model.blocks[i], key_importance(model.blocks[i].attn, qkv, model.num_prefix_tokens, mode))
            for i, qkv in zip(layers, rows, strict=True)
        ]
        return torch.stack(found).double() / scaler.get_scale()

    total = torch.zeros(len(layers), model.patch_embed.num_patches, dtype=torch.float64, device=device)
    with record_qkv(model, layers) as rows:
        for images, targets in batches:
            images, targets = images.to(device), targets.to(device)
            while not (importance := score(images, targets)).isfinite().all():
                if scaler.get_scale() <= 1:
                    raise FloatingPointError("the scores of a batch are not finite")
                scaler.update(scaler.get_scale() / 2)
            batch = (importance.abs() if per_image else importance).mean(1)
            if dist.is_initialized():
                dist.all_reduce(batch)
                batch /= dist.get_world_size()
            total += batch.abs()
    return total


def even_ranks(layers: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Ranks (L, N), without data, of which the highest n of a layer are spread evenly over the grid, for every n."""
    orders = torch.stack([spread_order(grid, layer) for layer in layers])
    falling = torch.linspace(1, 0.5, orders.shape[1], dtype=torch.float64).expand(orders.shape)
    return torch.zeros_like(falling).scatter(1, orders, falling)


# ----------------------------------------------------------------------------------------------------------- structure
def comparable(scores: Tensor, layers: Sequence[int], depth_factor: float = DEPTH_FACTOR) -> Tensor:
    """Scores in units that layers share: each row over its norm, times 1 - factor x block index. (L, N) -> (L, N)."""
    norms = scores.norm(dim=1, keepdim=True) + 1e-8
    depth = torch.tensor(layers, dtype=scores.dtype, device=scores.device)[:, None]
    return scores.abs() / norms * (1 - depth_factor * depth)


def budget(layers: int, patches: int, prune_rate: float, keep_rate: float) -> tuple[int, int]:
    """(centres, skipped patches) of all layers together. Raises CompressionError for rates that leave no structure."""
    if prune_rate + keep_rate > 1 + 1e-9:
        raise CompressionError(f"prune rate {prune_rate:g} and keep rate {keep_rate:g} sum to more than 1")
    keep, prune = (int(patches * rate + 1e-9) for rate in (keep_rate, prune_rate))
    if not keep:
        raise CompressionError(
            f"keep rate {keep_rate:g} of {patches} patches leaves a layer no centre: {1 / patches:.3g} is the least"
        )
    return layers * keep, layers * prune


def choose_centres(
    ranks: Tensor, layers: Sequence[int], prune_rate: float, keep_rate: float, passing: Tensor | None = None
) -> Structure:
    """Centres are the L floor(N keep_rate) highest ranks of all layers, skipped the L floor(N prune_rate) lowest.

    ranks: (L, N); equal ranks go by layer and place. passing: (L, N) bool, patches that are skipped already and stay
    so, instead of prune_rate. A layer without a centre gets its best patch, from the layer with most, whose lowest
    centre takes that patch's place: the totals are exact. Raises CompressionError.
    """
    L, N = ranks.shape
    keep, prune = budget(L, N, prune_rate, keep_rate)
    skipped = torch.zeros(L * N, dtype=torch.bool) if passing is None else passing.flatten().cpu().clone()
    if passing is None:
        skipped[ranks.flatten().cpu().argsort(stable=True)[:prune]] = True
    elif (~skipped).sum() < keep:
        left = (~skipped).float().mean()
        raise CompressionError(f"keep rate {keep_rate:g} is above the {left:.3f} of all patches that are not skipped")
    order = ranks.flatten().cpu().masked_fill(skipped, -1).argsort(descending=True, stable=True)
    centres = torch.zeros(L * N, dtype=torch.bool)
    centres[order[:keep]] = True
    centres, skipped = centres.view(L, N), skipped.view(L, N)
    scores = ranks.cpu()
    while not (counts := centres.sum(1)).all():
        empty, richest = int(counts.argmin()), int(counts.argmax())
        best = int(scores[empty].argmax())
        worst = int(scores[richest].masked_fill(~centres[richest], torch.inf).argmin())
        centres[empty, best], centres[richest, worst] = True, False
        skipped[richest, worst], skipped[empty, best] = skipped[empty, best].item(), False
    return Structure(tuple(layers), centres, skipped, scores)


def skipped_patches(model: VisionTransformer, layers: Sequence[int]) -> Tensor:
    """Patches that skip a block already, (L, N) bool, False everywhere in blocks that are not compressed."""
    skipped = torch.zeros(len(layers), model.patch_embed.num_patches, dtype=torch.bool)
    for row, i in enumerate(layers):
        if (tokens := model.blocks[i].tokens) is not None:
            merge, _, shortcut = tokens.matrices()
            skipped[row] = ((merge == 0).all(0) & (shortcut > 0))[tokens.prefix :].cpu()
    return skipped
