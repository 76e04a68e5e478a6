"""The end of a run: what is measured, and what is written."""

import importlib
import inspect
import json

import pytest
import torch

from benchmarks.one_shot_cost import table_of_macs
from latency.table import LatencyTable
from latency.whole import Measured
from models import Arch, build_vit
from training import results
from training.full_model import FullModel
from training.results import Conditions, Effort, Report

ARCH = "deit_tiny_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)


def table():
    return table_of_macs(Arch.of(ARCH, **KWARGS).dims)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """One whose measurements are as given: ratio 0.5; and what it was asked to measure."""
    asked = []

    def measure(*args, **effort):
        asked.append(effort)
        return Measured([0.5], 1.0, threads=1, wanted=2, disturbed=0.8)

    monkeypatch.setattr(results, "measure_ratios", measure)
    full = FullModel(Arch.of(ARCH, **KWARGS))
    return Report(tmp_path, full, torch.device("cpu"), Conditions(4, "bf16", True), Effort(2, 3)), asked


def test_the_end_of_a_run_is_measured_and_written(report, tmp_path, capsys):
    report, asked = report
    dense = build_vit(ARCH, **KWARGS).dims
    small = dense.resized({"blocks.0.mlp": 8})
    stage = report.conclude("pruned", small, 81.23456, 0.6, report.dense(dense, 90.0))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["pruned"] == stage and json.loads((tmp_path / "dims.json").read_text()) == small.to_dict()
    assert (stage["top1"], stage["latency_predicted"], stage["latency_measured"]) == (81.235, 0.6, 0.5)
    assert (stage["batch"], stage["dtype"], stage["compiled"]) == (4, "bf16", True)
    assert written["dense"]["latency_predicted"] == written["dense"]["latency_measured"] == 1
    assert written["pruned"]["macs"] < written["dense"]["macs"]
    assert asked == [dict(builds=2, rounds=3, threads=0)]  # the dense model is not measured
    assert (stage["threads"], stage["disturbed"]) == (1, 0.8)
    said = capsys.readouterr().err
    assert "measured with 1 of 2 threads" in said and "80% of the samples were disturbed" in said


def test_a_table_of_fewer_threads_is_followed(report):
    """Those that a disturbed machine forced upon it, not those of another one."""
    assert Conditions.of(LatencyTable(dict(table().data, _meta=dict(threads=1))), 8).threads == 0
    forced = LatencyTable(dict(table().data, _meta=dict(threads=1, threads_wanted=4)))
    assert Conditions.of(forced, 8).threads == 1


def test_no_dense_stage_for_other_widths(report):
    report, asked = report
    dense = build_vit(ARCH, **KWARGS).dims
    assert report.dense(dense.resized({"embed": 16}), 90.0) == {}
    assert report.conclude("dense", dense, 90.0) == report.dense(dense, 90.0)["dense"] and not asked


SCRIPTS = (
    "finetune_dense",
    "main_full_global_latency",
    "main_pm_vit",
    "main_savit",
    "main_savit_deploy",
    "revit_scratch",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_measure_five_pairs_in_nine_rounds(name):
    main = importlib.import_module(name).main
    assert inspect.signature(main).parameters["effort"].default == Effort(builds=5, rounds=9)
