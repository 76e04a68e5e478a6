"""Prune, compact and finetune end to end on the digits with a two-block model: files and figures."""

import json
import re
from pathlib import Path

import pytest
import torch
from jobs import PLAIN, PRUNE, run

import finetune_dense
import main_full_global_latency
from files.checkpoint import KEYS
from models import Masks, ViTDims, build_vit, load_dense
from models.vit import TokenLogits
from runtime.errors import BadArguments
from tools import report

ROOT = Path(__file__).parent.parent


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("events.") and not p.is_dir())


def test_a_pruning_run_leaves_the_files_of_the_contract(runs):
    assert files(runs["pruned"]) == [
        "args.json",
        "checkpoint.pth",
        "dims.json",
        "log.txt",
        "pruned_checkpoint.pth",
        "run.json",
        "summary.json",
    ]
    assert runs["pruned"].name == (
        "global_prune_DIGITS_deit_tiny_distilled_patch16_224_lr0.004_Global_0_lat_0.0001_target_0.6_ft_5"
    )
    debug = files(runs["pruned"] / "debug")
    assert debug[0] == "debugOutput_dimension_00000001.txt" and "debugOutput_pruning_00000001.txt" in debug
    rows = [(runs["pruned"] / "debug" / n).read_text().strip().split(",") for n in debug if "dimension" in n]
    assert all(len(row) == 1 + 4 * 2 for row in rows)
    dims = ViTDims.from_dict(json.loads((runs["pruned"] / "dims.json").read_text()))
    assert [int(n) for n in rows[-1]] == [
        dims.embed,
        *(getattr(b, a) for a in ("heads", "qk", "v", "mlp") for b in dims.blocks),
    ]
    assert list(runs["pruned"].glob("events.*"))


def test_a_dry_run_plans_and_writes_nothing(runs, tmp_path, capsys):
    """Every event of the plan is narrower than the one before, and the last meets the targets."""
    run(
        main_full_global_latency,
        *PRUNE,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--output_dir",
        tmp_path / "out",
        "--latency_look_up_table",
        runs["table"],
        "--dry-run",
        "--params_target",
        "0.8",
    )
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert re.search(
        r"--latency_target: 0.6 of the dense latency; dense 1 of the dense latency, lowest reachable 0\.", printed
    )
    rows = [line.split() for line in printed.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    ratios = [float(row[3]) for row in rows]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] <= 0.6 and int(rows[-1][1]) == 2 * int(rows[-1][0])
    assert "every target met" in printed and re.search(r"estimate: \d+\.\d\d s a step, .* GiB of memory", printed)


def test_a_dry_run_counts_the_memory_of_gates(runs, tmp_path, capsys):
    """They stand behind every unit, and what they multiply is kept for the backward pass."""
    memory = {}
    for flags in (["weights"], ["gates"], ["gate_samples", "--saliency_loss", "teacher"]):
        dense = ["--initial-checkpoint", runs["dense"] / "ft_checkpoint.pth", "--latency_look_up_table", runs["table"]]
        more = ["--batch-size", "512", "--output_dir", tmp_path / "out", "--dry-run", "--saliency", *flags]
        run(main_full_global_latency, *PRUNE, *dense, *more)
        memory[flags[0]] = float(re.search(r"([\d.]+) GiB of memory", capsys.readouterr().out)[1])
    assert 1.2 * memory["weights"] < memory["gates"] <= memory["gate_samples"] < 4 * memory["weights"]


