"""Selection: ranking, groups, floors, and the stop at the target."""

import json

import numpy as np
import pytest
import torch
from jobs import token_table

from latency.table import LatencyTable
from models import Arch, BlockDims, Masks, ViTDims, macs, params
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner, latency_per_unit, narrow
from pruning.targets import targets_of

DENSE = ViTDims(32, (BlockDims(4, 8, 8, 128, 18),) * 2)


def seconds(embed, heads, qk, v, mlp):
    """A latency linear in each width, so that the table is exact everywhere."""
    return 1e-6 * embed * (heads * (2 * qk + 2 * v) + 2 * mlp + 10)


@pytest.fixture
def table(tmp_path):
    widths = dict(e=(8, 32), h=(1, 4), q=(1, 8), m=(1, 128))
    data = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {f"V_{v}": {f"MLP_{m}": seconds(e, h, q, v, m) for m in widths["m"]} for v in widths["q"]}
            for h in widths["h"]
            for q in widths["q"]
        }
        for e in widths["e"]
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    return LatencyTable.load(path)


def pruner(table, **options):
    settings = dict(regularization=0.0, target=None, per_event=4) | options
    return GlobalPruner(Masks(DENSE), table, PruningConfig().group_sizes(DENSE), **settings)


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.rand(n, generator=generator, dtype=torch.float64) for axis, n in DENSE.sizes().items()}


def test_group_sizes_are_at_most_an_eighth_of_the_axis():
    """Rounded up: the published DeiT-B loses heads in twos, as its code says."""
    sizes = PruningConfig().group_sizes(DENSE)
    assert (sizes["embed"], sizes["blocks.0.heads"], sizes["blocks.1.qk"], sizes["blocks.1.mlp"]) == (4, 1, 1, 16)
    big = ViTDims(768, (BlockDims(12, 64, 64, 3072, 198),))
    assert list(PruningConfig().group_sizes(big).values()) == [16, 2, 8, 8, 16]
    small = ViTDims(192, (BlockDims(3, 64, 64, 768, 198),))
    assert list(PruningConfig().group_sizes(small).values()) == [16, 1, 8, 8, 16]


def test_latency_per_unit_is_the_slope_of_the_table(table):
    costs = latency_per_unit(table, DENSE, PruningConfig().group_sizes(DENSE))
    for axis in ("blocks.0.heads", "blocks.1.qk", "blocks.0.v", "blocks.1.mlp", "embed"):
        less = narrow(DENSE, axis, 1)
        assert costs[axis] == pytest.approx(table.model_seconds(DENSE) - table.model_seconds(less), rel=1e-6)


@pytest.mark.parametrize("queries", [None, 2])
def test_the_embedding_also_costs_what_is_outside_the_blocks(queries):
    table, sizes, dims = token_table(), PruningConfig().group_sizes(DENSE), DENSE.with_queries(queries)
    less = narrow(dims, "embed", sizes["embed"])
    assert table.overhead_seconds(less.embed) < table.overhead_seconds(DENSE.embed)
    saved = table.model_seconds(dims) - table.model_seconds(less)
    assert latency_per_unit(table, dims, sizes)["embed"] == pytest.approx(saved / sizes["embed"], rel=1e-9)


@pytest.mark.parametrize("queries", [2, 18])
def test_a_lean_last_block_is_priced_as_it_is(table, queries):
    """Of one that lets 2 of 18 tokens ask, a unit costs less; if all ask, it is any other block."""
    sizes, dims = PruningConfig().group_sizes(DENSE), DENSE.with_queries(queries)
    costs = latency_per_unit(table, dims, sizes)
    before = table.model_seconds(dims)
    for axis in ("blocks.0.heads", "blocks.1.mlp", "embed"):
        less = table.model_seconds(narrow(dims, axis, sizes[axis]))
        assert costs[axis] == pytest.approx((before - less) / sizes[axis], rel=1e-6)
    assert (costs["blocks.1.mlp"] < 0.5 * costs["blocks.0.mlp"]) == (queries == 2)


