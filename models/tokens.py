"""Token compression of one block that keeps position: merge, block, reconstruct (Prune and Merge, arXiv 2503.23455).

    z = M x;  out = R block(z) + s x

M (K x T) merges the T tokens of an image into K, R (T x K) puts K back in T places, and s (T,) is 1 for patches that
skip the block. All three belong to the layer, not to the image, so shapes are static. Prefix tokens (class,
distillation, registers) come first and pass through M and R untouched.

Beyond the paper, s may also be 1 for patches that are merged: they keep what tells them from their group,
out = x + R (block(z) - z), where the paper rebuilds them from the group alone.
Legend: B batch, T tokens of the model, P of them prefix, N = T - P patches, K tokens of the block, E embed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.content import ContentMerge, anchors_of
from models.patch_grid import nearest_on_grid, spread_evenly

SKIPPED = -1
COMPRESSIONS = ("dense_merge", "content_merge", "lean_last")  # arguments of a model: how tokens are compressed


def evenly(patches: int, groups: int) -> Tensor:
    """Owners (N,) of `groups` runs of neighbours as equal as can be: a structure before any is chosen."""
    return torch.arange(patches) * groups // patches


class TokenMerge(nn.Module):
    """M and R whose rows have disjoint support: every patch is in one group, or skips the block.

    `owner` (N,) int64 is the token that a patch goes into, P <= owner < K, or SKIPPED; `merge` and `reconstruct` (N,)
    are its entries of M and R, `shortcut` (N,) bool its s. Entries outside that support do not exist, so finetuning
    cannot fill them.

    Without gradients M and R are gathers and one small product over the patches that are no group's first; with them,
    and where `route` says "products" (so that a counter sees them), the two matrix products that they stand for.
    """

    bias: Tensor | None = None  # of attention's scores
    route: str | None = None
    hands_on: str = "everything"  # or its own "tokens", to a block that folds (`streamline_`)

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        patches = total - prefix
        self.register_buffer("folded", None, persistent=False)
        self.merge, self.reconstruct = (nn.Parameter(torch.empty(patches)) for _ in range(2))
        self.register_buffer("owner", torch.empty(patches, dtype=torch.int64))
        self.register_buffer("shortcut", torch.empty(patches, dtype=torch.bool))
        self.register_load_state_dict_post_hook(lambda module, _: module._plan())
        self.reset()

    def reset(self) -> None:
        """Means of evenly spread groups of neighbours."""
        if self.owner.is_meta:
            return
        owner = self.prefix + evenly(self.total - self.prefix, self.tokens - self.prefix).to(self.owner.device)
        sizes = torch.bincount(owner, minlength=self.tokens)
        self.set(owner, 1 / sizes[owner], torch.ones(len(owner)), owner == SKIPPED)

    @torch.no_grad()
    def set(self, owner: Tensor, merge: Tensor, reconstruct: Tensor, shortcut: Tensor) -> None:
        """The structure, all (N,). Raises ValueError for a token without patches, and where groups are divided about
        their shortcut."""
        for own, value in zip(
            (self.owner, self.merge, self.reconstruct, self.shortcut),
            (owner, merge, reconstruct, shortcut),
            strict=True,
        ):
            own.copy_(value)
        self._plan()

    def _plan(self) -> None:
        """Indices of the gathers, from the owners."""
        owner, shortcut, P = self.owner.cpu(), self.shortcut.cpu(), self.prefix
        skipped, rows = owner == SKIPPED, torch.arange(self.tokens)
        member = owner[:, None] == rows  # N K
        sizes, shortcuts = member.sum(0), (member & shortcut[:, None]).sum(0)
        if not (member.any(1) | skipped).all() or not sizes[P:].all() or sizes[:P].any() or not shortcut[skipped].all():
            raise ValueError(f"the owners of {len(owner)} patches are no {self.tokens - P} groups after {P} tokens")
        if not ((shortcuts == 0) | (shortcuts == sizes)).all():
            raise ValueError("some patches of a group have the shortcut and some have not")
        first = member[:, P:].int().argmax(0)
        rest = (~skipped).index_fill(0, first, False).nonzero().flatten()
        passing = skipped.nonzero().flatten()
        source = owner.index_copy(0, passing, self.tokens + torch.arange(len(passing)))
        prefix = torch.arange(P)
        plan = dict(
            first=first,
            firsts=torch.cat([prefix, P + first]),
            rest=rest,
            others=P + rest,
            belongs=member[rest].T,
            passing=P + passing,
            source=torch.cat([prefix, source]),
            weightless=skipped,
            divided=(shortcuts > 0)[:, None],
            shortcuts=torch.cat([prefix > P, shortcut]),
            belated=torch.cat([prefix > P, shortcut & ~skipped])[:, None],
        )
        for name, index in plan.items():
            self.register_buffer(f"_{name}", index.to(self.owner.device), persistent=False)
        self.pulls_back = bool(shortcuts.any())

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s): (K, T), (T, K) and (T,)."""
        rows = torch.arange(self.tokens, device=self.owner.device)
        member = self.owner[:, None] == rows  # N K
        untouched = torch.eye(self.prefix, self.tokens, device=rows.device, dtype=self.merge.dtype)
        M = torch.cat([untouched, self.merge[:, None] * member]).T
        R = torch.cat([untouched, self.reconstruct[:, None] * member])
        return M, R, self._shortcuts.to(M.dtype)

    @property
    def has_shortcut(self) -> bool:
        return self.pulls_back or len(self._passing) > 0

    @property
    def gathered(self) -> int:
        """Patches that are no group's first: columns of the product in `compress`."""
        return len(self._rest)

    def groups_for(self, _: Tensor) -> TokenMerge:
        """What compresses a batch: the same for all."""
        return self

    def _products(self) -> bool:
        return self.route == "products" or torch.is_grad_enabled()

    def compress(self, x: Tensor) -> Tensor:
        """M x: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            if self.folded is not None:
                return self.folded.to(x.dtype) @ x
            if self._products():
                return self.matrices()[0].to(x.dtype) @ x
            merge = self.merge.to(x.dtype)
            weight = torch.cat([merge.new_ones(self.prefix), merge[self._first]])
            z = x.index_select(1, self._firsts) * weight[:, None]
            if not len(self._rest):
                return z
            weight = (self._belongs * merge[self._rest]).expand(x.shape[0], -1, -1)
            return torch.baddbmm(z, weight, x.index_select(1, self._others))

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """R out + s x, less R z of groups with a shortcut: out, z (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            out = out.to(x.dtype)
            if self.hands_on == "tokens":
                return out
            if self.pulls_back:
                out = out - self._divided * z
            if self._products():
                _, R, s = (t.to(x.dtype) for t in self.matrices())
                return torch.baddbmm(s[:, None] * x, R.expand(x.shape[0], -1, -1), out)
            if len(self._passing):
                out = torch.cat([out, x.index_select(1, self._passing)], 1)
            weight = torch.where(self._weightless, 1, self.reconstruct.to(x.dtype))
            weight = torch.cat([weight.new_ones(self.prefix), weight])
            out = out.index_select(1, self._source) * weight[:, None]
            return torch.addcmul(out, x, self._belated) if self.pulls_back else out


class DenseTokenMerge(nn.Module):
    """M and R as the published code trains them: full matrices without a support to keep (`--dense_merge`).

    `skip` (T,) bool marks the patches that pass by.
    """

    bias: Tensor | None = None  # of attention's scores

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        self.merge_matrix = nn.Parameter(torch.empty(tokens, total))
        self.reconstruct_matrix = nn.Parameter(torch.empty(total, tokens))
        self.register_buffer("skip", torch.empty(total, dtype=torch.bool))
        self.reset()

    def reset(self) -> None:
        """Means of evenly spread groups of neighbours."""
        if not self.skip.is_meta:
            self.set(TokenMerge(self.tokens, self.total, self.prefix).to(self.skip.device))

    @torch.no_grad()
    def set(self, sparse: TokenMerge) -> None:
        """The matrices of a structure with support, in which only skipped patches have a shortcut."""
        M, R, s = sparse.matrices()
        self.merge_matrix.copy_(M)
        self.reconstruct_matrix.copy_(R)
        self.skip.copy_(s.bool())

    def groups_for(self, _: Tensor) -> DenseTokenMerge:
        """What compresses a batch: the same for all."""
        return self

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s): (K, T), (T, K) and (T,)."""
        return self.merge_matrix, self.reconstruct_matrix, self.skip.to(self.merge_matrix.dtype)

    def compress(self, x: Tensor) -> Tensor:
        """M x: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.merge_matrix.to(x.dtype) @ x

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """R out + s x: out (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            R, s = self.reconstruct_matrix.to(x.dtype), self.skip.to(x.dtype)
            return torch.baddbmm(s[:, None] * x, R.expand(x.shape[0], -1, -1), out.to(x.dtype))


def around(centres: Tensor, grid: tuple[int, int], prefix: int) -> TokenMerge:
    """Means of the patches around every centre, which keep what tells them from it. centres: (N,) bool."""
    group = nearest_on_grid(centres, grid)
    sizes = torch.bincount(group)[group]
    tokens = TokenMerge(prefix + int(centres.sum()), prefix + len(centres), prefix)
    tokens.set(prefix + group, 1 / sizes, torch.ones(len(group)), sizes > 1)
    return tokens.requires_grad_(False)


def spread_merge(groups: int, grid: tuple[int, int], layer: int, prefix: int, content: bool = False) -> nn.Module:
    """A block's compression to `groups` groups around survivors, or by content anchors, spread evenly over the grid."""
    if not content:
        return around(spread_evenly(grid, layer, groups), grid, prefix)
    tokens = ContentMerge(prefix + groups, prefix + grid[0] * grid[1], prefix)
    tokens.set(spread_evenly(grid, layer, anchors_of(groups)))
    return tokens


