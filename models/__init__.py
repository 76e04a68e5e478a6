"""Vision Transformers, plain and Swin, with free widths: architecture as a value, masks, compaction, counts."""

from models.arch import Arch, build_vit, dims_of, is_swin, left_alone, macs, params, skeleton
from models.compact import compact
from models.dims import BlockDims, DimsError, ViTDims
from models.features import FeaturePyramid, backbone
from models.masks import Masks
from models.parents import ModelError
from models.pretrained import load_dense
from models.swin_dims import SwinDims, dims_from_dict
from models.vit import TokenLogits

__all__ = [
    "Arch",
    "BlockDims",
    "DimsError",
    "FeaturePyramid",
    "Masks",
    "ModelError",
    "SwinDims",
    "TokenLogits",
    "ViTDims",
    "backbone",
    "build_vit",
    "compact",
    "dims_from_dict",
    "dims_of",
    "is_swin",
    "left_alone",
    "load_dense",
    "macs",
    "params",
    "skeleton",
]
