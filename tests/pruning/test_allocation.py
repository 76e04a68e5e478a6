"""The solver against brute force, and what probing finds in models whose answer is known."""

import copy
from itertools import product

import numpy as np
import pytest
import torch

from latency.table import LatencyTable
from models import BlockDims, ViTDims, build_vit
from pruning.align import align_
from pruning.allocation import BINS, Candidates, Options, allocate, interpolate, knapsack, least_cost
from pruning.config import PruningConfig
from pruning.moments import PLAIN_RIDGE
from pruning.probe import FITTED, JUDGED, block_curves, embed_curve, measure_prices, widths_to_probe

FULL = ViTDims(32, (BlockDims(4, 8, 8, 128, 18),) * 2)
GROUPS = PruningConfig().group_sizes(FULL)


@pytest.fixture
def table():
    """Seconds proportional to the widths, branch by branch."""

    def attention(e, h, q, v):
        return 1e-6 * e * (h * 2 * (q + v) + 10)

    points = dict(e=(4, 32), h=(1, 4), q=(1, 8), v=(1, 8), m=(1, 128))
    seconds = {
        f"attention/EMB_{e}/QK_{h}_{q}/V_{v}": attention(e, h, q, v)
        for e, h, q, v in product(*(points[k] for k in "ehqv"))
    }
    seconds |= {f"mlp/EMB_{e}/MLP_{m}": 1e-6 * e * (2 * m + 10) for e, m in product(points["e"], points["m"])}
    seconds |= {f"overhead/EMB_{e}": 1e-6 * e for e in points["e"]}
    return LatencyTable.of_parts(seconds, {})


def curves(heads=1.0, qk=1.0, v=1.0, mlp=1.0):
    """Prices that halve the divergence with every step up."""
    return dict(
        heads={0: heads, 1: heads / 2, 2: heads / 8, 4: 0.0},
        qk={1: qk, 4: qk / 16, 8: 0.0},
        v={1: v, 4: v / 16, 8: 0.0},
        mlp={0: 4 * mlp, 16: mlp, 64: mlp / 16, 128: 0.0},
    )


EMBED = {8: 1.0, 16: 0.1, 24: 0.01, 32: 0.0}


def test_interpolation_meets_the_probes_and_falls_with_the_width():
    curve = {8: 1e-2, 16: 1e-4, 24: 2e-4, 32: 0.0, 0: 3.0}
    found = interpolate(curve, np.arange(4, 33, 4))
    assert found[1] == pytest.approx(1e-2, rel=1e-4) and found[-1] < 1e-12
    assert (np.diff(found) <= 0).all() and found[0] > found[1]
    assert found[2] == pytest.approx((1e-2 * 2e-4) ** 0.5, rel=1e-2)  # noise at 16 is taken for the value at 24


def test_the_knapsack_is_exact():
    rng = np.random.default_rng(0)
    options = [
        Options(np.zeros((6, 4)), np.sort(rng.uniform(1, 9, 6)), np.sort(rng.uniform(0, 1, 6))[::-1]) for _ in range(4)
    ]
    least = sum(o.seconds[0] for o in options)
    for budget in (1.1 * least, 1.5 * least, 2 * least, 99.0):
        chosen, cost = knapsack(options, budget)
        best = min(
            sum(o.cost[k] for o, k in zip(options, ks, strict=True))
            for ks in product(range(6), repeat=4)
            if sum(o.seconds[k] for o, k in zip(options, ks, strict=True)) <= budget
        )
        assert cost == pytest.approx(best)
        assert sum(o.seconds[k] for o, k in zip(options, chosen, strict=True)) <= budget
        assert cost * 0.5 < least_cost(options, budget) <= cost * (1 + 1e-9)
    assert least_cost(options, 0.9 * least) == least_cost(options, 0.0) == np.inf
    with pytest.raises(ValueError, match="budget"):
        knapsack(options, 0.9 * least)
    with pytest.raises(ValueError, match="no time"):
        knapsack(options, 0.0)


def test_times_are_rounded_up():
    """40 blocks, each of 0.9 units above a five-hundredth of them: rounded down, they would fit the budget."""
    unit = 1.0
    block = Options(np.zeros((2, 4)), np.array([400.0, BINS / 40 + 0.9]) * unit, np.array([1.0, 0.0]))
    chosen, cost = knapsack([block] * 40, BINS * unit)
    assert sum(block.seconds[k] for k in chosen) <= BINS * unit and cost == chosen.count(0) == 1


