"""Masked equals compact: the same function and the same gradients, for each axis alone and for all together."""

import pytest
import torch

from models import Masks, build_vit, compact, macs, params
from models.compact import difference


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_compact_computes_what_masked_does(family, case, images, randomise, prune, dtype, limit):
    model = randomise(build_vit(**family)).to(dtype).eval()
    images = images.to(dtype)
    dense = model(images)
    masks = prune(Masks(model.dims), case)
    masks.install_(model)
    masked = model(images)
    small = compact(model, masks)
    assert relative_error(small(images), masked) <= limit
    assert relative_error(masked, dense) > 1e-3  # something was removed that mattered
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert small.dims == masks.dims


def test_gradients_agree(family, case, images, randomise, prune):
    """What training does to the masked model's survivors is what it would do to the compact model."""
    model = randomise(build_vit(**family)).double()
    masks = prune(Masks(model.dims), case)
    masks.install_(model)
    small = compact(model, masks)
    for each in (model, small):
        each(images.double()).square().sum().backward()
    full = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        assert relative_error(parameter.grad, masks.cut(name, full[name].grad)) <= 1e-11, name


def test_order_of_removal_does_not_matter(tiny, images, randomise, prune):
    """Removing in two events gives the model that removing at once gives."""
    model = randomise(build_vit(**tiny)).eval()
    both = prune(Masks(model.dims), ("embed", "qk", "mlp"))
    stepwise = Masks(model.dims)
    for axes in (("mlp",), ("embed", "qk")):
        for axis, keep in both.keep.items():
            if axis.split(".")[-1] in axes:
                stepwise.remove(axis, (~keep).nonzero().flatten())
        stepwise.install_(model)
    assert torch.equal(compact(model, stepwise)(images), compact(model, both)(images))


def test_compact_of_compact(tiny, images, randomise, prune):
    """A compact model is pruned like any other."""
    model = randomise(build_vit(**tiny)).eval()
    for axes in (("embed", "heads"), ("embed", "qk", "v"), ("mlp", "blocks.0.heads=0")):
        masks = prune(Masks(model.dims), axes)
        masks.install_(model)
        expected = model(images)
        model = compact(model, masks)
        assert relative_error(model(images), expected) <= 1e-5
    assert model.dims.blocks[0].heads == 0 and model.dims.embed < 20


def test_compact_keeps_mode_dtype_frozen_parameters_and_the_parents_scale(tiny, prune):
    model = build_vit(**tiny).to(torch.bfloat16).train()
    model.pos_embed.requires_grad_(False)
    small = compact(model, prune(Masks(model.dims), ("qk", "embed")))
    assert small.training and not compact(model.eval(), Masks(model.dims)).training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert small.blocks[0].attn.qk < 8 and small.blocks[0].attn.scale == 8**-0.5


def test_compact_does_not_touch_the_masked_model(tiny, images, randomise, prune):
    model = randomise(build_vit(**tiny)).eval()
    masks = prune(Masks(model.dims), ("embed", "mlp"))
    masks.install_(model)
    before = model(images)
    small = compact(model, masks)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(model(images), before)


def test_a_block_without_both_branches_is_gone(family, images, randomise):
    """Nothing of it runs or is stored: the model is the one that never had the block."""
    model = randomise(build_vit(**family)).eval()
    masks = Masks(model.dims)
    for axis in ("blocks.0.heads", "blocks.0.mlp"):
        masks.remove(axis, torch.arange(len(masks.keep[axis])))
    masks.install_(model)
    small = compact(model, masks)
    assert not list(small.blocks[0].parameters()) and not list(small.blocks[0].children())
    without = build_vit(**family | dict(depth=1)).eval()
    state = {name.replace("blocks.1.", "blocks.0."): p for name, p in small.state_dict().items()}
    without.load_state_dict(state)
    torch.testing.assert_close(without(images), small(images), rtol=0, atol=0)
    torch.testing.assert_close(model(images), small(images), rtol=1e-4, atol=1e-5)
    kwargs = {name: value for name, value in family.items() if name not in ("arch", "depth")}
    assert macs(family["arch"], small.dims, depth=2, **kwargs) == macs(family["arch"], depth=1, **kwargs)
    assert sum(p.numel() for p in small.parameters()) == params(family["arch"], depth=1, **kwargs)


def test_models_are_compared_without_tf32():
    """Whichever switches a program has set; they are as they were afterwards, also when something fails."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(products, "allow_tf32", True, False), (convolutions, "allow_tf32", True, False)]
    if hasattr(products, "fp32_precision"):
        switches = [(where, "fp32_precision", "tf32", "ieee") for where in (products, convolutions.conv)]
    seen = []

    def look(*_):
        seen.append([getattr(where, name) for where, name, *_ in switches])

    class Fails(torch.nn.Module):
        def forward(self, images):
            look()
            raise ArithmeticError

    model = build_vit("deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    before = [getattr(where, name) for where, name, *_ in switches]
    try:
        for where, name, allowed, _ in switches:
            setattr(where, name, allowed)
        with pytest.raises(ArithmeticError):
            difference(model, Fails())
        look()
    finally:
        for (where, name, *_), value in zip(switches, before, strict=True):
            setattr(where, name, value)
    assert seen == [[exact for *_, exact in switches], [allowed for _, _, allowed, _ in switches]]
