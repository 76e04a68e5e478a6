"""Prices by the second order against measured ones, against a formula by hand, and over batches."""

import copy

import numpy as np
import pytest
import torch

from models import build_vit
from pruning import pricing
from pruning.align import align_
from pruning.config import PruningConfig
from pruning.objective import PREDICTIONS, Features
from pruning.pricing import FITTED, JUDGED, price
from pruning.probe import block_curves, measure_prices

IMAGES = 256


@pytest.fixture
def aligned(family, randomise):
    torch.manual_seed(0)
    model = randomise(build_vit(**family)).eval().requires_grad_(False)
    images = torch.randn(IMAGES, 3, 16, 16)
    align_(model, images.split(64))
    return model, images


def logarithms(found, expected):
    """Of both prices of every width of every block that costs anything."""
    both = [
        (found[i][axis][width], value)
        for i, curves in enumerate(expected)
        for axis, curve in curves.items()
        for width, value in curve.items()
        if value > 0
    ]
    return np.log(np.array(both)).T


def test_prices_are_those_that_are_measured(aligned):
    """Small cuts within noise; whole branches to the last digit, since they are measured."""
    model, images = aligned
    groups = PruningConfig().group_sizes(model.dims)
    found = price(model, images, groups, 64)
    expected = measure_prices(model, images, groups, 64)
    assert [{a: sorted(c) for a, c in block.items()} for block in found.blocks] == [
        {a: sorted(c) for a, c in block.items()} for block in expected.blocks
    ]
    a, b = logarithms(found.blocks, expected.blocks)
    assert np.corrcoef(a, b)[0, 1] > 0.95 and abs(np.median(a - b)) < 0.3
    for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
        for axis in ("heads", "mlp"):
            assert mine[axis][0] == pytest.approx(theirs[axis][0], rel=1e-4)
    assert found.embed[model.dims.embed] == 0.0 and set(expected.embed) <= set(found.embed)
    a, b = (np.log([prices.embed[w] for w in sorted(expected.embed)[:-1]]) for prices in (found, expected))
    assert np.abs(a - b).max() < np.log(4)


def test_layer_scale_is_priced(tiny, randomise):
    """Of a model that is not aligned: alignment makes LayerScale 1 where it rotates the stream."""
    torch.manual_seed(0)
    model = (
        randomise(build_vit(**tiny | dict(arch="vit_tiny_patch16_224", init_values=0.1))).eval().requires_grad_(False)
    )
    for block in model.blocks:
        block.ls1.gamma.fill_(0.1), block.ls2.gamma.fill_(3.0)
    images, groups = torch.randn(IMAGES, 3, 16, 16), PruningConfig().group_sizes(model.dims)
    found, expected = price(model, images, groups, 64).blocks, measure_prices(model, images, groups, 64).blocks
    for mine, theirs in zip(found, expected, strict=True):
        for axis, width in (("v", 4), ("mlp", 64)):
            assert 0.4 < mine[axis][width] / theirs[axis][width] < 2.5


def test_a_price_is_half_the_mean_square_of_what_the_outputs_change(tiny, randomise, monkeypatch):
    """The last block's MLP, for features that all weigh the same: the square of the derivative along the cut."""
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images = torch.randn(64, 3, 16, 16)
    objective = Features("pooled", torch.ones(()))
    monkeypatch.setattr(pricing, "PROBES", 400)
    monkeypatch.setattr(pricing, "MEASURED", 0)
    found = price(model, images, PruningConfig().group_sizes(model.dims), 16, objective).blocks[-1]["mlp"]
    exact, judge, step = copy.deepcopy(model).double(), images[-(len(images) // JUDGED) :].double(), 1e-4
    cut = copy.deepcopy(exact)
    for parameter in cut.blocks[-1].mlp.fc2.parameters():
        parameter.mul_(1 - step)
    dense, moved = (objective.outputs(m, m.blocks(m._pos_embed(m.patch_embed(judge)))).flatten(1) for m in (exact, cut))
    expected = float(((moved - dense) / step).square().mean())
    assert found[0] == pytest.approx(expected, rel=0.1)


def test_a_scaled_objective_scales_every_price(tiny, randomise):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images, groups = torch.randn(64, 3, 16, 16), PruningConfig().group_sizes(model.dims)
    one, two = (price(model, images, groups, 32, Features("all", torch.tensor(s))) for s in (1.0, 2.0))
    a, b = logarithms(two.blocks, one.blocks)
    np.testing.assert_allclose(a - b, np.log(4.0), rtol=1e-3)


def test_prices_do_not_depend_on_the_batch(aligned):
    model, images = aligned
    groups = PruningConfig().group_sizes(model.dims)
    a, b = logarithms(price(model, images, groups, 64).blocks, price(model, images, groups, 24).blocks)
    np.testing.assert_allclose(a, b, atol=2e-2)


def test_images_that_compensate_do_not_judge():
    assert 1 / FITTED + 1 / JUDGED <= 1


def test_tokens_are_priced_too(tiny, randomise):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images = torch.randn(IMAGES, 3, 16, 16)
    groups = PruningConfig().group_sizes(model.dims) | {f"blocks.{i}.tokens": 4 for i in range(2)}
    found = price(model, images, groups, 64)
    expected = block_curves(model, images[: IMAGES // 4], images[-IMAGES // 4 :], groups, 64)
    for mine, theirs in zip(found.blocks, expected, strict=True):
        assert sorted(mine["tokens"]) == sorted(theirs["tokens"])
        assert all(0.2 < mine["tokens"][n] / theirs["tokens"][n] < 5 for n in mine["tokens"] if theirs["tokens"][n])


def test_labels_are_drawn_from_the_predictions():
    """E[c c^T] is the Fisher information, diag(p) - p p^T, and an image's labels are the same in any batch."""
    logits = torch.tensor([[2.0, 0.0, -1.0]]).expand(4000, 3)
    c = torch.cat(PREDICTIONS.cotangents(logits, range(4000), 2)).double()
    p = logits[0].double().softmax(0)
    torch.testing.assert_close(c.T @ c / len(c), p.diag() - torch.outer(p, p), atol=0.01, rtol=0.0)
    again = torch.cat(PREDICTIONS.cotangents(logits[7:9], range(7, 9), 2))
    assert torch.equal(again.double(), torch.cat([c[7:9], c[4007:4009]]))


def test_features_are_measured_in_their_own_variance(tiny, randomise):
    """A change of one standard deviation of every feature costs the whole variance."""
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images = torch.randn(64, 3, 16, 16)
    objective = Features.of(model, images, 32, "patches")
    dense = torch.randn(5, 16, 32)
    assert objective.divergence(dense + 1.0, dense).tolist() == pytest.approx([1.0] * 5)
    c = torch.cat(objective.cotangents(dense, range(5), 200)).double().flatten(1)
    assert float((c.sum(1) ** 2).mean() / 2) == pytest.approx(1.0, rel=0.15)
    scaled = model.head(model.forward_features(images)[:, 2:].flatten(0, 1)) * objective.scale
    torch.testing.assert_close(scaled.std(0), torch.ones(scaled.shape[1]), rtol=1e-2, atol=1e-2)


def test_features_of_tokens_that_a_model_lacks_are_refused():
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    model = build_vit("vit_tiny_patch16_224", class_token=False, global_pool="avg", **size).eval()
    with pytest.raises(ValueError, match="no class token"):
        Features.of(model, torch.randn(4, 3, 16, 16), 4, "class")