def test_the_target_is_met_and_the_summary_says_so(runs):
    summary = json.loads((runs["tuned"] / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned", "finetuned"]
    keys = {
        "top1",
        "params",
        "macs",
        "latency_predicted",
        "latency_measured",
        "device",
        "batch",
        "dtype",
        "compiled",
        "dims",
    }
    measured = {"threads", "disturbed"}  # how; the dense model is what is compared with
    assert all(set(stage) == keys | (set() if name == "dense" else measured) for name, stage in summary.items())
    assert 0.5 < summary["pruned"]["latency_predicted"] <= 0.6
    assert summary["finetuned"]["params"] == summary["pruned"]["params"] < summary["dense"]["params"]
    assert 0 < summary["finetuned"]["latency_measured"] < 1.2


def test_a_finetuning_run_leaves_the_files_of_the_contract(runs):
    assert runs["tuned"].name == "ft_dense_2_lr_0.004_a_0.5_T_1.0"
    assert files(runs["tuned"]) == [
        "args.json",
        "dims.json",
        "ft_best.pth",
        "ft_checkpoint.older.pth",
        "ft_checkpoint.pth",
        "log.txt",
        "run.json",
        "summary.json",
    ]
    lines = [json.loads(line) for line in (runs["tuned"] / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for key in (
        "train_lr",
        "train_loss",
        "train_main_loss_value",
        "train_orig_loss_value",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "test_ema_acc1",
        "n_parameters",
    ):
        assert key in lines[0]


def test_masked_pruned_and_compact_checkpoints_agree(runs):
    content = torch.load(runs["pruned"] / "pruned_checkpoint.pth", weights_only=True)
    assert sorted(content) == sorted(KEYS)
    student = build_vit(content["arch"]["name"], **content["arch"]["kwargs"]).eval()
    student.load_state_dict(content["model"])
    masks = Masks(student.dims)
    masks.load_state_dict(content["masks"])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    masks.install_(student)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())  # already zero in the file
    images = torch.randn(4, 3, 16, 16)
    dense = load_dense(runs["pruned"] / "pruned_checkpoint.pth")
    error = (dense(images) - student(images)).norm() / student(images).norm()
    assert error <= 1e-5 and dense.dims.to_dim() == content["dim"]


def test_training_learns(runs):
    for folder in ("dense", "tuned"):
        losses = [json.loads(line)["train_loss"] for line in (runs[folder] / "log.txt").read_text().splitlines()]
        assert losses[-1] < losses[0], folder


def test_the_finetuned_checkpoint_is_smaller_and_has_the_same_keys(runs):
    tuned, pruned = (
        torch.load(runs[k] / f, weights_only=True)
        for k, f in (("tuned", "ft_checkpoint.pth"), ("pruned", "pruned_checkpoint.pth"))
    )
    assert sorted(tuned) == sorted(pruned) and tuned["masks"] is None
    sizes = [
        (runs[k] / f).stat().st_size for k, f in (("tuned", "ft_checkpoint.pth"), ("pruned", "pruned_checkpoint.pth"))
    ]
    assert sizes[0] < sizes[1]


def test_evaluation_prints_what_was_saved(runs, capsys):
    run(finetune_dense, *PLAIN, "--eval", "--finetune", runs["tuned"] / "ft_checkpoint.pth")
    printed = capsys.readouterr().out
    content = torch.load(runs["tuned"] / "ft_checkpoint.pth", weights_only=True)
    assert f"top-1 {content['metrics']['acc1']:.2f}" in printed and "360 images" in printed
    run(finetune_dense, *PLAIN, "--eval", "--finetune", runs["pruned"])
    assert re.search(r"top-1 \d+\.\d\d", capsys.readouterr().out)


def test_both_heads_are_averaged_in_evaluation(tiny, images):
    model = build_vit(**tiny).eval()
    cls, dist = TokenLogits(model)(images)
    torch.testing.assert_close((cls + dist) / 2, model(images))


def test_the_report_of_a_run(runs, tmp_path, capsys):
    run(report, runs["tuned"], "--output", tmp_path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("dense", "pruned", "finetuned", "measured latency", "speed-up"))
    assert files(tmp_path) == ["report.html", "summary.json", "widths.png"]
    assert (tmp_path / "summary.json").read_text() == (runs["tuned"] / "summary.json").read_text()
    with pytest.raises(BadArguments, match="there is no folder"):
        run(report, tmp_path / "nothing")


def test_torch_hub_loads_a_checkpoint(runs):
    path = runs["tuned"] / "ft_checkpoint.pth"
    model = torch.hub.load(str(ROOT), "vit_from_checkpoint", str(path), source="local")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), load_dense(path)(images))
