"""timm's pool by attention, as SigLIP has it, behind a residual stream of any width.

A learnt query asks every token once; projection, norm and MLP follow. Of all that only `kv` reads the residual stream:
the rest, and the classifier behind it, works in channels of the pool's own, whose number stays the parent's.
Legend: B batch, N tokens, E embed, W width of the pool, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from models.attention import attend


class AttentionPool(AttentionPoolLatent):
    """A pool like timm's `like`, on a stream of `embed` channels: (B, N, E) -> (B, W)."""

    def __init__(self, like: AttentionPoolLatent, embed: int) -> None:
        width = like.out_features
        super().__init__(
            width,
            num_heads=like.num_heads,
            mlp_ratio=(like.mlp.fc1.out_features + 0.5) / width,  # timm multiplies and rounds down
            norm_layer=partial(type(like.norm), eps=like.norm.eps),
            act_layer=type(like.mlp.act),
        )
        self.kv = nn.Linear(embed, 2 * width)

    def mix(self, kv: Tensor) -> Tensor:
        """What the heads pass on: keys and values side by side, (B, N, 2 W) -> (B, 1, W)."""
        q = self.q(self.latent).expand(kv.shape[0], -1, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        return attend(q, k, v, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_drop(self.proj(self.mix(self.kv(x))))
        return (x + self.mlp(self.norm(x)))[:, 0]


def pool_by_attention_(model: Any, like: AttentionPoolLatent) -> None:
    """Give a model that timm has built without a pool one like timm's `like`, and its classifier behind it."""
    model.global_pool, model.attn_pool = "map", AttentionPool(like, model.embed_dim)
    model.num_features = model.head_hidden_size = like.out_features
    for module in filter(lambda m: isinstance(m, nn.Linear), model.attn_pool.modules()):
        _initialise_(module)
    del model.head  # parameters come in timm's order
    new_classifier_(model, model.num_classes)


def new_classifier_(model: Any, classes: int) -> None:
    """A fresh classifier in place of the model's, of the width of what it reads; none for 0 classes."""
    reference = next(model.parameters())
    model.reset_classifier(classes)
    if getattr(model, "attn_pool", None) is not None and classes:
        model.head = nn.Linear(model.attn_pool.out_features, classes).to(reference)
        _initialise_(model.head)


def _initialise_(linear: nn.Linear) -> None:
    """As timm initialises a ViT's linear layers."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
