"""Latency tables of Swin Transformers: the sum of their stages, files, measurements; and pruning by them."""

from __future__ import annotations

import json

import pytest
import torch
from swin_parts import ARCH, DENSE, SMALL, attention, merging, mlp, outside, parts

from latency import LatencyTable, LatencyTableError
from latency.build_table import get_args_parser, main
from latency.fit import choose_models, correct
from latency.quick import measure_table
from latency.swin_bench import SwinBench
from models import Arch, BlockDims, Masks, SwinDims, ViTDims, skeleton
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner, latency_per_unit, narrow
from pruning.targets import targets_of


def expected(dims):
    total = merging(dims.stages[0].embed, dims.stages[1].embed)
    for i, stage in enumerate(dims.stages):
        total += outside(i, stage.embed)
        for b in stage.blocks:
            total += attention(i, stage.embed, b.heads, b.qk, b.v) if b.heads else 0
            total += mlp(i, stage.embed, b.mlp) if b.mlp else 0
    return total


@pytest.fixture
def table(tmp_path):
    LatencyTable.of_parts(parts(), dict(batch=16, tokens=[64, 16])).save(tmp_path / "table.json")
    return LatencyTable.load(tmp_path / "table.json")


def pruner(table, **options):
    settings = dict(regularization=0.0, target=None, per_event=4) | options
    sizes = PruningConfig(group_size=dict(embed=16, heads=2, qk=8, v=8, mlp=8)).group_sizes(DENSE)
    return GlobalPruner(Masks(DENSE), table, sizes, **settings)


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.rand(n, generator=generator, dtype=torch.float64) for axis, n in DENSE.sizes().items()}


def test_a_model_is_its_stages_and_what_lies_between(table):
    assert table.is_staged and table.meta["batch"] == 16
    small = DENSE.resized({"layers.0.embed": 7, "layers.1.embed": 21, "layers.0.blocks.0.heads": 0})
    small = small.resized({"layers.0.blocks.1.qk": 3, "layers.1.blocks.0.v": 5, "layers.1.blocks.1.mlp": 0})
    for dims in (DENSE, small):
        assert table.model_seconds(dims) == pytest.approx(expected(dims), rel=1e-4)
    assert table.ratio(small, DENSE) == pytest.approx(expected(small) / expected(DENSE), rel=1e-4)
    assert table.monotone_report().raised == 0
    table.check_covers(small)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: ViTDims(16, (BlockDims(2, 8, 8, 64, 64),)), "measured on a Swin .* of 2 stages but .* no stages"),
        (lambda d: SwinDims(d.stages[:1]), "of 2 stages but the model has 1 stages"),
        (lambda d: d.resized({"layers.0.embed": 17}), "STAGE_0: the table goes up to EMB_16 but the model has 17"),
        (lambda d: SwinDims.of(skeleton(ARCH, **SMALL | dict(img_size=32))), "measured with 64 tokens but .* has 256"),
    ],
)
def test_a_model_that_it_does_not_cover_is_refused(table, change, message):
    with pytest.raises(LatencyTableError, match=message):
        table.check_covers(change(DENSE))


def test_one_token_count_for_all_stages_checks_nothing(table):
    scalar = LatencyTable(table.data | dict(_meta=table.meta | dict(tokens=7)))
    scalar.check_covers(DENSE)


