"""timm's function at full width, the right function at every other width, and refusals that help."""

from argparse import Namespace

import pytest
import timm
import torch
from torch import nn

from models import BlockDims, Masks, ModelError, TokenLogits, ViTDims, build_vit
from models.attention import ROUTES
from models.norms import LayerNorm
from models.vit import Attention
from training.parts import wrap_for_training

TOKENS = 18


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
def test_full_width_is_timms_function(family, images, randomise, dtype, limit):
    theirs = randomise(timm.create_model(family.pop("arch"), **family)).to(dtype).eval()
    ours = build_vit(theirs.default_cfg["architecture"], **family).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(images.to(dtype))
    assert expected.std() > 0.01
    assert relative_error(ours(images.to(dtype)), expected) <= limit


def test_state_dicts_interchange(family, randomise):
    ours = randomise(build_vit(**family))
    theirs = timm.create_model(family.pop("arch"), **family)
    theirs.load_state_dict(ours.state_dict())
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())


def test_initialisation_is_timms(tiny):
    """Statistics, not bits: norms 1, biases 0, weights of standard deviation 0.02."""
    block = build_vit(**tiny | dict(embed_dim=256)).blocks[0]
    assert torch.all(block.norm1.weight == 1) and not block.attn.qkv.bias.any()
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_carries_its_architecture(tiny):
    arch, kwargs = tiny.pop("arch"), tiny
    dims = ViTDims(20, (BlockDims(2, 5, 6, 30, TOKENS),) * 3)
    model = build_vit(arch, dims, **kwargs, drop_path_rate=0.1)
    assert (model.dims, model.arch, model.arch_kwargs) == (dims, arch, kwargs | dict(drop_path_rate=0.1))
    rebuilt = build_vit(model.arch, model.dims, **model.arch_kwargs)
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize("qk, v", [(5, 11), (11, 5), (8, 8), (1, 7)])
def test_attention_of_any_widths_keeps_the_parents_scale(monkeypatch, randomise, qk, v, route):
    monkeypatch.setattr(Attention, "route", route)
    scale = 8**-0.5
    attention = randomise(Attention(24, BlockDims(3, qk, v, 1, TOKENS), scale, True, True, 0.0, 0.0)).double()
    x = torch.randn(2, TOKENS, 24, dtype=torch.float64)
    q, k, value = attention.qkv(x).split([3 * qk, 3 * qk, 3 * v], dim=-1)
    heads = []
    for h in range(3):
        mine = (t[..., h * width : (h + 1) * width] for t, width in ((q, qk), (k, qk), (value, v)))
        q_h, k_h, v_h = mine
        heads.append((q_h @ k_h.mT * scale).softmax(-1) @ v_h)  # B N v
    expected = attention.proj(torch.cat(heads, -1))
    assert relative_error(attention(x), expected) <= 1e-12
    with torch.inference_mode():
        assert relative_error(attention(x), expected) <= 1e-12


def test_the_scale_comes_from_the_parent(tiny):
    narrow = ViTDims(20, (BlockDims(2, 3, 6, 30, TOKENS),) * 2)
    assert {b.attn.scale for b in build_vit(**tiny, dims=narrow).blocks} == {8**-0.5}


@pytest.mark.parametrize("kept", [11, 7, 1])
def test_masked_layer_norm_is_a_layer_norm_of_the_survivors(randomise, kept):
    """Forward and gradients; what removed channels hold does not matter."""
    masked = randomise(LayerNorm(12, eps=1e-6)).double()
    keep = torch.randperm(12) < kept
    with torch.no_grad():
        masked.weight *= keep
        masked.bias *= keep
    masked.set_mask(keep)
    small = nn.LayerNorm(kept, eps=1e-6).double()
    small.load_state_dict({name: value[keep] for name, value in masked.state_dict().items()})
    x = torch.randn(2, 5, 12, dtype=torch.float64).mul(3).add(1).requires_grad_()
    x_small = x.detach()[..., keep].requires_grad_()
    incoming = torch.randn(2, 5, 12, dtype=torch.float64) * keep

    y, y_small = masked(x), small(x_small)
    y.backward(incoming)
    y_small.backward(incoming[..., keep])
    # one survivor has no variance, and 1 / sqrt(eps), 1e3, makes rounding of its mean as much larger
    limit = dict(rtol=1e-12, atol=1e-12 if kept > 1 else 1e-10)
    torch.testing.assert_close(y[..., keep], y_small, **limit)
    torch.testing.assert_close(x.grad[..., keep], x_small.grad, **limit)
    torch.testing.assert_close(masked.weight.grad[keep], small.weight.grad, **limit)
    torch.testing.assert_close(masked.bias.grad[keep], small.bias.grad, **limit)
    for removed in (y, x.grad, masked.weight.grad, masked.bias.grad):
        assert not removed[..., ~keep].any()


