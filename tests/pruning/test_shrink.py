"""Compacting the student while it is pruned: what is saved, and how training goes on, is as without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from models import Masks, build_vit
from pruning.shrink import Student

EVERYTHING = ("embed", "heads", "qk", "v", "mlp", "blocks.0.heads=0", "blocks.1.mlp=0")


def step(student, images, targets):
    model, masks, optimizer = student.model, student.masks, student.optimizer
    optimizer.zero_grad()
    F.cross_entropy(model(images), targets).backward()
    masks.drop_gradients_(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    masks.zero_weights_(model)


def prepared(model):
    model = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    student = Student(model, Masks(model.dims))
    student.prepare(optimizer, lambda model: model)
    return student


def install(student, masks):
    student.masks.load_state_dict(masks.state_dict())
    student.masks.install_(student.model, student.optimizer)


@pytest.fixture
def problem(family, randomise):
    """In float64: Adam makes whole steps of the rounding of gradients that are 0, like those of the keys' biases."""
    model = randomise(build_vit(**family)).double().eval()
    return model, torch.randn(4, 3, 16, 16).double(), torch.randint(0, 10, (4,))


def test_steps_after_shrinking_are_those_of_the_masked_student(problem, prune):
    """Three steps, a cut, three steps; then a cut within the cut, and three steps more."""
    original, images, targets = problem
    masked, small = prepared(original), prepared(original)
    for removed in (("qk",), EVERYTHING):
        torch.manual_seed(5)
        prune(small.masks, removed)
        install(masked, small.lift_masks())
        small.masks.install_(small.model, small.optimizer)
        small.shrink()
        assert small.model.dims == small.masks.full == masked.masks.dims == small.lift_masks().dims
        for _ in range(3):
            step(masked, images, targets)
            step(small, images, targets)
        full, found = small.expand()
        assert all(torch.equal(found.keep[axis], keep) for axis, keep in masked.masks.keep.items())
        torch.testing.assert_close(full(images), masked(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(small(images), masked(images), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(full.named_parameters(), masked.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    counts = [sum(p.numel() for p in student.model.parameters()) for student in (small, masked)]
    assert counts[0] < counts[1]


def test_the_saved_optimizer_is_the_full_size_one(problem, prune):
    original, images, targets = problem
    masked, small = prepared(original), prepared(original)
    masks = prune(Masks(original.dims), ("embed", "heads", "mlp"))
    for student in (masked, small):
        step(student, images, targets)
        install(student, masks)
    small.shrink()
    found, expected = small.optimizer_state(), masked.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"] and found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(found["state"][index][name], value), (index, name)
    prepared(original).optimizer.load_state_dict(found)


def test_scores_and_units_find_their_places(tiny):
    student = prepared(build_vit(**tiny))
    student.masks.remove("embed", torch.arange(0, 32, 2))
    student.masks.remove("blocks.1.mlp", torch.tensor([0, 5]))
    keep = torch.cat(list(student.masks.keep.values()))
    student.shrink()
    assert student.units("embed", torch.tensor([0, 3])).tolist() == [1, 7]
    assert student.units("blocks.1.mlp", torch.tensor([0, 4])).tolist() == [1, 6]
    scores = torch.arange(1.0, 1 + sum(student.model.dims.sizes().values()))
    pasted = student.paste_scores(scores)
    assert torch.equal(pasted[keep], scores) and not pasted[~keep].any()


def test_an_optimizer_with_other_state_is_refused(tiny):
    student = prepared(build_vit(**tiny))
    student.optimizer.state[student.model.blocks[0].mlp.fc1.weight]["row_mean"] = torch.zeros(128)
    with pytest.raises(ValueError, match="row_mean has not the shape of the weights"):
        student.shrink()
