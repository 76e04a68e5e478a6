"""Alignment changes coordinates, never the function; and what comes first is what matters."""

import copy

import torch
from conftest import TINY

from models import build_vit
from pruning import streams
from pruning.align import align_, helmert, qk_bases, v_bases, why_not_rotated


def logits(model, images):
    with torch.no_grad():
        return model(images)


def test_logits_are_unchanged_to_rounding(family, randomise):
    model = randomise(build_vit(**family)).double().eval()
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    before = logits(model, images[:5])
    align_(model, images.split(8))
    torch.testing.assert_close(logits(model, images[:5]), before, rtol=1e-9, atol=1e-9)


def test_normalised_queries_and_keys_keep_their_channels(randomise):
    model = randomise(build_vit("vit_tiny_patch16_224", qk_norm=True, **TINY)).double().eval()
    images, values = torch.randn(24, 3, 16, 16, dtype=torch.float64), model.blocks[0].attn.qkv.weight[64:].clone()
    before = logits(model, images)
    align_(model, images.split(8))
    torch.testing.assert_close(logits(model, images), before, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model.blocks[0].attn.qkv.weight[64:], values)


def test_logits_are_unchanged_when_a_direction_is_dead(tiny, randomise):
    model = randomise(build_vit(**tiny)).double().eval()
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv
        qkv.weight[3], qkv.bias[3] = 0.0, 0.0  # a query channel
        qkv.weight[64:72], qkv.bias[64:72] = 0.0, 0.0  # a head's values
        model.blocks[1].attn.proj.weight[:, :8] = 0.0
        model.blocks[1].mlp.fc1.weight[5], model.blocks[1].mlp.fc1.bias[5] = 0.0, 0.0
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    before = logits(model, images)
    align_(model, images.split(8))
    torch.testing.assert_close(logits(model, images), before, rtol=1e-6, atol=1e-6)


def test_values_and_their_readers_share_the_weight(tiny, randomise):
    """Dead directions apart, so that training finds both sides of every direction at one scale."""
    model = randomise(build_vit(**tiny)).double().eval()
    align_(model, torch.randn(24, 3, 16, 16, dtype=torch.float64).split(8), embedding=False)
    for block in model.blocks:
        rows, columns = block.attn.qkv.weight[64:].norm(dim=1), block.attn.proj.weight.norm(dim=0)
        torch.testing.assert_close(rows, columns)


def test_the_embedding_may_stay(tiny, randomise):
    model = randomise(build_vit(**tiny)).double().eval()
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    before, token, values = logits(model, images), model.cls_token.clone(), model.blocks[0].attn.qkv.weight.clone()
    assert align_(model, images.split(8), embedding=False) == ["the embedding stays as it is"]
    torch.testing.assert_close(logits(model, images), before, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.cls_token, token) and not torch.equal(model.blocks[0].attn.qkv.weight, values)


def test_what_cannot_be_rotated_is_said(tiny):
    assert why_not_rotated(build_vit(**tiny)) is None
    assert "no bias" in why_not_rotated(build_vit(**tiny | dict(qkv_bias=False)))
    clip = build_vit(**tiny | dict(arch="vit_base_patch16_clip_quickgelu_224"))
    assert "before the first block" in why_not_rotated(clip)
    (line,) = align_(clip.eval(), [torch.randn(4, 3, 16, 16)])
    assert "sorted, not rotated" in line


def test_cut_helmert_coordinates_hold_the_first_components_up_to_a_shift():
    H, c = helmert(7), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(H.T @ H, torch.eye(6, dtype=torch.float64))
    assert H.sum(0).abs().max() < 1e-12
    for k in range(2, 8):
        cut = (H @ c)[:k]
        torch.testing.assert_close(cut - cut.mean(), H[:k, : k - 1] @ c[: k - 1])


def test_first_query_and_key_channels_are_the_best_low_rank_form():
    q, k = torch.randn(2, 50, 6, dtype=torch.float64) @ torch.randn(2, 6, 6, dtype=torch.float64)
    to_q, to_k = qk_bases((q.T @ q)[None], (k.T @ k)[None])
    q_new, k_new = q @ to_q[0].T, k @ to_k[0].T
    torch.testing.assert_close(q_new @ k_new.T, q @ k.T)
    u, s, vt = torch.linalg.svd(q @ k.T)
    for r in range(1, 6):
        torch.testing.assert_close(q_new[:, :r] @ k_new[:, :r].T, u[:, :r] * s[:r] @ vt[:r], rtol=1e-6, atol=1e-6)


def test_queries_and_keys_do_not_see_what_all_keys_share(tiny, randomise):
    """A shift of all keys changes no softmax, so it changes no basis: the products of the first r channels stay."""
    model = randomise(build_vit(**tiny)).double().eval()
    shifted, images = copy.deepcopy(model), torch.randn(24, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for block in shifted.blocks:
            block.attn.qkv.bias[32:64] += 5 * torch.randn(32).double()
    for aligned in (model, shifted):
        align_(aligned, images.split(8), embedding=False)
    for one, other in zip(model.blocks, shifted.blocks, strict=True):
        q, k, _ = one.attn.qkv.weight.view(3, 4, 8, 32)  # H d E
        q_other, k_other, _ = other.attn.qkv.weight.view(3, 4, 8, 32)
        for r in range(1, 8):
            products = (q_other[:, :r].mT @ k_other[:, :r], q[:, :r].mT @ k[:, :r])
            torch.testing.assert_close(*products, rtol=1e-6, atol=1e-6)


def test_first_value_channels_are_the_best_low_rank_form():
    values, proj = torch.randn(50, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    covariance = values.T @ values
    to_v, from_v = v_bases(covariance[None], proj[None])
    new, columns = values @ to_v[0].T, proj @ from_v[0]
    torch.testing.assert_close(new @ columns.T, values @ proj.T)
    u, s, vt = torch.linalg.svd(values @ proj.T, full_matrices=False)
    for r in range(1, 6):
        torch.testing.assert_close(new[:, :r] @ columns[:, :r].T, u[:, :r] * s[:r] @ vt[:r], rtol=1e-6, atol=1e-6)


def test_the_first_channels_of_a_rotated_stream_hold_most_of_it(tiny, randomise):
    model = randomise(build_vit(**tiny)).eval()
    images = torch.randn(32, 3, 16, 16)
    align_(model, images.split(16))
    with torch.no_grad():
        x = model.blocks(streams.stem(model, images))
    power = x.sub(x.mean(-1, keepdim=True)).square().mean((0, 1))
    assert x.mean(-1).abs().max() < 1e-5  # LayerNorm has nothing to remove
    assert power[:16].sum() > 2 * power[16:].sum()
