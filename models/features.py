"""A compact model as the backbone of a dense prediction: feature maps of some of its blocks, or a pyramid of scales."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.arch import Model
from models.swin_dims import SwinDims
from models.tokens import TokenMerge


def backbone(model: Model, blocks: Sequence[int] | int = 4, norm: bool = False) -> FeatureGetterNet:
    """What timm's `features_only=True` gives of a full-width model: images (B, 3, H, W) -> a list of maps (B, E, h, w).

    blocks: indices of the blocks whose output is wanted, of a Swin Transformer the stages, or how many of the last;
    norm: with the final LayerNorm.
    `feature_info` says channels and reduction of every map. The given model is left as it is; the result's has neither
    the blocks after the last that is wanted nor a classifier, and its last is not lean: every map is whole. Raises
    AssertionError for a block that does not exist.
    """
    features = FeatureGetterNet(copy.deepcopy(model), out_indices=blocks, norm=norm)
    inner = features.model
    if isinstance(inner.dims, SwinDims):
        inner.dims = SwinDims(inner.dims.stages[: len(inner.layers)])
    else:
        inner.dims = replace(inner.dims, blocks=inner.dims.blocks[: len(inner.blocks)]).with_queries(None)
        inner.arch_kwargs = {k: v for k, v in inner.arch_kwargs.items() if k != "lean_last"}
        for block in inner.blocks:
            if block.num_queries is not None:
                block.num_queries, block.drop_rest = None, False
                if isinstance(block.tokens, TokenMerge):
                    block.tokens.reconstruct.requires_grad_(block.tokens.merge.requires_grad)
    return features


class FeaturePyramid(nn.Module):
    """Maps of several scales from a plain ViT's last: images (B, 3, H, W) -> a list of maps (B, channels, h, w).

    The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527, section 3): the last block's map is brought
    to each scale by itself, by deconvolution or pooling, and projected. scales: of the patches' grid, powers of two,
    finest first; with patches of 16 pixels the default is of strides 4, 8, 16 and 32. A halved odd grid rounds up, as a
    CNN's does. `feature_info` says channels and reduction of every map. The given model is left as it is; what follows
    its blocks here is new and has to be trained. Raises ValueError for other scales, and for a Swin Transformer, whose
    stages are a pyramid already: `backbone`.
    """

    def __init__(self, model: VisionTransformer, channels: int = 256, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        if isinstance(model.dims, SwinDims):
            raise ValueError("a Swin Transformer's stages are a pyramid already: models.backbone gives its maps")
        falling = sorted(set(scales), reverse=True) == [*scales]
        if not scales or not falling or any(math.frexp(scale)[0] != 0.5 for scale in scales):
            raise ValueError(f"scales must be powers of two, the largest first, not {scales}")
        self.body = backbone(model, 1)
        (embed,), (stride,) = self.body.feature_info.channels(), self.body.feature_info.reduction()
        self.levels = nn.ModuleList(_level(embed, scale, channels) for scale in scales)
        strides = [stride / scale for scale in scales]
        info = [
            dict(num_chs=channels, reduction=int(s) if s == int(s) else s, module=f"levels.{i}")
            for i, s in enumerate(strides)
        ]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps, finest first: (B, 3, H, W) -> [(B, channels, H / stride, W / stride), …]."""
        (last,) = self.body(images)  # B E h w
        return [level(last) for level in self.levels]


def _level(embed: int, scale: float, channels: int) -> nn.Sequential:
    """(B, embed, h, w) -> (B, channels, scale h, scale w); every doubling halves the channels in between."""
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(scale))):
        narrower = max(1, embed // 2)
        layers += [LayerNorm2d(embed), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(embed, narrower, kernel_size=2, stride=2))
        embed = narrower
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(int(-math.log2(scale)))]
    project = [
        nn.Conv2d(embed, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    ]
    return nn.Sequential(*layers, *project)