def test_targets_of_a_lean_model(table):
    """MACs are a share of the dense model's, whose last block is not lean; milliseconds are those of the lean one."""
    arch, lean = "deit_tiny_distilled_patch16_224", KWARGS | dict(lean_last=True)
    latency, count = targets_of(DENSE, table, Arch.of(arch, **lean), latency_ms=9.0, macs_=0.5)
    assert latency.measure(own := DENSE.with_queries(2)) == pytest.approx(1e3 * table.model_seconds(own))
    assert table.model_seconds(own) < table.model_seconds(DENSE)
    assert count.limit == 0.5 * macs(arch, DENSE, **KWARGS) and count.measure(DENSE) == macs(arch, DENSE, **lean)


def test_an_event_removes_the_lowest_groups_by_score_sum(table):
    scores = random_scores()
    event = pruner(table, per_event=5).event(scores)
    sizes = PruningConfig().group_sizes(DENSE)
    everything = sorted(
        float(group.sum())
        for axis, s in scores.items()
        for group in s.sort().values[: len(s) - sizes[axis]].split(sizes[axis])
    )
    assert [g.score for g in event.groups] == pytest.approx(everything[:5])


def test_dear_axes_go_first_when_latency_counts(table):
    scores = {axis: torch.ones(n, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    costs = latency_per_unit(table, DENSE, PruningConfig().group_sizes(DENSE))
    event = pruner(table, per_event=1, regularization=1e6).event(scores)
    groups = PruningConfig().group_sizes(DENSE)
    assert event.groups[0].axis == max(costs, key=lambda axis: costs[axis] * groups[axis])


def test_floors_hold_and_removed_units_never_return(table):
    run, seen = pruner(table, per_event=7), []
    for seed in range(200):
        event = run.event(random_scores(seed))
        seen += [(g.axis, int(u)) for g in event.groups for u in g.units]
        if not event.groups:
            break
    assert len(seen) == len(set(seen))
    assert run.masks.dims == run.floor()


def test_remainder_goes_first_so_that_widths_become_multiples(table):
    run = pruner(table)
    run.masks.remove("blocks.0.mlp", torch.arange(3))  # 125 left, groups of 16
    group = next(g for g in run.ranking(random_scores()) if g.axis == "blocks.0.mlp")
    assert len(group.units) == 125 % 16


@pytest.mark.parametrize(
    ("target", "steps"), [(0.9, 2), (0.7, 2), (0.5, 2), (0.3, 6)]
)  # few small steps are left at 0.3
def test_the_target_is_met_closely_and_the_run_stops_there(table, target, steps):
    run = pruner(table, target=target, per_event=3)
    for seed in range(1000):
        before = run.ratio
        event = run.event(random_scores(seed))
        if event.reached:
            break
        assert event.ratio > target
    assert event.reached and event.ratio <= target < before
    smallest = min(
        table.ratio(DENSE, DENSE) - table.ratio(narrow(DENSE, axis, size), DENSE)
        for axis, size in run.group_sizes.items()
    )
    assert target - event.ratio <= steps * smallest


def test_the_last_group_is_the_closest_of_the_lowest_ranked(table):
    run = pruner(table, target=0.999, per_event=10)
    event = run.event(random_scores())
    possible = [table.ratio(narrow(DENSE, axis, size), DENSE) for axis, size in run.group_sizes.items()]
    assert event.reached and event.ratio == pytest.approx(max(r for r in possible if r <= 0.999))


def test_a_group_that_would_overshoot_waits_for_narrower_ones(table):
    """Removing embedding alone would land 3 % below the target; the MLP gets there exactly enough."""
    scores = {axis: torch.full((n,), 1.0, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    scores["embed"].zero_()
    run = pruner(table, target=0.86, per_event=1)
    while not (event := run.event(scores)).reached:
        assert event.groups
    assert run.masks.alive("embed") == 28 and 0.86 * 0.99 < event.ratio <= 0.86


KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)


@pytest.mark.parametrize(
    "limits",
    [
        dict(latency_ms=9.0),
        dict(macs_=0.5),
        dict(params_=0.4),
        dict(params_=9000.0),
        dict(macs_=0.6, params_=0.3, latency_ms=14.0),
    ],
)
def test_every_kind_of_target_is_met_from_above(table, limits):
    arch = "deit_tiny_distilled_patch16_224"
    targets = targets_of(DENSE, table, Arch.of(arch, **KWARGS), **limits)
    run = pruner(table, targets=targets, per_event=2)
    for seed in range(1000):
        before = run.masks.dims
        if run.event(random_scores(seed)).reached:
            break
    assert run.reached and run.excess(before) > 1 and 0.9 < run.excess(run.masks.dims) <= 1
    counts = dict(
        latency_ms=1e3 * table.model_seconds(run.masks.dims),
        macs_=macs(arch, run.masks.dims, **KWARGS),
        params_=params(arch, run.masks.dims, **KWARGS),
    )
    dense = dict(latency_ms=1, macs_=macs(arch, DENSE, **KWARGS), params_=params(arch, DENSE, **KWARGS))
    for name, limit in limits.items():
        assert counts[name] <= limit * (dense[name] if limit <= 1 else 1)


def test_a_target_below_the_floors_says_what_can_be_reached(table):
    run = pruner(table)
    (target,) = targets_of(DENSE, table, Arch.of("deit_tiny_distilled_patch16_224", **KWARGS), params_=500.0)
    lowest = params("deit_tiny_distilled_patch16_224", run.floor(), **KWARGS)
    with pytest.raises(ValueError, match=rf"--params_target 500 is below {lowest} parameters"):
        target.check_reachable(run.floor())


def test_widths_end_at_multiples():
    sizes = PruningConfig().group_sizes(DENSE, multiple=6)
    assert (sizes["embed"], sizes["blocks.0.heads"], sizes["blocks.1.qk"], sizes["blocks.1.mlp"]) == (6, 1, 6, 18)
    assert PruningConfig().group_sizes(DENSE, multiple=100)["blocks.0.qk"] == 8  # the whole axis: it stays


def test_the_cap_limits_what_is_removed(table):
    run = pruner(table, cap=20, per_event=100)
    assert run.event(random_scores()).groups and run.removed <= 20
    while run.event(random_scores()).groups:
        pass
    assert run.removed <= 20


def test_noise_in_a_table_never_rewards_keeping(table):
    data = json.loads(json.dumps(table.data))
    for by_v in data["EMB_32"].values():
        for by_m in by_v.values():
            by_m["MLP_128"] = by_m["MLP_1"] / 2  # the widest MLP came out quickest
    noisy, sizes = LatencyTable(data), PruningConfig().group_sizes(DENSE)
    widths = np.array([[32, 4, 8, 8, 128], [32, 4, 8, 8, 64]], dtype=float)
    assert np.diff(noisy.blocks_seconds(widths))[0] > 0  # raw: narrower is slower
    costs = latency_per_unit(noisy, DENSE, sizes)
    assert min(costs.values()) >= 0 and costs["blocks.0.mlp"] == 0 < costs["blocks.0.heads"]


def test_at_its_floor_an_axis_costs_nothing(table):
    sizes = PruningConfig().group_sizes(DENSE)
    floor = pruner(table).floor()
    assert set(latency_per_unit(table, floor, sizes).values()) == {0.0}


def test_scores_that_are_not_finite_stop_the_event(table):
    scores = random_scores() | {"blocks.1.v": torch.full((8,), float("nan"), dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"blocks\.1\.v"):
        pruner(table).event(scores)