def test_narrower_queries_and_values_cost_what_heads_are_left():
    """Prices are of all heads: with h of H left, a cut of qk or v costs h / H of its own."""
    known, group = curves(heads=0.8, qk=0.3, v=0.2, mlp=0.1), dict(heads=1, qk=4, v=4, mlp=64)
    widths, cost = Candidates.of(FULL.blocks[0], group, known).combine()
    for row, found in zip(widths.tolist(), cost.tolist(), strict=True):
        heads, qk, v, mlp, tokens = row
        if heads in (1, 2, 4) and mlp:
            cut = known["heads"][heads] + (known["qk"][qk] + known["v"][v]) * heads / 4 + known["mlp"][mlp]
            assert found == pytest.approx(cut, rel=1e-6, abs=1e-8) and tokens == 18
    assert len(widths) == (1 + 4 * 2 * 2) * (1 + 2)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
def test_the_target_is_met_closely_from_below(table, target):
    found = allocate(table, FULL, GROUPS, [curves(), curves()], EMBED, target)
    assert all(table.ratio(dims, FULL) <= target for dims, _ in found)
    assert table.ratio(found[0][0], FULL) > target - 0.02
    assert [price for _, price in found] == sorted(price for _, price in found)
    assert all(b.mlp % GROUPS["blocks.0.mlp"] == 0 and b.heads for b in found[0][0].blocks)


@pytest.mark.parametrize("full", [FULL, FULL.with_queries(2)], ids=["every token", "lean"])
def test_branches_that_are_looked_up_apart_give_the_same_widths(table, full, monkeypatch):
    """With token counts too, and nothing that a bound or dominance leaves out would have been better."""
    tokens = {18: 0.0, 10: 0.01, 6: 0.2}
    seconds = {
        f"attention/N_{n}/EMB_{e}/QK_{h}_{q}/V_{v}": 1e-6 * e * n * (h * 2 * (q + v) + n)
        for n, e, h, q, v in product((6, 18), (4, 32), (1, 4), (1, 8), (1, 8))
    }
    seconds |= {
        f"mlp/N_{n}/EMB_{e}/MLP_{m}": 1e-6 * e * n * (2 * m + 10) for n, e, m in product((6, 18), (4, 32), (1, 128))
    }
    seconds |= {f"tokens/N_{n}/EMB_{e}": 1e-6 * e * n for n, e in product((6, 18), (4, 32))}
    table = LatencyTable.of_parts(seconds, {})
    known = [curves() | dict(tokens=tokens), curves(2.0, 0.5, 3.0, 0.1) | dict(tokens=tokens)]
    for target in (0.6, 0.3):
        quick = allocate(table, full, GROUPS, known, EMBED, target)
        with monkeypatch.context() as patch:
            patch.setattr(LatencyTable, "branches_apart", False)
            patch.setattr("pruning.allocation.least_cost", lambda options, budget: -np.inf)
            slow = allocate(table, full, GROUPS, known, EMBED, target)
        assert quick[0] == slow[0] and {pair[0] for pair in quick} <= {pair[0] for pair in slow}
        assert {b.tokens for b in quick[0][0].blocks} <= set(tokens)


def test_what_a_lean_last_block_saves_goes_to_other_widths(table):
    """The MLP of a block of which two of 18 tokens pass it is nearly free."""
    (plain, price), *_ = allocate(table, FULL, GROUPS, [curves(), curves()], EMBED, 0.3)
    (lean, better), *_ = allocate(table, FULL.with_queries(2), GROUPS, [curves(), curves()], EMBED, 0.3)
    assert lean.blocks[-1].queries == 2 and lean.blocks[0].queries is None
    assert 0.28 < table.ratio(lean, FULL) <= 0.3 < table.ratio(lean.with_queries(None), FULL)
    assert better < price / 2 and lean.blocks[1].mlp > lean.blocks[0].mlp >= plain.blocks[0].mlp


def test_nothing_goes_where_there_is_time_for_everything(table):
    (dims, price), *_ = allocate(table, FULL, GROUPS, [curves(), curves()], EMBED, 1.001)
    assert dims == FULL and price < 1e-12


