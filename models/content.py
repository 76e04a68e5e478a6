"""Token compression by content: which patches share a token differs from image to image, the shapes do not.

Half of a block's patch tokens belong to *anchors*, patches spread evenly over the grid. Of the other patches, those
that are least like any anchor have a token of their own, and each of the rest joins the anchor that it is most like, by
the cosine of the residual stream. The block computes on the means of these groups, and every patch takes over what its
group's token gained: out = x + R (block(z) - z). In attention a token counts as often as it has patches.

That is the block of Prune and Merge (arXiv 2503.23455), which keeps every patch in its place, with groups found as in
ToMe (Bolya et al., arXiv 2210.09461): bipartite soft matching and proportional attention. Unlike ToMe, which drops the
merged patches for the rest of the network, every block groups all of them anew, at any count of its own, and before
attention, so that attention computes on fewer tokens too.
Legend: B batch, T tokens of the model, P of them prefix, N = T - P patches, K tokens of the block, A anchors, E embed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def anchors_of(groups: int) -> int:
    """How many of a block's groups have an anchor."""
    return max(1, groups // 2)


class Groups(NamedTuple):
    """The groups of one batch.

    owner: (B, T) int64, the group of every token, prefix tokens first; member: (B, K, T), 1 where a token goes into a
    group, else 0; sizes: (B, K, 1), the tokens of each group.
    """

    owner: Tensor
    member: Tensor
    sizes: Tensor
    prefix: int

    @property
    def bias(self) -> Tensor:
        """Of attention's scores, the logarithm of the sizes: (B, 1, 1, K)."""
        return self.sizes.log().mT[:, None]

    def compress(self, x: Tensor) -> Tensor:
        """Means of the groups: (B, T, E) -> (B, K, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return (self.member.to(x.dtype) @ x) / self.sizes

    def restore(self, out: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """x + R (out - z): out, z (B, K, E), x (B, T, E) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            gained, (B, K, E) = out.to(x.dtype) - z, z.shape
            rows = (self.owner + K * torch.arange(B, device=x.device)[:, None]).flatten()
            return x + gained.flatten(0, 1).index_select(0, rows).view(B, -1, E)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M, R, s) of the first image, as `models.tokens` defines them: (K, T), (T, K) and (T,)."""
        member, sizes = self.member[0], self.sizes[0]
        return member / sizes, member.T, (member.T @ sizes)[:, 0].gt(1).to(member)


class ContentMerge(nn.Module):
    """Finds the groups of a batch. `anchors` (N,) bool is all that a layer stores; nothing trains."""

    def __init__(self, tokens: int, total: int, prefix: int) -> None:
        super().__init__()
        self.tokens, self.total, self.prefix = tokens, total, prefix
        self.register_buffer("anchors", torch.zeros(total - prefix, dtype=torch.bool))
        self.register_load_state_dict_post_hook(lambda module, _: module._plan())
        self.reset()

    def reset(self) -> None:
        """Anchors at equal distances in the raster: a structure before any is chosen."""
        if not self.anchors.is_meta:
            count = anchors_of(self.tokens - self.prefix)
            places = torch.arange(count) * len(self.anchors) // count
            self.set(torch.zeros(len(self.anchors), dtype=torch.bool).index_fill(0, places, True))

    @torch.no_grad()
    def set(self, anchors: Tensor) -> None:
        """The anchors, (N,) bool. Raises ValueError for another number than `anchors_of` wants."""
        self.anchors.copy_(anchors)
        self._plan()

    def _plan(self) -> None:
        """Which tokens have a group of their own from the start, prefix tokens and anchors, and which group."""
        P, wanted, count = self.prefix, anchors_of(self.tokens - self.prefix), int(self.anchors.sum())
        if count != wanted:
            raise ValueError(f"{count} anchors, but {self.tokens - P} groups have {wanted}")
        fixed = torch.cat([self.anchors.new_ones(P), self.anchors])
        plan = dict(inside=P + self.anchors.nonzero().flatten(), fixed=fixed, own=fixed.cumsum(0) - 1)
        for name, value in plan.items():
            self.register_buffer(f"_{name}", value, persistent=False)

    @torch.no_grad()
    def groups_for(self, x: Tensor) -> Groups:
        """The groups of a batch of residual streams (B, T, E)."""
        P, A, groups = self.prefix, len(self._inside), self.tokens - self.prefix
        with torch.autocast(x.device.type, enabled=False):
            tiny = torch.finfo(x.dtype).tiny  # a token of zeros is like none, and no number divides by 0
            anchors = F.normalize(x.index_select(1, self._inside), dim=-1, eps=tiny)
            likeness, nearest = (x @ anchors.mT).max(-1)  # B T
            likeness = (likeness / x.norm(dim=-1).clamp_min(tiny)).masked_fill(self._fixed, torch.inf)
        alone = likeness.topk(groups - A, largest=False).indices
        owner = torch.where(self._fixed, self._own, P + nearest)
        owner = owner.scatter(1, alone, torch.arange(P + A, P + groups, device=x.device).expand(x.shape[0], -1))
        member = (owner[:, None] == torch.arange(P + groups, device=x.device)[:, None]).to(x.dtype)
        return Groups(owner, member, member.sum(-1, keepdim=True), P)


class OnGroups(nn.Module):
    """A block's branches on tokens that stand for groups already, (B, K, E) -> (B, K, E): what is timed apart from
    the grouping. Attention has the bias of the groups' sizes, which some kernels cannot take.
    """

    def __init__(self, block: nn.Module, batch: int, tokens: int, total: int) -> None:
        super().__init__()
        self.block = block
        sizes = torch.full((batch, tokens, 1), total / tokens)
        self.register_buffer("bias", Groups(sizes, sizes, sizes, 0).bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.block.branches(z, self.bias)
