"""ToMe (Bolya et al., arXiv 2210.09461), written from the paper: bipartite matching of similar tokens."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToMeBlock(nn.Module):
    """A block that merges the r most similar pairs of its tokens after attention; token sizes travel along.

    r None: of the last block only the prefix tokens are wanted, as of our models (`streamline_`).
    """

    def __init__(self, block: nn.Module, r: int | None, prefix: int, sizes: list[Tensor | None]) -> None:
        super().__init__()
        self.block, self.r, self.prefix, self.sizes = block, r, prefix, sizes

    def forward(self, x: Tensor) -> Tensor:
        block, a = self.block, self.block.attn
        B, N, _ = x.shape
        size = self.sizes[0] if self.sizes[0] is not None and self.sizes[0].shape[:2] == (B, N) else x.new_ones(B, N, 1)
        q, k, v = (t.view(B, N, a.num_heads, -1).transpose(1, 2) for t in a.qkv(block.norm1(x)).chunk(3, -1))
        if self.r is None:
            q, x = q[:, :, : self.prefix], x[:, : self.prefix]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().view(B, 1, 1, N), scale=a.scale)
        x = x + block.drop_path1(block.ls1(a.proj(mixed.transpose(1, 2).flatten(2))))
        if self.r is not None:
            x, self.sizes[0] = self.merge_tokens(x, size, k.mean(1))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def merge_tokens(self, x: Tensor, size: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Bipartite soft matching: every other patch goes to its most similar among the rest, the r closest pairs."""
        head, patches = x[:, : self.prefix], x[:, self.prefix :]
        r = min(self.r, patches.shape[1] // 2)
        with torch.no_grad():
            metric = F.normalize(metric[:, self.prefix :], dim=-1)
            best, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)
            order = best.argsort(-1, descending=True)
            gone, stay = order[:, :r], order[:, r:].sort(-1).values
            to = partner.gather(1, gone)
        own = size[:, self.prefix :]
        weighted = torch.cat([patches * own, own], -1)  # B P E+1
        width = weighted.shape[-1]
        from_, into = weighted[:, ::2], weighted[:, 1::2]
        moved = from_.gather(1, gone[..., None].expand(-1, -1, width))
        into = into.scatter_add(1, to[..., None].expand(-1, -1, width), moved)
        out = torch.cat([from_.gather(1, stay[..., None].expand(-1, -1, width)), into], 1)
        x = torch.cat([head, out[..., :-1] / out[..., -1:]], 1)
        return x, torch.cat([size[:, : self.prefix], out[..., -1:]], 1)


def tome(model: nn.Module, merged: list[int | None]) -> nn.Module:
    """`model` with so many tokens merged in each block, None for a last block that only the classifier reads."""
    model, sizes = copy.deepcopy(model), [None]
    prefix = model.num_prefix_tokens
    made = (ToMeBlock(block, r, prefix, sizes) for block, r in zip(model.blocks, merged, strict=True))
    model.blocks = nn.Sequential(*made)
    model.blocks[0].register_forward_pre_hook(lambda *_: sizes.__setitem__(0, None))
    return model
