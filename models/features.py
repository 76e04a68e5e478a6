"""A compact model as the backbone of a dense prediction: feature maps of some of its blocks."""
from __future__ import annotations

import copy
from collections.abc import Sequence

from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer

from models.dims import ViTDims


def backbone(model: VisionTransformer, blocks: Sequence[int] | int = 4, norm: bool = False) -> FeatureGetterNet:
    """What timm's `features_only=True` gives of a full-width model: images (B, 3, H, W) -> a list of maps (B, E, h, w).

    blocks: indices of the blocks whose output is wanted, or how many of the last; norm: with the final LayerNorm.
    `feature_info` says channels and reduction of every map. The given model is left as it is; the result's has neither
    the blocks after the last that is wanted nor a classifier. Raises AssertionError for a block that there is none of.
    """
    features = FeatureGetterNet(copy.deepcopy(model), out_indices=blocks, norm=norm)
    inner = features.model
    inner.dims = ViTDims(inner.dims.embed, inner.dims.blocks[: len(inner.blocks)])
    return features
