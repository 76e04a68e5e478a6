"""Compensation: exact where nothing is cut, closer to the model before the cut where something is."""

import copy

import pytest
import torch

from models import Masks, build_vit
from pruning.objective import divergence
from recipes.calibration import Compensation, align

CUT = ("embed", "v", "mlp")


@pytest.fixture
def problem(tiny, randomise):
    """A model whose logits spread, and images that share a few patterns, as natural ones do."""
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    patterns = torch.randn(6, 3, 16, 16)

    def images(count):
        return torch.einsum("np,pchw->nchw", torch.randn(count, 6), patterns)

    return model, images


def kl(model, dense, images):
    with torch.no_grad():
        return divergence(model(images), dense(images)).mean().item()


def cut_and_compensated(model, prune, when, images, axes):
    """(masked student, the same compensated)."""
    student, masks = copy.deepcopy(model), Masks(model.dims)
    compensation = Compensation(when, model, images, 64)
    compensation.remember(student)
    prune(masks, axes)
    masks.install_(student)
    cut = copy.deepcopy(student)
    compensation.apply_(student, masks, masks, last=True)
    return cut, student


@pytest.mark.parametrize("when", ["event", "end"])
def test_the_survivors_take_over(problem, prune, when):
    model, images = problem
    cut, student = cut_and_compensated(model, prune, when, images(256), CUT)
    fresh = images(64)
    assert kl(student, model, fresh) < 0.5 * kl(cut, model, fresh)


@pytest.mark.parametrize("when", ["event", "end"])
def test_exact_where_nothing_is_cut(problem, prune, when):
    model, images = problem
    _, student = cut_and_compensated(model, prune, when, images(128), ())
    fresh = images(16)
    torch.testing.assert_close(student(fresh), model(fresh), rtol=1e-5, atol=1e-5)


def test_no_option_no_change_and_the_end_waits_for_the_last_event(problem, prune):
    model, images = problem
    cut, student = cut_and_compensated(model, prune, None, images(64), CUT)
    assert all(torch.equal(p, q) for p, q in zip(cut.parameters(), student.parameters(), strict=True))
    masks, compensation = Masks(model.dims), Compensation("end", model, images(128), 64)
    prune(masks, CUT)
    masks.install_(student := copy.deepcopy(model))
    before = copy.deepcopy(student)
    compensation.remember(student)
    compensation.apply_(student, masks, masks, last=False)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), student.parameters(), strict=True))


def test_alignment_says_what_it_did_and_leaves_the_mode(problem):
    model, images = problem
    some, weight = images(4), model.blocks[0].attn.qkv.weight.clone()
    before = model(some)
    assert align(model.train(), images(64), 32) == "every axis" and model.training
    torch.testing.assert_close(model.eval()(some), before, rtol=1e-3, atol=1e-4)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, weight)