def test_an_unmasked_layer_norm_is_torchs_bit_for_bit():
    norm, x = LayerNorm(12), torch.randn(4, 12)
    expected = nn.functional.layer_norm(x, (12,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), expected)
    norm.set_mask(torch.arange(12) < 6)
    assert not torch.allclose(norm(x), expected)
    norm.set_mask(torch.ones(12, dtype=torch.bool))
    assert torch.equal(norm(x), expected)
    assert set(norm.state_dict()) == {"weight", "bias"}


def test_token_logits_of_a_distilled_model(tiny, images, randomise):
    model = randomise(build_vit(**tiny))
    for mode in (True, False):
        cls, dist = TokenLogits(model.train(mode))(images)
        assert cls.shape == dist.shape == (3, 10)
        assert not torch.allclose(cls, dist)
        torch.testing.assert_close((cls + dist) / 2, model.eval()(images))


def test_token_logits_of_one_head_are_the_models(tiny, images, randomise):
    model = randomise(build_vit(**tiny | dict(arch="vit_tiny_patch16_224", global_pool="avg"))).eval()
    cls, dist = TokenLogits(model)(images)
    assert cls is dist
    assert torch.equal(cls, model(images))


def test_an_empty_branch_is_not_built(tiny, images, randomise):
    dims = ViTDims(20, (BlockDims(0, 0, 0, 30, TOKENS), BlockDims(2, 5, 6, 0, TOKENS), BlockDims(0, 4, 4, 0, TOKENS)))
    model = randomise(build_vit(**tiny, dims=dims)).eval()
    parts = [{name.split(".")[0] for name, _ in block.named_parameters()} for block in model.blocks]
    assert parts == [{"norm2", "mlp"}, {"norm1", "attn"}, set()]
    x = torch.randn(2, TOKENS, 20)
    assert torch.equal(model.blocks[2](x), x)
    assert model(images).isfinite().all()


def test_widths_larger_than_the_parent(tiny, images):
    dims = ViTDims(80, (BlockDims(9, 20, 24, 300, TOKENS),) * 4)
    model = build_vit(**tiny, dims=dims)
    assert model(images).shape == (3, 10)
    assert model.blocks[3].attn.qkv.weight.shape == (9 * (20 + 20 + 24), 80)
    assert model.blocks[0].attn.scale == 8**-0.5


def test_drop_rates_reach_the_blocks(tiny):
    blocks = build_vit(**tiny, drop_path_rate=0.2, attn_drop_rate=0.3, proj_drop_rate=0.1).blocks
    assert blocks[1].drop_path1.drop_prob == blocks[1].drop_path2.drop_prob == pytest.approx(0.2)
    assert blocks[0].attn.attn_drop == 0.3 and blocks[0].attn.proj_drop.p == 0.1


@pytest.mark.parametrize(
    "arch, closest",
    [
        ("deit_base_distiled_patch16_224", "deit_base_distilled_patch16_224"),
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
    ],
)
def test_unknown_names_come_with_the_closest(arch, closest):
    with pytest.raises(ModelError, match=f"timm knows no model '{arch}'; closest: .*{closest}"):
        build_vit(arch)


@pytest.mark.parametrize(
    "arch, kwargs, reason",
    [
        ("resnet50", {}, "timm.models.resnet"),
        ("beit_base_patch16_224", {}, "timm.models.beit"),
        ("vit_tiny_patch16_224", dict(global_pool="prr"), "pools by AttentionPoolPrr"),
        ("vit_small_patch16_18x2_224", {}, "blocks are not plain"),
        ("vit_base_patch16_xp_224", {}, "ParallelScalingBlock"),
        ("vit_tiny_patch16_224", dict(colour=3), "unexpected keyword argument 'colour'"),
        ("vit_tiny_patch16_224", dict(num_heads=5), "divisible"),
    ],
)
def test_models_that_cannot_be_built_are_refused_with_the_reason(arch, kwargs, reason):
    with pytest.raises(ModelError, match=f"{arch}.*{reason}"):
        build_vit(arch, **kwargs)


def test_gradients_are_the_same_with_checkpointed_blocks(tiny, images):
    model = build_vit(**tiny)
    grads = []
    for on in (False, True):
        model.zero_grad()
        both = wrap_for_training(Namespace(grad_checkpointing=on, compile=False), model, torch.device("cpu"))
        sum(t.square().sum() for t in both(images)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert model.grad_checkpointing
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_compiled_student_stays_compiled_while_more_is_removed(tiny, images):
    model = build_vit(**tiny).train()
    masks = Masks(model.dims)
    both = wrap_for_training(Namespace(grad_checkpointing=False, compile=True), model, torch.device("cpu"))
    for round in range(4):
        for axis in ("embed", "blocks.0.mlp", "blocks.1.heads"):
            masks.remove(axis, torch.tensor([round] if round < 3 else [], dtype=torch.long))
        masks.install_(model)
        with torch.compiler.set_stance("default" if round < 2 else "fail_on_recompile"):
            compiled = both(images)
        torch.testing.assert_close(compiled, TokenLogits(model)(images), rtol=1e-4, atol=1e-5)
