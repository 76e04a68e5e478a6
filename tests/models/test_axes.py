"""The table of axes against the parameters that models really have."""

from math import prod

import pytest
import torch

from models import BlockDims, SwinDims, ViTDims, build_vit, skeleton
from models.axes import Axis, axes_of, branch_of

TOKENS = 16


def lengths(name: str, dims: ViTDims) -> list[int | None]:
    """What the axes of a parameter multiply out to, per dimension; None for one that is never cut."""
    sizes = dims.sizes()
    return [sum(prod(sizes[axis] for axis in segment) for segment in dim) if dim else None for dim in axes_of(name)]


@pytest.mark.parametrize("free", [False, True], ids=["timm_widths", "free_widths"])
def test_axes_multiply_out_to_every_shape(family, free):
    dims = ViTDims(29, (BlockDims(3, 5, 7, 11, TOKENS), BlockDims(2, 13, 3, 17, TOKENS))) if free else None
    model = build_vit(**family, dims=dims)
    for name, parameter in model.named_parameters():
        found = lengths(name, model.dims)
        assert len(found) == parameter.dim(), name
        assert [n or actual for n, actual in zip(found, parameter.shape, strict=True)] == list(parameter.shape), name
        cut = {axis for dim in axes_of(name) for segment in dim for axis in segment}
        assert cut or ".tokens." in name or name in ("head.bias", "head_dist.bias"), name


def test_every_dimension_of_a_free_width_is_named():
    """No dimension changes with a width unless its axes say so."""
    kwargs = dict(img_size=16, patch_size=4, num_classes=10, depth=2)
    narrow = ViTDims(29, (BlockDims(3, 5, 7, 11, TOKENS),) * 2)
    wide = ViTDims(31, (BlockDims(4, 6, 8, 12, TOKENS),) * 2)
    models = [build_vit("deit_tiny_distilled_patch16_224", dims, **kwargs) for dims in (narrow, wide)]
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert [bool(dim) for dim in axes_of(name)] == [m != n for m, n in zip(a.shape, b.shape, strict=True)], name


def test_qkv_rows_are_timms_order(tiny):
    """Rows h * d .. (h + 1) * d of the first third are head h's queries, as timm reshapes them."""
    model = build_vit(**tiny)
    attention = model.blocks[0].attn
    x = torch.randn(1, 5, 32)
    q, k, v = attention.qkv(x).reshape(1, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)  # 1 H N d, timm's own reshape
    weights = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(1, 5, 32))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-6)


def test_branches():
    assert branch_of("blocks.3.attn.proj.bias") == branch_of("blocks.3.norm1.weight") == "blocks.3.heads"
    assert branch_of("blocks.12.ls2.gamma") == branch_of("blocks.12.mlp.fc1.weight") == "blocks.12.mlp"
    assert branch_of("norm.weight") is None and branch_of("patch_embed.proj.weight") is None


@pytest.mark.parametrize("name", ["blocks.0.attn.gate.weight", "blocks.0.mlp.fc1", "stem.weight", "blocks.x.norm1"])
def test_unknown_parameters_are_refused(name):
    with pytest.raises(KeyError):
        axes_of(name)


def test_a_name_needs_no_weights():
    assert {p.device.type for p in skeleton("vit_tiny_patch16_224").parameters()} == {"meta"}


@pytest.mark.parametrize(
    "name, parts",
    [
        ("embed", ("embed", None, None)),
        ("blocks.3.qk", ("qk", 3, None)),
        ("blocks.0.tokens", ("tokens", 0, None)),
        ("layers.2.embed", ("embed", None, 2)),
        ("layers.0.blocks.11.heads", ("heads", 11, 0)),
    ],
)
def test_names_of_axes_are_taken_apart_and_put_together(name, parts):
    axis = Axis.parse(name)
    assert axis == Axis(*parts) == parts and str(axis) == name


@pytest.mark.parametrize(
    "name", ["", "qk", "blocks.qk", "blocks.1.embed", "blocks.-1.qk", "blocks.1.qk.weight", "layers.0", "layers.0.qk"]
)
def test_other_names_are_no_axes(name):
    with pytest.raises(ValueError, match="is not the name of an axis"):
        Axis.parse(name)


def test_every_axis_of_a_model_is_one(tiny):
    swin = SwinDims((ViTDims(8, (BlockDims(1, 8, 8, 16, 4),) * 2), ViTDims(16, (BlockDims(2, 8, 8, 32, 1),))))
    for dims in (build_vit(**tiny).dims, swin):
        assert [str(Axis.parse(name)) for name in dims.sizes()] == [*dims.sizes()]
        assert all(dims.width(name) == units for name, units in dims.sizes().items())
        for name, units in dims.sizes().items():
            assert dims.resized({name: units + 1}).sizes() == dims.sizes() | {name: units + 1}