def test_a_table_of_a_plain_vit_is_refused(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"EMB_8": {"QK_1_8": {"V_8": {"MLP_8": 1.0}}}}))
    with pytest.raises(LatencyTableError, match="measured on a plain ViT but the model has 2 stages"):
        LatencyTable.load(tmp_path / "t.json").check_covers(DENSE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("STAGE_0"), "STAGE_1 is not a key of a table of 1 stages"),
        (lambda d: d.update(STAGE_1=[]), "STAGE_1 must be an object"),
        (lambda d: d["STAGE_1"].pop("_merging"), "STAGE_1 lacks _merging"),
        (lambda d: d["STAGE_1"]["_merging"]["EMB_1"].pop("OUT_1"), "hole in the grid: STAGE_1 -> _merging -> EMB_1"),
        (lambda d: d["STAGE_0"]["_parts"]["mlp"]["EMB_1"].update(MLP_1="x"), "MLP_1 must be a finite number"),
        (lambda d: d.update(_meta=5), "_meta must be an object"),
        (lambda d: d["_meta"].update(complete=False), "the table is incomplete"),
    ],
)
def test_a_damaged_table_is_refused_in_a_line(tmp_path, change, message):
    data = json.loads(json.dumps(LatencyTable.of_parts(parts(), dict(tokens=[64, 16])).data))
    change(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(LatencyTableError, match=message) as refused:
        LatencyTable.load(tmp_path / "t.json")
    assert str(refused.value).startswith(f"{tmp_path / 't.json'}: ") and "\n" not in str(refused.value)


def test_correction_scales_all_and_adds_once(table):
    found = correct(table, 1.5, 0.25, note="x")
    assert found.model_seconds(DENSE) == pytest.approx(1.5 * table.model_seconds(DENSE) + 0.25, rel=1e-5)
    assert found.meta["note"] == "x" and found.meta["batch"] == 16


def test_models_for_the_fit_have_every_stage_from_narrow_to_full():
    chosen = choose_models(DENSE, count=5)
    for i, full in enumerate((16, 32)):
        embeds = [dims.stages[i].embed for dims in chosen]
        assert embeds == sorted(embeds) and embeds[0] <= full // 8 and embeds[-1] == full
    assert len({dims.stages[1].blocks for dims in chosen}) == 5


def test_latency_per_unit_is_the_slope_of_the_table(table):
    """Of a stage's embedding too, which the downsampling on both sides has."""
    costs = latency_per_unit(table, DENSE, PruningConfig().group_sizes(DENSE))
    assert costs.keys() == DENSE.sizes().keys()
    for axis in costs:
        less = narrow(DENSE, axis, 1)
        assert costs[axis] == pytest.approx(expected(DENSE) - expected(less), rel=1e-3), axis
    assert costs["layers.0.blocks.0.mlp"] == pytest.approx(3 / 2 * costs["layers.1.blocks.0.mlp"], rel=1e-3)


@pytest.mark.parametrize("target", [0.75, 0.5, 0.3])
def test_all_stages_are_pruned_until_the_target_is_met(table, target):
    run, scores = pruner(table, target=target, regularization=1e-3), random_scores()
    run.targets[0].check_reachable(run.floor())
    while not run.reached:
        event = run.event(scores)
        assert event.groups
    assert target * 0.98 < run.ratio <= target and table.ratio(run.masks.dims, DENSE) == run.ratio
    cut = {axis.rsplit(".", 1)[0] for axis, n in DENSE.sizes().items() if run.masks.alive(axis) < n}
    assert {axis.split(".")[1] for axis in cut} == {"0", "1"}


def test_the_floor_leaves_one_group_of_every_axis(table):
    run = pruner(table)
    assert run.floor().sizes() == run.group_sizes
    while run.event(random_scores()).groups:
        pass
    assert run.masks.dims == run.floor()


def test_the_cheaper_unit_goes_where_saliency_is_equal(table):
    """What the same score buys counts: the slower stage loses its MLP units first."""
    equal = {axis: torch.full((n,), 1e-9, dtype=torch.float64) for axis, n in DENSE.sizes().items()}
    ranked = [g.axis for g in pruner(table, regularization=1.0).ranking(equal) if g.axis.endswith("mlp")]
    assert ranked[0].startswith("layers.0.") and ranked[-1].startswith("layers.1.")


def test_other_targets_count_a_swin(table):
    macs_, params_ = targets_of(DENSE, table, Arch.of(ARCH, **SMALL), macs_=0.5, params_=0.25)
    assert macs_.measure(DENSE) == 2 * macs_.limit and params_.measure(DENSE) == 4 * params_.limit


def test_a_swin_of_one_stage_is_measured_by_stage():
    one = Arch.of(ARCH, **SMALL | dict(depths=[2], num_heads=[2]))
    table = measure_table(one, 2)
    assert [*table.data] == ["_meta", "STAGE_0"] and table.meta["tokens"] == [one.dims.stages[0].blocks[0].tokens]
    table.check_covers(one.dims)


def test_the_bench_measures_every_part_through_the_modules_of_the_compact_model():
    grids = {f"STAGE_{i}": dict(embed=[8, e], heads=[1], qk=[4], v=[8], mlp=[32]) for i, e in enumerate((16, 32))}
    bench = SwinBench(Arch.of(ARCH, **SMALL), grids, batch=2, device="cpu", dtype="fp32", compiled=False)
    kinds = [key[1] for key in bench.keys]
    assert {kind: kinds.count(kind) for kind in kinds} == dict(attention=4, mlp=4, merging=4, overhead=4)
    for key in bench.keys:
        module, x, others, stream = bench._points[key]
        assert module(x).shape[0] == 2 and others and others[0](stream).shape == stream.shape, key
    pair = bench._points["STAGE_0", "attention", "EMB_16", "QK_1_4", "V_8"][0]
    assert [block.shift_size for block in pair] == [(0, 0), (2, 2)]
    assert pair[0].attn.scale == 8**-0.5 and (pair[0].dims.qk, pair[0].dims.v, pair[0].dims.mlp) == (4, 8, 0)
    assert bench._points["STAGE_1", "overhead", "EMB_32"][0](torch.randn(2, 4, 4, 32)).shape == (2, 10)
    assert all(seconds > 0 for key in bench.keys for seconds, _ in bench.samples(key))


def arguments(output, *extra):
    kwargs = [f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in SMALL.items()]
    kwargs = [word.replace(" ", "") for word in kwargs]
    return get_args_parser().parse_args(
        [
            "--model",
            ARCH,
            "--model-kwargs",
            *kwargs,
            "--batch-size",
            "2",
            "--device",
            "cpu",
            "--rounds",
            "2",
            "--points",
            *(f"{axis}=2" for axis in ("embed", "heads", "qk", "v", "mlp")),
            "--output",
            str(output),
            *extra,
        ]
    )


@pytest.mark.slow
def test_build_table_writes_a_table_that_covers_the_model(tmp_path, capsys):
    assert main(arguments(tmp_path / "t.json")) == 0
    assert f"{2 * 2 * (2 * 2 * 2 + 2 + 1) + 4} points in " in capsys.readouterr().out
    table = LatencyTable.load(tmp_path / "t.json")
    table.check_covers(DENSE)
    meta = table.meta
    assert (meta["model"], meta["tokens"], meta["batch"], meta["complete"]) == (ARCH, [64, 16], 2, True)
    assert list(meta["grid"]) == ["STAGE_0", "STAGE_1"] and meta["fit"]["factor"] > 0
    less = choose_models(DENSE)[0]
    assert 0 < table.ratio(less, DENSE) < 1


def test_build_table_refuses_what_is_for_plain_vits(tmp_path, capsys):
    assert main(arguments(tmp_path / "t.json", "--tokens", "40", "--runtime", "onnxruntime")) == 2
    assert "--tokens and --runtime: for plain ViTs, not for swin_tiny" in capsys.readouterr().err
