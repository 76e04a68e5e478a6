"""Closed forms against direct computation in float64."""

from itertools import combinations

import pytest
import torch
from torch import nn

from pruning.moments import Moments, compensated, correct_, corrected, removal


@pytest.fixture
def rows():
    x = torch.randn(400, 6) @ torch.randn(6, 6) + torch.randn(6)
    return x, x @ torch.randn(6, 3) + 0.3 * torch.randn(400, 3) + 1.0


def moments_of(x, t=None):
    moments = Moments(x.shape[-1], 0 if t is None else t.shape[-1])
    for i in range(0, len(x), 100):
        moments.add(x[i : i + 100], None if t is None else t[i : i + 100])
    return moments


@pytest.mark.parametrize("bias", [torch.randn(3).double(), None])
def test_the_error_of_any_weights_follows_from_moments(rows, bias):
    x, t = (r.double() for r in rows)
    weight = torch.randn(3, 6).double()
    direct = (x @ weight.T + (0 if bias is None else bias) - t).square().sum(1).mean()
    assert moments_of(*rows).error(weight, bias) == pytest.approx(float(direct), rel=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_without_ridge_the_correction_is_least_squares(rows, with_bias):
    x, t = (r.double() for r in rows)
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1) if with_bias else x
    expected = torch.linalg.lstsq(inputs, t).solution.T
    start = torch.randn(3, 6).double(), torch.randn(3).double() if with_bias else None
    weight, bias = corrected(*start, moments_of(*rows), 0.0)
    torch.testing.assert_close(weight, expected[:, :6], rtol=1e-3, atol=1e-3)
    if with_bias:
        torch.testing.assert_close(bias, expected[:, 6], rtol=1e-3, atol=1e-3)
    far, _ = corrected(*start, moments_of(*rows), 1e9)
    torch.testing.assert_close(far, start[0])


def test_a_correction_that_does_not_help_is_not_made():
    x, t = torch.randn(20, 12), torch.randn(20, 3)  # as good as no rows, and nothing to learn
    layer = nn.Linear(12, 3)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    before, after = correct_(layer, moments_of(x[:14], t[:14]), moments_of(x[14:], t[14:]))
    assert before == after and not layer.weight.any()


def test_a_correction_uses_all_rows_and_lowers_the_held_out_error(rows):
    x, t = rows
    layer = nn.Linear(6, 3)
    before, after = correct_(layer, moments_of(x[:300], t[:300]), moments_of(x[300:], t[300:]))
    assert after < 0.2 * before
    assert (layer(x) - t).square().sum(1).mean() < 1.05 * moments_of(x, t).error(
        *corrected(layer.weight.detach().double(), layer.bias.detach().double(), moments_of(x, t), 0.0)
    )


@pytest.mark.parametrize("bias", [torch.randn(3).double(), None])
def test_compensation_is_exact_for_nothing_cut_and_for_copies(rows, bias):
    x, _ = rows
    x = torch.cat([x, x[:, :2] * 2], 1)  # inputs 6 and 7 are copies of 0 and 1
    weight = torch.randn(3, 8).double()
    same, same_bias = compensated(weight, bias, moments_of(x), torch.arange(8))
    torch.testing.assert_close(same, weight)
    cut, cut_bias = compensated(weight, bias, moments_of(x), torch.arange(6))
    full = x.double() @ weight.T + (0 if bias is None else bias)
    small = x[:, :6].double() @ cut.T + (0 if bias is None else cut_bias)
    assert (full - small).norm() / full.norm() < 1e-3
    assert bias is None or torch.allclose(same_bias, bias)


def test_removal_starts_with_what_the_others_can_replace():
    x = torch.randn(500, 5)
    x[:, 3] = x[:, 0] + x[:, 1] + 0.01 * torch.randn(500)  # large, and yet no loss
    covariance = moments_of(x).covariance
    weight = torch.tensor([[2.0, 1.0, 0.5, 3.0, 0.8]])
    order = removal(covariance[None], weight[None])
    assert order[-1] in (0, 1, 3) and order[-2] == 2


def test_the_first_to_go_is_the_best_single_one(rows):
    x, _ = rows
    moments, weight = moments_of(x), torch.randn(4, 6).double()
    loss = []
    for kept in combinations(range(6), 5):
        cut, bias = compensated(weight, torch.zeros(4).double(), moments, torch.tensor(kept))
        full = x.double() @ weight.T
        loss.append(float((x[:, kept].double() @ cut.T + bias - full).square().sum()))
    worst = 5 - loss.index(min(loss))  # combinations leave out 5, 4, … in turn
    assert removal(moments.covariance[None], weight[None])[-1] == worst


def test_groups_of_neighbours_go_together():
    x, weight = torch.randn(300, 8), torch.ones(2, 8)
    weight[:, 2:4] = 0.1
    assert removal(moments_of(x).covariance[None], weight[None], group=2)[-1] == 1
    both = torch.stack([weight, weight.flip(1)])  # for the second layer it is the third pair
    order = removal(moments_of(x).covariance.expand(2, -1, -1), both, group=2)
    assert set(order[2:].tolist()) == {1, 2}