def test_what_is_worth_nothing_goes_first(table):
    (dims, _), *_ = allocate(table, FULL, GROUPS, [curves(), curves(1e-10, 1e-10, 1e-10, 1e-10)], EMBED, 0.3)
    assert dims.blocks[1].heads == dims.blocks[1].mlp == 0  # the whole block
    assert dims.blocks[0].mlp >= 64 and dims.blocks[0].heads >= 3


def test_a_target_that_no_widths_meet_has_no_answer(table):
    assert allocate(table, FULL, GROUPS, [curves(), curves()], EMBED, 1e-4) == []


def test_probed_widths_are_multiples_of_the_group():
    assert widths_to_probe(128, 16) == [16, 32, 64, 96]
    assert widths_to_probe(3, 1) == [1, 2]
    assert widths_to_probe(1, 1) == []


def test_probes_see_what_a_model_does_not_need(tiny, randomise):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    first, second = model.blocks
    first.mlp.fc2.weight[:, 32:] = 0.0  # a quarter of the units is in use
    second.attn.proj.weight[:, 8:] = 0.0  # one head
    second.mlp.fc2.weight.zero_(), second.mlp.fc2.bias.zero_()
    images = torch.randn(160, 3, 16, 16)
    align_(model, images.split(32))
    groups = PruningConfig().group_sizes(model.dims)
    found = block_curves(model, images[:128], images[128:], groups, 32)
    assert [sorted(c["mlp"]) for c in found] == [[0, 16, 32, 64, 96, 128]] * 2
    assert max(found[0]["mlp"][w] for w in (32, 64, 96)) < 1e-5 < found[0]["mlp"][16] < found[0]["mlp"][0]
    assert max(found[1]["heads"][w] for w in (1, 2, 3)) < 1e-5 < found[1]["heads"][0]
    assert found[1]["mlp"][0] < 1e-6
    for axis in ("qk", "v"):
        prices = [found[0][axis][w] for w in sorted(found[0][axis])]
        assert prices == sorted(prices, reverse=True) and prices[0] > 1e-5
    prices = embed_curve(model, images[:128], images[128:], groups["embed"], 32)
    assert sorted(prices) == [8, 16, 24, 32] and prices[8] > prices[16] > prices[24] > prices[32] == 0


@pytest.mark.parametrize("index, width", [(0, 64), (1, 32)])
def test_a_price_is_of_images_that_compensated_nothing(tiny, randomise, index, width):
    """An MLP cut to its first units, compensated by ridge regression and judged by hand, in float64."""
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images = torch.randn(160, 3, 16, 16)
    found = measure_prices(model, images, PruningConfig().group_sizes(model.dims), 16)[0][index]["mlp"]
    exact, images = copy.deepcopy(model).double(), images.double()
    fit, judge = images[: len(images) // FITTED], images[-(len(images) // JUDGED) :]
    block, read = exact.blocks[index], slice(None) if index == 0 else slice(2)

    def hidden(images):
        x = exact.blocks[:index](exact._pos_embed(exact.patch_embed(images)))
        x = x + block.attn(block.norm1(x))
        return x, block.mlp.act(block.mlp.fc1(block.norm2(x)))

    def price(x, h, weight, bias):
        logits = exact.forward_head(exact.norm(exact.blocks[index + 1 :](x + h @ weight.T + bias))).log_softmax(1)
        dense = exact(judge).log_softmax(1)
        return float((dense.exp() * (dense - logits)).sum(1).mean())

    h = hidden(fit)[1][:, read].flatten(0, 1)
    mean, (kept, cut) = h.mean(0), (h - h.mean(0)).tensor_split([width], 1)
    ridge = (PLAIN_RIDGE * kept.square().sum(0)).sqrt().diag()
    carried = torch.linalg.lstsq(
        torch.cat([kept, ridge]), torch.cat([cut, cut.new_zeros(width, cut.shape[1])])
    ).solution
    weight = block.mlp.fc2.weight[:, :width] + block.mlp.fc2.weight[:, width:] @ carried.T
    bias = block.mlp.fc2.bias + block.mlp.fc2.weight @ mean - weight @ mean[:width]
    x, h = hidden(judge)
    assert found[width] == pytest.approx(price(x, h[..., :width], weight, bias), rel=1e-3)
    assert found[0] == pytest.approx(price(x, h, 0 * block.mlp.fc2.weight, 0.0), rel=1e-3)
