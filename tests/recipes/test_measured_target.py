"""A latency target is met as measured, where the table is of this device; the device here is slower than its table."""

import json

import numpy as np
import pytest
import torch
from jobs import PRUNE, interrupted, only, run, table_file

import main_full_global_latency
from latency.table import LatencyTable
from latency.whole import Measured
from recipes import tables
from runtime.device import device_name
from runtime.errors import RunFailed
from training import results

TARGET = 0.6


@pytest.fixture
def flags(runs, tmp_path):
    path = table_file(tmp_path / "table.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(_meta=dict(batch=16, device=device_name("cpu")))))
    dense = ["--initial-checkpoint", runs["dense"] / "ft_checkpoint.pth", "--latency_look_up_table", path]
    return [*PRUNE, "--epochs", 8, *dense, "--output_dir", tmp_path / "out"]


@pytest.fixture
def slower(monkeypatch, tmp_path):
    """Widths that were measured; small models take longer than the table says."""
    asked = []

    def measure(arch, chosen, *conditions, **effort):
        asked.extend(chosen)
        table = LatencyTable.load(tmp_path / "table.json")
        return Measured(np.array([0.1 + 0.9 * table.ratio(d, arch.dims) for d in chosen]), 1.0, 1, 1, 0.0)

    monkeypatch.setattr(results, "measure_ratios", measure)
    return asked


def pruned(tmp_path):
    return json.loads((only(tmp_path / "out", "*") / "summary.json").read_text())["pruned"]


@pytest.mark.parametrize("selection", ["published", "value"])
def test_pruning_goes_on_until_what_is_measured_meets_the_target(slower, flags, tmp_path, capsys, selection):
    more = [] if selection == "published" else ["--selection", "value", "--latency_regularization", 0]
    run(main_full_global_latency, *flags, *more)
    stage, said = pruned(tmp_path), capsys.readouterr().out
    assert TARGET - 0.05 < stage["latency_measured"] <= TARGET and stage["latency_predicted"] < 0.56
    assert said.count("which is above the target: pruning goes on") == said.count("measured 0.6") >= 1
    assert said.count("which meets the target") == 1 and len(slower) == said.count("pruning goes on") + 1


@pytest.mark.parametrize("more, device", [(["--latency_predicted"], None), ([], "another device")])
def test_a_predicted_target_is_not_measured_before_the_end(slower, flags, tmp_path, more, device):
    if device:
        content = json.loads((tmp_path / "table.json").read_text())
        (tmp_path / "table.json").write_text(json.dumps(content | dict(_meta=dict(batch=16, device=device))))
    run(main_full_global_latency, *flags, *more)
    stage = pruned(tmp_path)
    assert TARGET - 0.05 < stage["latency_predicted"] <= TARGET < stage["latency_measured"] and len(slower) == 1


def test_a_resumed_run_knows_what_was_measured(slower, flags, tmp_path, monkeypatch):
    run(main_full_global_latency, *flags)
    whole = only(tmp_path / "out", "global_prune_*")
    other = [tmp_path / "other" if flag == tmp_path / "out" else flag for flag in flags]
    updates = max(int(p.stem[-8:]) for p in (whole / "debug").glob("debugOutput_dimension_*")) * 2 - 1
    interrupted(monkeypatch, main_full_global_latency, other, updates)
    run(main_full_global_latency, *other, "--resume")
    again = only(tmp_path / "other", "global_prune_*")
    assert (whole / "dims.json").read_text() == (again / "dims.json").read_text()


def test_a_device_that_never_meets_it_ends_in_a_line(flags, monkeypatch):
    monkeypatch.setattr(results, "measure_ratios", lambda *_, **__: Measured(np.array([0.9]), 1.0, 1, 1, 0.0))
    with pytest.raises(RunFailed, match="--latency_target .* not reached"):
        run(main_full_global_latency, *flags, "--epochs", 2)


def test_tables_of_fewer_threads_and_other_runtimes(tmp_path):
    content = json.loads(table_file(tmp_path / "t.json").read_text())

    def can(**meta):
        return tables.can_be_measured(LatencyTable(content | dict(_meta=meta)), torch.device("cpu"))

    here = device_name("cpu")
    fewer = here.rpartition(", ")[0] + ", 0 threads"
    assert can(device=here) and can(device=fewer, threads_wanted=1)
    assert not can() and not can(device=fewer) and not can(device=here, runtime="onnxruntime 1.19")
