"""Prune and Merge (IEEE TMM 2025, arXiv 2503.23455): from the patches that a block keeps to a compressed model.

`pruning.pm_vit` chooses a `Structure`; here patches are assigned to its centres and the model is rebuilt around them.
Legend: N patches, K tokens of a compressed block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import ViTDims, build_vit
from models.content import anchors_of
from models.patch_grid import nearest_on_grid, spread_evenly
from models.tokens import SKIPPED, TokenMerge, by_content
from models.tokens import layers as layers_of
from pruning.pm_vit import CompressionError, Structure


def nearest_in_raster(centres: Tensor, grid: tuple[int, int]) -> Tensor:
    """The published assignment, its row ends mended: the nearest centre of the same row, else along the raster line.

    centres: (N,) bool -> index among the centres, (N,). A tie goes to the centre that follows.
    """
    places = torch.arange(len(centres))
    at = centres.nonzero().flatten()
    distance = (places[:, None] - at).abs() * 2 - (at > places[:, None]).long()
    other_row = places[:, None] // grid[1] != at // grid[1]
    return (distance + other_row * 4 * len(centres)).argmin(1)


ASSIGN = dict(raster=nearest_in_raster, grid=nearest_on_grid)
CONTENT = "content"  # patches join image by image what they are most like (`models.content`)
MERGES = (*ASSIGN, CONTENT)


@dataclass(frozen=True)
class Merging:
    """How patches are merged. where: one of MERGES; the rest is for keys of ASSIGN.

    published: M's entries as published, the centre's 1 and the others' score over the centre's, else those over their
    sum, so that a group's token is a mean and what the block adds to it reaches its patches undiminished; shortcut:
    merged patches keep what tells them from their group.
    """

    where: str = "grid"
    published: bool = False
    shortcut: bool = True


def assign_patches(
    structure: Structure, row: int, grid: tuple[int, int], prefix: int, merging: Merging
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(owner, merge, reconstruct, shortcut) of one layer, as `TokenMerge.set` takes them.

    M[k, j] is proportional to the patch's score, and R the pseudo-inverse of M, which disjoint rows give in closed
    form: R[j, k] = M[k, j] / sum_i M[k, i]^2.
    """
    centres, skipped, scores = structure.centres[row], structure.skipped[row], structure.weights[row]
    group = ASSIGN[merging.where](centres, grid)

    def total(values: Tensor) -> Tensor:
        """Sums over groups, at every patch: (N,) -> (N,)."""
        return values.new_zeros(int(centres.sum())).index_add_(0, group, values)[group]

    own = scores[centres][group]
    merge = torch.where(own > 0, scores / own.clamp_min(torch.finfo(scores.dtype).tiny), 1.0).masked_fill(skipped, 0)
    if not merging.published:
        merge = merge / total(merge)
    alone = total((~skipped).long()) == 1
    shortcut = skipped | ~alone if merging.shortcut else skipped
    return torch.where(skipped, SKIPPED, prefix + group), merge, merge / total(merge.square()), shortcut


def dims_after(dims: ViTDims, structure: Structure, prefix: int) -> ViTDims:
    """The architecture with the tokens that are left in each layer."""
    counts = dict(zip(structure.layers, structure.centres.sum(1).tolist(), strict=True))
    blocks = [replace(b, tokens=prefix + counts[i]) if i in counts else b for i, b in enumerate(dims.blocks)]
    return ViTDims(dims.embed, tuple(blocks))


def uniform(dims: ViTDims, keep_rate: float, prefix: int) -> ViTDims:
    """The same share of patches in every block."""
    blocks = [replace(b, tokens=prefix + max(1, int((b.tokens - prefix) * keep_rate))) for b in dims.blocks]
    return ViTDims(dims.embed, tuple(blocks))


@torch.no_grad()
def compress(
    model: VisionTransformer, structure: Structure, merging: Merging, dense_merge: bool = False
) -> VisionTransformer:
    """`model` with its tokens compressed as `structure` says, its weights unchanged, on its device and in its mode.

    Layers that `structure` does not name keep theirs. dense_merge: M and R as full matrices, as a model that has such
    ones keeps them. Merging by content takes only the number of centres from `structure`. Raises CompressionError where
    merged patches would have a shortcut beside full matrices, and for two ways of merging in one model.
    """
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    dims = dims_after(model.dims, structure, prefix)
    dense_merge = dense_merge or model.arch_kwargs.get("dense_merge", False)
    if dense_merge and model.arch_kwargs.get("lean_last"):
        raise CompressionError("full matrices do not go with a last block that computes what the head reads alone")
    if merging.where == CONTENT:
        return _by_content(model, structure, dims)
    if by_content(model):
        raise CompressionError("the model's tokens are merged by content: compress it further with --merge content")
    small = build_vit(model.arch, dims, **model.arch_kwargs | (dict(dense_merge=True) if dense_merge else {}))
    small.load_state_dict({k: v for k, v in model.state_dict().items() if ".tokens." not in k}, strict=False)
    for i, tokens in layers_of(small):
        merge = model.blocks[i].tokens
        if i in structure.layers:
            merge = TokenMerge(tokens.tokens, tokens.total, prefix)
            merge.set(*assign_patches(structure, structure.layers.index(i), grid, prefix, merging))
        if type(merge) is type(tokens):
            tokens.load_state_dict(merge.state_dict())
        elif merge.pulls_back:
            raise CompressionError("full matrices have no place for merged patches' shortcut (--shortcut skipped)")
        else:
            tokens.set(merge)
    return _like(model, small)


def _like(model: VisionTransformer, small: VisionTransformer) -> VisionTransformer:
    """`small` on the device, in the type and in the mode of `model`."""
    reference = next(model.parameters())
    return small.to(device=reference.device, dtype=reference.dtype).train(model.training)


def _by_content(model: VisionTransformer, structure: Structure, dims: ViTDims) -> VisionTransformer:
    """`model` at the token counts of `dims`, patches merged by content."""
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    if not by_content(model) and any(i not in structure.layers for i, _ in layers_of(model)):
        raise CompressionError("the model's tokens are merged by place already: compress the dense one by content")
    small = build_vit(model.arch, dims, **model.arch_kwargs | dict(content_merge=True))
    small.load_state_dict({k: v for k, v in model.state_dict().items() if ".tokens." not in k}, strict=False)
    for i, tokens in layers_of(small):
        if i in structure.layers:
            tokens.set(spread_evenly(grid, i, anchors_of(tokens.tokens - prefix)))
        else:
            tokens.load_state_dict(model.blocks[i].tokens.state_dict())
    return _like(model, small)
