"""Compacting the student while it is pruned: what is saved, and how training goes on, is as without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from models import Masks, build_vit
from pruning.shrink import Shrunk

EVERYTHING = ("embed", "heads", "qk", "v", "mlp", "blocks.0.heads=0", "blocks.1.mlp=0")


def step(model, masks, optimizer, images, targets):
    optimizer.zero_grad()
    F.cross_entropy(model(images), targets).backward()
    masks.drop_gradients_(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    masks.zero_weights_(model)


def prepared(model):
    model = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    return model, optimizer, Shrunk(model, optimizer, Masks(model.dims))


@pytest.fixture
def problem(family, randomise):
    """In float64: Adam makes whole steps of the rounding of gradients that are 0, like those of the keys' biases."""
    model = randomise(build_vit(**family)).double().eval()
    return model, torch.randn(4, 3, 16, 16).double(), torch.randint(0, 10, (4,))


def test_steps_after_shrinking_are_those_of_the_masked_student(problem, prune):
    """Three steps, a cut, three steps; then a cut within the cut, and three steps more."""
    original, images, targets = problem
    masked, adam, _ = prepared(original)
    small, small_adam, shrunk = prepared(original)
    masks, inner = Masks(masked.dims), Masks(small.dims)
    for removed in (("qk",), EVERYTHING):
        torch.manual_seed(5)
        prune(inner, removed)
        lifted = shrunk.lifted(inner)
        masks.load_state_dict(lifted.state_dict())
        masks.install_(masked, adam)
        inner.install_(small, small_adam)
        small = shrunk.shrink(small, inner)
        inner = Masks(small.dims)
        assert small.dims == masks.dims and shrunk.lifted(inner).dims == masks.dims
        for _ in range(3):
            step(masked, masks, adam, images, targets)
            step(small, inner, small_adam, images, targets)
        full, found = shrunk.expanded(small, inner)
        assert all(torch.equal(found.keep[axis], keep) for axis, keep in masks.keep.items())
        torch.testing.assert_close(full(images), masked(images), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(full.named_parameters(), masked.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())


def test_the_saved_optimizer_is_the_full_size_one(problem, prune):
    original, images, targets = problem
    masked, adam, _ = prepared(original)
    small, small_adam, shrunk = prepared(original)
    masks = prune(Masks(masked.dims), ("embed", "heads", "mlp"))
    for model, optimizer in ((masked, adam), (small, small_adam)):
        step(model, Masks(model.dims), optimizer, images, targets)
        masks.install_(model, optimizer)
    small = shrunk.shrink(small, masks)
    found, expected = shrunk.optimizer_state(small), adam.state_dict()
    assert found["param_groups"] == expected["param_groups"] and found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(found["state"][index][name], value), (index, name)
    again, fresh, _ = prepared(original)
    fresh.load_state_dict(found)


def test_scores_and_units_find_their_places(tiny):
    model, _, shrunk = prepared(build_vit(**tiny))
    masks = Masks(model.dims)
    masks.remove("embed", torch.arange(0, 32, 2))
    masks.remove("blocks.1.mlp", torch.tensor([0, 5]))
    small = shrunk.shrink(model, masks)
    assert shrunk.units("embed", torch.tensor([0, 3])).tolist() == [1, 7]
    assert shrunk.units("blocks.1.mlp", torch.tensor([0, 4])).tolist() == [1, 6]
    scores = torch.arange(1.0, 1 + sum(small.dims.sizes().values()))
    pasted = shrunk.paste_scores(scores)
    keep = torch.cat(list(masks.keep.values()))
    assert torch.equal(pasted[keep], scores) and not pasted[~keep].any()


def test_an_optimizer_with_other_state_is_refused(tiny):
    model, optimizer, shrunk = prepared(build_vit(**tiny))
    optimizer.state[model.blocks[0].mlp.fc1.weight]["row_mean"] = torch.zeros(128)
    with pytest.raises(ValueError, match="row_mean has not the shape of the weights"):
        shrunk.shrink(model, Masks(model.dims))