def merging(tokens: int, total: int, prefix: int, kwargs: dict[str, Any]) -> nn.Module | None:
    """The compression of a block that computes on `tokens` of `total`, or None for all of them.

    kwargs: of the model; those of COMPRESSIONS say of which kind it is.
    """
    if tokens == total:
        return None
    if kwargs.get("content_merge"):
        return ContentMerge(tokens, total, prefix)
    return (DenseTokenMerge if kwargs.get("dense_merge") else TokenMerge)(tokens, total, prefix)


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments without those of COMPRESSIONS: timm's own."""
    return {k: v for k, v in kwargs.items() if k not in COMPRESSIONS}


def can_be_lean(model: Any) -> bool:
    """Whether the head reads prefix tokens alone, so that the last block need not compute any other."""
    return model.global_pool == "token"


def by_content(model: Any) -> bool:
    """Whether the blocks of a model merge by content."""
    return bool(model.arch_kwargs.get("content_merge"))


def layers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """(index, compression) of every block that has one."""
    return ((i, block.tokens) for i, block in enumerate(getattr(model, "blocks", ())) if block.tokens is not None)


def train_matrices_(model: Any, on: bool = True) -> None:
    """Let M and R of every block train, or freeze them.

    R of a block whose patches do not ask (`lean_last` of `models.build_vit`) reaches no loss and is always frozen:
    processes that train together wait for the gradient of everything else.
    """
    for i, tokens in layers(model):
        tokens.requires_grad_(on)
        if model.blocks[i].num_queries is not None and isinstance(tokens, TokenMerge):
            tokens.reconstruct.requires_grad_(False)


@torch.no_grad()
def streamline_(model: Any) -> Any:
    """Spare a model that only classifies what its logits do not need; they stay the same to rounding. Returns it.

    Of the last block only the tokens that the head reads ask, pass the MLP and are put back. Where neither of two
    consecutive blocks has a shortcut and it takes fewer operations, M of the one is multiplied into R of the other, and
    no full sequence lies between them. `forward_features` no longer returns every token, and weights no longer train.
    Matrices stored in full stay.
    """
    merges = {i: tokens for i, tokens in layers(model) if isinstance(tokens, TokenMerge)}
    for i, tokens in merges.items():
        follower = merges.get(i + 1)
        if follower and not (tokens.has_shortcut or follower.has_shortcut) and tokens.tokens <= follower.gathered:
            follower.folded = follower.matrices()[0] @ tokens.matrices()[1]
            tokens.hands_on = "tokens"
    if can_be_lean(model) and not isinstance((last := model.blocks[-1]).tokens, DenseTokenMerge):
        last.num_queries, last.drop_rest = model.num_prefix_tokens, True
    return model
