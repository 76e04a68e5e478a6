"""Vision Transformers with free widths: architecture as a value, masks, compaction, counts."""
from models.compact import compact
from models.count import macs, params
from models.dims import BlockDims, DimsError, ViTDims
from models.features import FeaturePyramid, backbone
from models.masks import Masks
from models.pretrained import load_dense
from models.vit import ModelError, TokenLogits, build_vit, left_alone, skeleton

__all__ = [
    "BlockDims", "DimsError", "FeaturePyramid", "Masks", "ModelError", "TokenLogits", "ViTDims", "backbone",
    "build_vit", "compact", "left_alone", "load_dense", "macs", "params", "skeleton",
]  # fmt: skip
