"""Selection by saliency per second: scale, steps of a device, whole branches, and the exact last event."""

from itertools import product

import pytest
import torch

from latency.table import LatencyTable
from models import BlockDims, Masks, ViTDims
from pruning.config import PruningConfig
from pruning.global_latency import narrow
from pruning.value import ValuePruner

DENSE = ViTDims(32, (BlockDims(4, 8, 8, 128, 18),) * 2)


def table_of(attention=lambda e, h, q, v: e * h * 2 * (q + v) + 400 * (h > 0), widths=(1, 8), outside=1e-6):
    """Seconds by branch; an attention branch costs something at any width."""
    points = dict(e=(4, 32), h=(1, 2, 3, 4), q=widths, v=widths, m=(1, 128))
    seconds = {
        f"attention/EMB_{e}/QK_{h}_{q}/V_{v}": 1e-6 * attention(e, h, q, v)
        for e, h, q, v in product(*(points[k] for k in "ehqv"))
    }
    seconds |= {f"mlp/EMB_{e}/MLP_{m}": 1e-6 * e * (2 * m + 10) for e, m in product(points["e"], points["m"])}
    return LatencyTable.of_parts(seconds | {f"overhead/EMB_{e}": outside * e for e in points["e"]}, {})


def pruner(table=None, dims=DENSE, **options):
    settings = dict(regularization=0.0, target=None, per_event=4) | options
    return ValuePruner(Masks(dims), table or table_of(), PruningConfig().group_sizes(DENSE), **settings)


def scores(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {a: scale * torch.rand(n, generator=generator, dtype=torch.float64) for a, n in DENSE.sizes().items()}


def run(p, found, events=400):
    for _ in range(events):
        event = p.event(found)
        if event.reached or not event.groups:
            return event
    raise AssertionError("no end")


def test_the_scale_of_the_saliency_does_not_matter():
    ends = []
    for scale in (1.0, 1e-9):
        p = pruner(target=0.5)
        assert run(p, scores(scale=scale)).reached and 0.45 < p.ratio <= 0.5
        ends.append(p.masks.state_dict())
    assert all(torch.equal(ends[0][axis], ends[1][axis]) for axis in ends[0])


@pytest.mark.parametrize("queries", [None, 2])
def test_a_lean_last_block_does_not_end_below_the_target(queries):
    p = pruner(target=0.5, dims=DENSE.with_queries(queries))
    assert run(p, scores()).reached and 0.49 < p.ratio <= 0.5


def test_the_cheapest_saliency_per_second_goes_first():
    """A hidden unit costs 64 microseconds, a value channel of four heads 256: at three times the saliency it goes."""
    even = {axis: torch.full((n,), 9.0, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    for axis in ("embed", "blocks.0.heads", "blocks.1.heads"):
        even[axis] += 999
    even["blocks.1.mlp"] = torch.ones(128, dtype=torch.float64)
    even["blocks.0.v"] = torch.full((8,), 3.0, dtype=torch.float64)
    first = pruner().ranking(even)[0]
    assert first.axis == "blocks.0.v"
    even["blocks.0.v"] *= 2
    assert pruner().ranking(even)[0].axis == "blocks.1.mlp"


@pytest.mark.parametrize("share, first", [(0.99, "embed"), (1.01, "blocks.0.v")])
def test_the_embedding_also_saves_what_is_outside_the_blocks(share, first):
    """Saliency in proportion to the seconds of a whole model that a unit saves, with one per cent between two axes."""
    table = table_of(outside=1e-4)
    found = {axis: torch.full((n,), 9.0, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    for axis, size, weight in (("embed", 4, share), ("blocks.0.v", 1, 1.0)):
        saved = table.model_seconds(DENSE) - table.model_seconds(narrow(DENSE, axis, size))
        found[axis] = torch.full_like(found[axis], weight * saved / size)
    assert pruner(table).ranking(found)[0].axis == first


def test_a_branch_that_is_worth_nothing_goes_whole_and_its_base_cost_with_it():
    found = scores()
    found["blocks.0.heads"] *= 1e-6
    p = pruner(target=0.7)
    run(p, found)
    assert p.masks.dims.blocks[0].heads == 0 and p.masks.dims.blocks[1].heads > 0
    assert p.ratio == p.table.ratio(p.masks.dims, DENSE) <= 0.7


def test_a_block_may_go_altogether_and_then_costs_nothing():
    found = scores()
    for axis in ("blocks.1.heads", "blocks.1.mlp"):
        found[axis] *= 1e-9
    p = pruner(target=0.45)
    run(p, found)
    assert (p.masks.dims.blocks[1].heads, p.masks.dims.blocks[1].mlp) == (0, 0)
    assert p.table.block_seconds(p.masks.dims.embed, p.masks.dims.blocks[1]) == 0


def test_a_step_of_the_device_is_crossed_by_several_groups_at_once():
    """Two query channels of eight save nothing, four do."""
    table = table_of(lambda e, h, q, v: e * h * 2 * ((8 if q > 4 else 4 if q > 1 else 1) + v), (1, 4, 5, 8))
    even = {axis: torch.full((n,), 9.0, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    even["blocks.0.qk"] *= 1e-3
    group = pruner(table).ranking(even)[0]
    assert group.axis == "blocks.0.qk" and len(group.units) >= 4


@pytest.mark.parametrize("target", [0.7, 0.4])
def test_the_last_event_is_no_worse_than_greedy(target, monkeypatch):
    lost = []
    for exact in (True, False):
        p = pruner(target=target, per_event=1000)
        if not exact:
            monkeypatch.setattr(p, "_solve", lambda *_: None)
        event = run(p, found := scores())
        assert event.ratio <= target and event.ratio == p.ratio
        lost.append(sum(float(found[axis][~keep].sum()) for axis, keep in p.masks.keep.items()))
        for group in event.groups:  # what an event says it removed is what the masks lack
            assert not p.masks.keep[group.axis][group.units].any()
    assert lost[0] <= lost[1] * 1.05


def test_floors_caps_and_bad_scores():
    p = pruner(per_event=10_000)
    assert p.event(scores()).groups and p.masks.dims.embed == p.floor().embed
    assert not any(b.heads or b.mlp for b in p.masks.dims.blocks)
    assert not p.event(scores()).groups
    p = pruner(per_event=10_000, cap=40)
    p.event(scores())
    assert 0 < p.removed <= 40
    bad = scores()
    bad["blocks.0.qk"][2] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.qk is not finite"):
        pruner().event(bad)
