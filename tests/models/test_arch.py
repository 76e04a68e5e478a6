"""The architecture as a value: what files hold goes in and comes out, and every count is that of the faces."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from models import Arch, ModelError, ViTDims, build_vit, dims_of, left_alone, macs, params, skeleton

SWIN = dict(img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10)
SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
CASES = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "dense matrices": ("deit_tiny_distilled_patch16_224", SMALL | dict(dense_merge=True)),
    "content": ("deit_tiny_distilled_patch16_224", SMALL | dict(content_merge=True)),
    "lean": ("deit_tiny_distilled_patch16_224", SMALL | dict(lean_last=True)),
    "content, lean": ("deit_tiny_distilled_patch16_224", SMALL | dict(content_merge=True, lean_last=True)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def listed(kwargs):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}


def test_what_files_hold_goes_in_and_comes_out(case):
    name, kwargs = case
    arch = Arch.of(name, **kwargs)
    assert arch.record == dict(name=name, kwargs=listed(kwargs)) and Arch.of_record(arch.record) == arch
    model = arch.build()
    assert Arch.of_model(model) == arch and (model.arch, listed(model.arch_kwargs)) == (name, listed(kwargs))
    assert not set(arch.timm_kwargs) & {"dense_merge", "content_merge", "lean_last"}
    assert arch.plain.kwargs == arch.timm_kwargs and arch.plain == Arch.of(name, **arch.timm_kwargs)


def test_equal_ones_are_equal_values_that_nothing_changes(case):
    name, kwargs = case
    arch, again = Arch.of(name, **kwargs), Arch.of(name, **dict(reversed(listed(kwargs).items())))
    assert arch == again and hash(arch) == hash(again) and arch != arch.with_kwargs(num_classes=3)
    arch.kwargs["num_classes"] = 99
    assert arch == again and arch.kwargs["num_classes"] == 10
    with pytest.raises(FrozenInstanceError):
        arch.lean = not arch.lean


def test_counts_and_widths_are_those_of_the_model(case):
    name, kwargs = case
    arch, model = Arch.of(name, **kwargs), build_vit(name, **kwargs)
    assert arch.params() == params(name, **kwargs) == sum(p.numel() for p in model.parameters())
    assert arch.macs() == macs(name, **kwargs) == sum(arch.macs_by_part().values())
    assert arch.dims == dims_of(skeleton(name, **arch.timm_kwargs)) == model.dims.with_queries(None)
    assert arch.prefix == getattr(model, "num_prefix_tokens", 0) and arch.left_alone == left_alone(name, **kwargs)
    small = arch.dims.resized({axis: max(1, n // 2) for axis, n in arch.dims.sizes().items()})
    assert arch.params(small) == params(name, small, **kwargs) < arch.params()
    assert arch.macs(small) == macs(name, small, **kwargs) < arch.macs()


def test_dims_of_another_depth_count_their_own_blocks(tiny):
    arch = Arch.of(tiny.pop("arch"), **tiny)
    deep = ViTDims(32, arch.dims.blocks * 2)
    assert arch.params(deep) == sum(p.numel() for p in arch.build(deep).parameters())


def test_other_arguments_make_another_value():
    arch = Arch.of("deit_tiny_distilled_patch16_224", **SMALL, drop_path_rate=0.1)
    lean = arch.with_kwargs(drop_path_rate=None, lean_last=True, content_merge=True)
    assert "drop_path_rate" not in lean.kwargs and lean.lean and lean.merge == "content"
    assert arch.kwargs["drop_path_rate"] == 0.1 and not arch.lean
    assert lean.build().blocks[-1].num_queries == 2


def test_arguments_that_no_file_can_hold_are_refused():
    with pytest.raises(ModelError, match="plain values"):
        Arch.of("vit_tiny_patch16_224", norm_layer=torch.nn.LayerNorm)
