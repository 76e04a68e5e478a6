"""Refitting a cut model, and writing it back into the masked one."""

import copy

import pytest
import torch

from models import Masks, build_vit, compact
from models.compact import expand_
from pruning import refit, streams
from pruning.align import align_
from pruning.moments import Moments, correct_
from pruning.objective import divergence
from pruning.refit import refit_


@pytest.fixture
def aligned(family, randomise):
    model = randomise(build_vit(**family)).eval().requires_grad_(False)
    align_(model, torch.randn(48, 3, 16, 16).split(16))
    return model


def kl(model, dense, images):
    return float(divergence(model(images), dense(images)).mean())


def test_the_divergence_of_nearly_equal_predictions_is_not_rounding():
    logits = torch.randn(64, 10)
    near = logits + 1e-4 * torch.randn(64, 10)
    expected = torch.nn.functional.kl_div(
        near.double().log_softmax(1), logits.double().softmax(1), reduction="none"
    ).sum(1)
    assert (divergence(near, logits) > 0).all()
    torch.testing.assert_close(divergence(near, logits), expected, rtol=1e-6, atol=1e-14)


def test_a_model_that_lost_nothing_is_left_alone(aligned, images):
    small = compact(aligned, Masks(aligned.dims))
    found = refit_(aligned, small, Masks(aligned.dims), torch.randn(40, 3, 16, 16), 16)
    assert found < 1e-6
    torch.testing.assert_close(small(images), aligned(images), rtol=1e-3, atol=1e-3)


def test_refitting_brings_a_cut_model_of_any_family_back(aligned, prune):
    masks = prune(Masks(aligned.dims), ("embed", "qk", "v", "mlp"))
    small = compact(aligned, masks)
    calibration, fresh = torch.randn(200, 3, 16, 16), torch.randn(64, 3, 16, 16)
    before = kl(small, aligned, fresh)
    found = refit_(aligned, small, masks, calibration, 64)
    assert kl(small, aligned, fresh) < 0.75 * before
    assert found == pytest.approx(kl(small, aligned, calibration[-12:]), rel=1e-3)  # a sixteenth, which no fit has seen


def test_refitting_with_missing_branches(tiny, randomise, prune):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    masks = prune(Masks(model.dims), ("mlp", "blocks.0.heads=0", "blocks.1.mlp=0"))
    small = compact(model, masks)
    fresh = torch.randn(64, 3, 16, 16)
    before = kl(small, model, fresh)
    refit_(model, small, masks, torch.randn(200, 3, 16, 16), 64)
    assert kl(small, model, fresh) < before


@pytest.mark.parametrize("more", [{}, dict(arch="vit_tiny_patch16_224", init_values=0.1)], ids=["distilled", "scaled"])
def test_a_refitted_stream_has_the_mean_of_the_dense_one(tiny, randomise, prune, more):
    """A bias is not penalised, so what a layer that writes the stream leaves adds up to nothing, whatever the ridge:
    over all tokens, and in the last block over those that the head reads. The stem is off by a constant, which the
    first branch makes good."""
    model = randomise(build_vit(**tiny | more)).eval().requires_grad_(False)
    masks, images = prune(Masks(model.dims), ("embed", "qk", "v", "mlp")), torch.randn(80, 3, 16, 16)
    small, kept = compact(model, masks), masks.keep["embed"]
    small.pos_embed += torch.randn(small.embed_dim)
    refit_(model, small, masks, images, 16, unseen=images)
    x, z = streams.stem(model, images), streams.stem(small, images)
    assert (z - x[..., kept]).mean((0, 1)).abs().min() > 1e-3
    for i, (big, little) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        read = slice(model.num_prefix_tokens if i == 1 else None)
        for branch, other in zip(streams.branches(big), streams.branches(little), strict=True):
            x, z = x + branch(x), z + other(z)
            torch.testing.assert_close(z[:, read].mean((0, 1)), x[:, read, kept].mean((0, 1)), rtol=1e-4, atol=1e-4)


def test_held_out_images_are_not_fitted(tiny, randomise, monkeypatch):
    """Rows that a layer is fitted to, and that choose its ridge: of 36 and 4 images, of which the head reads two
    tokens. A sixteenth of the images is in neither."""
    model, seen = randomise(build_vit(**tiny)).eval().requires_grad_(False), []
    monkeypatch.setattr(refit, "correct_", lambda _, fit, held: seen.append((int(fit.rows), int(held.rows))))
    refit_(model, copy.deepcopy(model), Masks(model.dims), torch.randn(42, 3, 16, 16), 16)
    every, read = (36 * 18, 4 * 18), (36 * 2, 4 * 2)
    assert seen == [every] * 4 + [every, read] * 2 + [(36, 4)] * 2


def test_units_that_others_replace_are_no_loss(tiny, randomise, images):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    mlp = model.blocks[0].mlp
    mlp.fc1.weight[64:], mlp.fc1.bias[64:] = mlp.fc1.weight[:64].clone(), mlp.fc1.bias[:64].clone()
    masks = Masks(model.dims)
    masks.remove("blocks.0.mlp", torch.arange(64, 128))
    small = compact(model, masks)
    before = kl(small, model, images)
    refit_(model, small, masks, torch.randn(200, 3, 16, 16), 64)
    assert kl(small, model, images) < 1e-4 * before


def test_expanding_is_the_inverse_of_compacting(family, case, randomise, prune, images):
    model = randomise(build_vit(**family)).eval()
    masks = prune(Masks(model.dims), case)
    small = randomise(compact(model, masks))
    full = copy.deepcopy(model)
    expand_(full, masks, small)
    for name, parameter in compact(full, masks).named_parameters():
        assert torch.equal(parameter, dict(small.named_parameters())[name]), name
    with torch.no_grad():
        error = (full(images) - small(images)).norm() / small(images).norm()
    assert error <= 1e-5


def test_rounding_is_not_corrected():
    """Inputs that are nearly collinear, and targets that differ from what the layer gives by rounding alone."""
    linear = torch.nn.Linear(24, 8)
    x = torch.randn(200, 6) @ torch.randn(6, 24) + 1e-3 * torch.randn(200, 24)
    with torch.no_grad():
        targets = linear(x) * (1 + 1e-6 * torch.randn(200, 8))
    weight, sets = linear.weight.clone(), [Moments(24, 8), Moments(24, 8)]
    for moments, rows in zip(sets, (slice(0, 30), slice(30, 200)), strict=True):
        moments.add(x[rows], targets[rows])
    correct_(linear, *sets)
    assert torch.equal(linear.weight, weight)
