"""Closed forms against direct computation in float64."""

from itertools import combinations

import pytest
import torch
from torch import nn

from pruning.moments import AS_GOOD, RIDGES, Moments, compensate, correct, correct_, removal


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
    weight, bias = correct(*start, moments_of(*rows), 0.0)
    torch.testing.assert_close(weight, expected[:, :6], rtol=1e-3, atol=1e-3)
    if with_bias:
        torch.testing.assert_close(bias, expected[:, 6], rtol=1e-3, atol=1e-3)
    far, _ = correct(*start, moments_of(*rows), 1e9)
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
        *correct(layer.weight.detach().double(), layer.bias.detach().double(), moments_of(x, t), 0.0)
    )


def test_the_ridge_that_is_best_on_rows_not_fitted_is_used_on_all():
    """Against ridge regressions by least squares in float64, of few rows with much noise."""
    x = torch.randn(72, 12).double()
    present = torch.randn(3, 12).double(), torch.randn(3).double()
    t = x @ (present[0] + 0.1 * torch.randn(3, 12)).T + present[1] + 1.0 + 2 * torch.randn(72, 3)

    def fitted(ridge, x, t):
        """Penalised by `ridge` times the variance of each input for what a weight moves."""
        away = (x - x.mean(0), (t - x @ present[0].T) - (t - x @ present[0].T).mean(0))
        rows = (ridge * away[0].square().sum(0)).sqrt().diag()
        moved = torch.linalg.lstsq(torch.cat([away[0], rows]), torch.cat([away[1], t.new_zeros(12, 3)])).solution.T
        return present[0] + moved, t.mean(0) - x.mean(0) @ (present[0] + moved).T

    def error(weight, bias):
        return float((x[48:] @ weight.T + bias - t[48:]).square().sum(1).mean())

    errors = {ridge: error(*fitted(ridge, x[:48], t[:48])) for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
    best = min(errors, key=errors.get)
    assert best == 1e-1 and errors[best] < 0.99 * errors[1e-5]
    layer = nn.Linear(12, 3).double()
    layer.weight.data, layer.bias.data = (p.clone() for p in present)
    before, after = correct_(layer, moments_of(x[:48], t[:48]), moments_of(x[48:], t[48:]))
    assert (before, after) == pytest.approx((error(*present), errors[best]), rel=1e-4)
    weight, bias = fitted(best, x, t)
    torch.testing.assert_close(layer.weight.data, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.data, bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [torch.randn(3).double(), None])
def test_compensation_is_exact_for_nothing_cut_and_for_copies(rows, bias):
    x, _ = rows
    x = torch.cat([x, x[:, :2] * 2], 1)  # inputs 6 and 7 are copies of 0 and 1
    weight = torch.randn(3, 8).double()
    same, same_bias = compensate(weight, bias, moments_of(x), torch.arange(8))
    torch.testing.assert_close(same, weight)
    cut, cut_bias = compensate(weight, bias, moments_of(x), torch.arange(6))
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
        cut, bias = compensate(weight, torch.zeros(4).double(), moments, torch.tensor(kept))
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


class TestPrecision:
    """A mean far above the deviation, and inputs that say the same: float32 sums about 0 see rounding alone."""

    MEAN, DEVIATION = 300.0, 0.05

    @pytest.fixture
    def far(self):
        """Rows (600, 6) of float32 around a mean of 300, and targets (600, 3) of them."""
        x = (self.MEAN + self.DEVIATION * torch.randn(600, 6) @ torch.randn(6, 6)).float()
        t = (x.double() - self.MEAN) @ torch.randn(6, 3).double() + 0.01 * torch.randn(600, 3).double()
        return x, t.float()

    def test_the_covariance_is_that_of_the_rows(self, far):
        x, t = far
        both = torch.cat([x, t], 1).double()
        exact = torch.cov(both.T, correction=0)[:6]
        moments = moments_of(x, t)
        assert (moments.covariance - exact).norm() < 1e-5 * exact.norm()
        torch.testing.assert_close(moments.mean, both.mean(0), rtol=1e-9, atol=1e-7)
        second = x.double().T @ both / len(x)
        torch.testing.assert_close(moments.second_moment, second, rtol=1e-8, atol=1e-5)

    def test_the_error_is_that_of_the_rows_and_never_negative(self, far):
        x, t = far
        inputs = torch.cat([x.double() - self.MEAN, torch.ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(inputs, t.double()).solution.T
        weight, bias = solution[:, :6], solution[:, 6] - self.MEAN * solution[:, :6].sum(1)
        direct = float((x.double() @ weight.T + bias - t).square().sum(1).mean())
        assert moments_of(x, t).error(weight, bias) == pytest.approx(direct, rel=1e-2)
        exact = x @ weight.T.float()
        assert moments_of(x, exact).error(weight.float().double(), None) > 0

    def test_the_correction_is_least_squares(self, far):
        x, t = far
        inputs = torch.cat([x.double() - self.MEAN, torch.ones(len(x), 1)], 1)
        expected = torch.linalg.lstsq(inputs, t.double()).solution.T[:, :6]
        weight, _ = correct(torch.zeros(3, 6).double(), torch.zeros(3).double(), moments_of(x, t), 0.0)
        assert (weight - expected).norm() < 0.02 * expected.norm()

    def test_a_layer_is_corrected_and_stays_small(self, far):
        x, t = far
        layer = nn.Linear(6, 3)
        correct_(layer, moments_of(x[:500], t[:500]), moments_of(x[500:], t[500:]))
        variance = float(t.double().var(0, correction=0).sum())
        assert (layer(x) - t).double().square().sum(1).mean() < 0.05 * variance
        assert layer.weight.abs().max() < 20

    def test_collinear_inputs_share_a_correction_of_their_own_size(self):
        x = torch.randn(400, 3)
        x = torch.cat([x, 2 * x[:, :1], x[:, 1:2] - x[:, 2:], torch.ones(400, 1)], 1) + 100  # and one that is constant
        t = (x[:, :3] - 100) @ torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.5]])
        layer = nn.Linear(6, 2)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        before, after = correct_(layer, moments_of(x[:300], t[:300]), moments_of(x[300:], t[300:]))
        assert 0 <= after < 1e-4 * before
        assert layer.weight.abs().max() < 3
        fresh = torch.randn(200, 3)
        fresh = torch.cat([fresh, 2 * fresh[:, :1], fresh[:, 1:2] - fresh[:, 2:], torch.ones(200, 1)], 1) + 100
        expected = (fresh[:, :3] - 100) @ torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.5]])
        assert (layer(fresh) - expected).square().mean() < 1e-3 * expected.square().mean()

    def test_moments_about_different_shifts_add_up(self, far):
        x, t = far
        parts = [moments_of(x[:100] + 5, t[:100]), moments_of(x[100:], t[100:] - 7), Moments(6, 3)]
        total = parts[0] + parts[1] + parts[2]
        both = torch.cat([torch.cat([x[:100] + 5, x[100:]]), torch.cat([t[:100], t[100:] - 7])], 1).double()
        torch.testing.assert_close(total.covariance, torch.cov(both.T, correction=0)[:6], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.mean, both.mean(0))
        weight, bias = torch.randn(3, 6).double(), torch.randn(3).double()
        direct = float((both[:, :6] @ weight.T + bias - both[:, 6:]).square().sum(1).mean())
        assert total.error(weight, bias) == pytest.approx(direct, rel=1e-5)

    def test_compensation_far_from_zero(self, far):
        x, _ = far
        weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
        cut, cut_bias = compensate(weight, bias, moments_of(x), torch.arange(5))
        inputs = torch.cat([x[:, :5].double() - self.MEAN, torch.ones(len(x), 1)], 1)
        full = x.double() @ weight.T + bias
        best = (full - inputs @ torch.linalg.lstsq(inputs, full).solution).square().mean()
        assert (x[:, :5].double() @ cut.T + cut_bias - full).square().mean() < 1.01 * best + 1e-9


