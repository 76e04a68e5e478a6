"""Pruning without naming a table, end to end, and tables that are not of this run's conditions."""

import json

import pytest
from jobs import PRUNE, interrupted, only, run, table_file

import main_full_global_latency
from latency.table import LatencyTable
from recipes import tables
from runtime.errors import BadArguments


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements that were made; their seconds follow the widths, and a little the number of the measurement."""
    made = []

    def measure(arch, batch_size, device, dtype, by_tokens, progress, wanted):
        made.append((arch.name, batch_size, device, dtype, by_tokens))
        data = json.loads(table_file(tmp_path / "table.json").read_text())
        data["EMB_32"]["QK_4_8"]["V_8"]["MLP_128"] *= 1 + 1e-3 * len(made)
        meta = dict(date="2031-02-03T04:05", batch=batch_size)
        return LatencyTable(data | dict(_meta=meta | quick_meta(arch, batch_size, device, dtype, by_tokens)))

    from latency import cache

    quick_meta = cache.describe_coarse
    monkeypatch.setattr(cache, "measure_table", measure)
    return made


@pytest.fixture
def flags(runs, tmp_path):
    dense = ["--initial-checkpoint", runs["dense"] / "ft_checkpoint.pth"]
    return [
        *PRUNE,
        *dense,
        "--latency_predicted",
        "--table_cache",
        tmp_path / "cache",
        "--output_dir",
        tmp_path / "out",
    ]


def test_one_command_without_a_table(measured, flags, tmp_path, capsys):
    run(main_full_global_latency, *flags, "--latency_batch_size", 4)
    folder = only(tmp_path / "out", "global_prune_*")
    assert measured == [("deit_tiny_distilled_patch16_224", 4, "cpu", "fp32", False)]
    summary = json.loads((folder / "summary.json").read_text())["pruned"]
    assert summary["batch"] == 4 and summary["latency_predicted"] <= 0.6
    kept = only(tmp_path / "cache", "*.json")
    assert LatencyTable.load(kept).data == LatencyTable.load(folder / tables.NAME).data
    said = capsys.readouterr()
    assert f"kept for the next time in {kept}" in said.out and "was measured on" not in said.err
    run(main_full_global_latency, *flags, "--latency_batch_size", 4, "--dry-run")
    assert len(measured) == 1 and f"latency table: {kept}, measured on this device" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_table(measured, flags, tmp_path, monkeypatch):
    """Another measurement gives another table, which could not be resumed with."""
    interrupted(monkeypatch, main_full_global_latency, flags, 3)
    only(tmp_path / "cache", "*.json").unlink()
    run(main_full_global_latency, *flags, "--resume")
    assert len(measured) == 1
    assert (only(tmp_path / "out", "global_prune_*") / "pruned_checkpoint.pth").exists()


def test_a_mistake_is_named_before_anything_is_measured(measured, flags):
    with pytest.raises(BadArguments):
        run(main_full_global_latency, *flags, "--prune_per_iter", 8)
    assert not measured


@pytest.mark.parametrize(
    "meta, words",
    [
        (dict(device="another device"), "was measured on another device, this run computes on "),
        (dict(dtype="bf16"), "was measured in bf16, this run computes in fp32"),
        (dict(runtime="onnxruntime 1.19"), "was measured by onnxruntime 1.19, this run computes by torch"),
    ],
)
def test_a_table_of_other_conditions_warns_or_is_refused(flags, tmp_path, capsys, meta, words):
    content = json.loads(table_file(tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(content | dict(_meta=dict(batch=16) | meta)))
    more = ["--latency_look_up_table", tmp_path / "t.json"]
    run(main_full_global_latency, *flags, *more, "--dry-run")
    assert words in capsys.readouterr().err
    with pytest.raises(BadArguments) as error:
        run(main_full_global_latency, *flags, *more, "--strict_table")
    assert len(error.value.problems) == 1 and words in error.value.problems[0]
    assert error.value.problems[0].startswith("--strict_table: ")


def test_threads_are_a_condition(flags, tmp_path, capsys):
    from runtime.device import device_name

    content = json.loads(table_file(tmp_path / "t.json").read_text())
    name = device_name("cpu").rpartition(", ")[0] + ", 64 threads"
    (tmp_path / "t.json").write_text(json.dumps(content | dict(_meta=dict(batch=16, device=name))))
    with pytest.raises(BadArguments, match="64 threads, this run computes on"):
        run(main_full_global_latency, *flags, "--latency_look_up_table", tmp_path / "t.json", "--strict_table")
