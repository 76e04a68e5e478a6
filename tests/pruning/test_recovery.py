"""Recovery by the clock: it ends in time, gets better or changes nothing, and is the same model on every process."""

import itertools

import pytest
import torch

from models import Masks, build_vit, compact
from pruning.objective import judge
from pruning.recovery import CHECKS, LR, learning_rate, recover_


@pytest.fixture
def pair(tiny, randomise, prune):
    torch.manual_seed(0)
    dense = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    small = compact(dense, prune(Masks(dense.dims), ("mlp", "v")))
    return dense, small


def ticking(step):
    """A clock on which every call is `step` seconds after the last."""
    return itertools.count(0, step).__next__


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(32, 3, 16, 16, generator=generator)


def test_it_comes_nearer_to_the_dense_model_within_the_time(pair):
    dense, small = pair
    unseen, lines = torch.randn(64, 3, 16, 16), []
    before = judge(small, dense, unseen, 32)
    done = recover_(small, dense, batches(), 40.0, unseen, 32, clock=ticking(1.0), progress=lines.append)
    assert done.updates == 40 and done.before == before and done.after < 0.7 * before
    assert judge(small, dense, unseen, 32) == pytest.approx(done.after, rel=1e-6)
    assert len(lines) == len(CHECKS)
    assert not any(p.requires_grad or p.grad is not None for p in small.parameters())


def test_the_best_state_wins(pair, monkeypatch):
    """Here the one before: every update makes it worse."""
    dense, small = pair
    monkeypatch.setattr("pruning.recovery.learning_rate", lambda share: 10.0)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    done = recover_(small, dense, batches(), 5.0, torch.randn(32, 3, 16, 16), 32, clock=ticking(1.0))
    assert done.after == done.before and done.updates == 5
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_the_rate_follows_the_time():
    assert learning_rate(0.05) == pytest.approx(LR / 2) and learning_rate(0.1) == pytest.approx(LR)
    assert learning_rate(0.55) == pytest.approx(LR / 2) and learning_rate(1.0) == learning_rate(2.0) == 0.0
    assert learning_rate(0.0) > 0