def held_out_errors(fit, held, start):
    """By ridge, the error on held-out rows of the correction that was fitted without them, computed on the rows."""
    errors = {}
    for ridge in RIDGES:
        weight, bias = correct(*start, moments_of(*fit), ridge)
        errors[ridge] = float((held[0].double() @ weight.T + bias - held[1]).square().sum(1).mean())
    return errors


class TestChoiceOfRidge:
    def layer_and_rows(self, noise, rows=60):
        """Inputs that are nearly collinear, so that a small ridge fits noise."""
        x = torch.randn(rows, 4) @ torch.randn(4, 16) + 0.05 * torch.randn(rows, 16)
        t = x[:, :3] + noise * torch.randn(rows, 3)
        layer = nn.Linear(16, 3)
        return layer, (x[: 2 * rows // 3], t[: 2 * rows // 3]), (x[2 * rows // 3 :], t[2 * rows // 3 :])

    def test_rows_that_were_not_fitted_choose_it(self):
        layer, fit, held = self.layer_and_rows(noise=1.0)
        start = layer.weight.detach().double(), layer.bias.detach().double()
        errors = held_out_errors(fit, held, start)
        best = min(errors, key=errors.get)
        assert best > min(RIDGES) and errors[best] < 0.9 * errors[min(RIDGES)]
        before, after = correct_(layer, moments_of(*fit), moments_of(*held))
        direct = (held[0].double() @ start[0].T + start[1] - held[1]).square().sum(1).mean()
        assert before == pytest.approx(float(direct), rel=1e-4) and after == pytest.approx(errors[best], rel=1e-3)
        weight, bias = correct(*start, moments_of(*map(torch.cat, zip(fit, held, strict=True))), best)
        torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias.double(), bias, rtol=1e-4, atol=1e-4)

    def test_of_those_as_good_as_the_best_the_largest(self):
        layer, fit, held = self.layer_and_rows(noise=0.3, rows=30_000)
        start = layer.weight.detach().double(), layer.bias.detach().double()
        errors = held_out_errors(fit, held, start)
        good = [ridge for ridge in RIDGES if errors[ridge] <= (1 + AS_GOOD) * min(errors.values())]
        assert len(good) > 1
        correct_(layer, moments_of(*fit), moments_of(*held))
        weight, _ = correct(*start, moments_of(*map(torch.cat, zip(fit, held, strict=True))), max(good))
        torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-4, atol=1e-4)

    def test_a_correction_that_moves_outputs_further_than_its_error_allows_is_refused(self, monkeypatch):
        """What says that such a one is good can only be rounding."""
        layer, fit, held = self.layer_and_rows(noise=0.1)
        fit = (fit[0], 50 * fit[1])
        weight = layer.weight.detach().clone()
        error, calls = Moments.error, []

        def rounding(self, *layer):
            calls.append(error(self, *layer))
            return calls[0] if len(calls) == 1 else -1e-3

        monkeypatch.setattr(Moments, "error", rounding)
        before, after = correct_(layer, moments_of(*fit), moments_of(*held))
        assert before == after and torch.equal(layer.weight, weight)
