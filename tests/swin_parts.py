"""Latencies of the parts of a small Swin Transformer that follow a formula."""

from __future__ import annotations

from itertools import product

from models import SwinDims, skeleton

ARCH = "swin_tiny_patch4_window7_224"
SMALL = dict(img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10)
DENSE = SwinDims.of(skeleton(ARCH, **SMALL))
SLOW = (3e-6, 1e-6)  # seconds per product of widths, by stage


def attention(stage, e, h, q, v):
    return SLOW[stage] * e * (h * 2 * (q + v) + 5)


def mlp(stage, e, m):
    return SLOW[stage] * e * (2 * m + 5)


def merging(before, own):
    return 2e-6 * before * own


def outside(stage, e):
    return (7e-6, 4e-6)[stage] * e


def parts():
    """Seconds by key of a table whose every part is linear in each width, so that it is exact between its points."""
    found = {}
    for i, stage in enumerate(DENSE.stages):
        full = stage.blocks[0]
        for e in (1, stage.embed):
            found[f"STAGE_{i}/overhead/EMB_{e}"] = outside(i, e)
            found |= {f"STAGE_{i}/mlp/EMB_{e}/MLP_{m}": mlp(i, e, m) for m in (1, full.mlp)}
            for h, q, v in product((1, full.heads), (1, full.qk), (1, full.v)):
                found[f"STAGE_{i}/attention/EMB_{e}/QK_{h}_{q}/V_{v}"] = attention(i, e, h, q, v)
    return found | {f"STAGE_1/merging/EMB_{a}/OUT_{b}": merging(a, b) for a in (1, 16) for b in (1, 32)}
