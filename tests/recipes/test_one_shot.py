"""One-shot pruning end to end on the digits: files, figures, what comes after, several processes, mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import PLAIN, TRAIN, TUNE, run, table_file

import finetune_dense
import main_full_global_latency
from files.checkpoint import KEYS
from latency.table import LatencyTable
from models import BlockDims, Masks, ViTDims, build_vit, load_dense
from runtime.errors import BadArguments, RunFailed
from training import results

ROOT = Path(__file__).parents[2]
NAME = "one_shot_DIGITS_deit_tiny_distilled_patch16_224_calib_512_target_0.6"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a model that has learnt something."""
    root = tmp_path_factory.mktemp("dense")
    run(finetune_dense, *TRAIN, "--epochs", 14, "--lr", "3e-2", "--no-model-ema", "--output_dir", root)
    (dense,) = root.glob("scratch_*")
    return [
        *PLAIN,
        "--one_shot",
        "--calib_images",
        512,
        "--latency_target",
        0.6,
        "--latency_look_up_table",
        table_file(root / "table.json"),
        "--initial-checkpoint",
        dense / "ft_checkpoint.pth",
    ]


@pytest.fixture(scope="module")
def pruned(flags, tmp_path_factory):
    root = tmp_path_factory.mktemp("one_shot")
    run(main_full_global_latency, *flags, "--output_dir", root)
    return root / NAME


def test_the_files_of_the_contract(pruned):
    assert sorted(p.name for p in pruned.iterdir()) == [
        "args.json",
        "dims.json",
        "log.txt",
        "pruned_checkpoint.pth",
        "run.json",
        "summary.json",
    ]
    (line,) = (json.loads(line) for line in (pruned / "log.txt").read_text().splitlines())
    assert line["calib_images"] == 512 and list(line["seconds"]) == ["aligned", "allocated", "refitted"]
    content = torch.load(pruned / "pruned_checkpoint.pth", weights_only=True)
    assert sorted(content) == sorted(KEYS)
    assert content["dims"] == json.loads((pruned / "dims.json").read_text())


def test_the_target_is_met_and_little_is_lost(pruned):
    summary = json.loads((pruned / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned"]
    assert 0.5 < summary["pruned"]["latency_predicted"] <= 0.6
    assert summary["dense"]["top1"] > 30  # a model that has learnt something: chance is 10
    assert summary["pruned"]["top1"] > summary["dense"]["top1"] - 5
    assert summary["pruned"]["params"] < 0.8 * summary["dense"]["params"]


def test_masked_and_compact_agree(pruned):
    content = torch.load(pruned / "pruned_checkpoint.pth", weights_only=True)
    student = build_vit(content["arch"]["name"], **content["arch"]["kwargs"]).eval()
    student.load_state_dict(content["model"])
    masks = Masks(student.dims)
    masks.load_state_dict(content["masks"])
    masks.install_(student)
    assert all(torch.equal(content["model"][k], v) for k, v in student.state_dict().items())
    images = torch.randn(4, 3, 16, 16)
    dense = load_dense(pruned / "pruned_checkpoint.pth")
    assert (dense(images) - student(images)).norm() <= 1e-5 * student(images).norm()
    assert dense.dims == masks.dims == ViTDims.from_dict(content["dims"])


def test_the_result_finetunes_further(pruned):
    run(finetune_dense, *TUNE, "--finetune", pruned)
    (tuned,) = pruned.glob("ft_dense_*")
    assert list(json.loads((tuned / "summary.json").read_text())) == ["dense", "pruned", "finetuned"]


def test_the_same_command_gives_the_same_model(pruned, flags, tmp_path, capsys):
    run(main_full_global_latency, *flags, "--output_dir", tmp_path, "--batch-size", 64)
    one, two = (torch.load(f / "pruned_checkpoint.pth", weights_only=True) for f in (pruned, tmp_path / NAME))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"pruned: \S+/pruned_checkpoint\.pth; top-1 \d+\.\d\d, latency predicted 0\.\d+, "
        r"measured \d\.\d+ of dense",
        printed[-1],
    )
    assert any(line.startswith("compact: widths {'EMB': ") for line in printed)


def test_the_target_can_be_met_as_measured(flags, tmp_path, monkeypatch):
    """Where a machine takes 1.25 times as long as the table says."""
    table = LatencyTable.load(flags[flags.index("--latency_look_up_table") + 1])
    dense = ViTDims(32, (BlockDims(4, 8, 8, 128, 18),) * 2)
    monkeypatch.setattr(results.Report, "measure", lambda self, dims: 1.25 * table.ratio(dims, dense))
    run(main_full_global_latency, *flags, "--output_dir", tmp_path, "--latency_measured")
    summary = json.loads((tmp_path / NAME / "summary.json").read_text())
    assert 0.58 < summary["pruned"]["latency_measured"] <= 0.6
    assert summary["pruned"]["latency_predicted"] == pytest.approx(
        summary["pruned"]["latency_measured"] / 1.25, abs=1e-4
    )


@pytest.mark.slow
def test_two_ranks_find_what_one_does(flags, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "main_full_global_latency.py",
        *flags,
        "--output_dir",
        tmp_path,
        "--latency_target",
        "0.3",
    ]
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "one", "--latency_target", "0.3")
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = NAME.replace("0.6", "0.3")
    one, two = (load_dense(f / name / "pruned_checkpoint.pth") for f in (tmp_path / "one", tmp_path))
    images = torch.randn(4, 3, 16, 16)
    assert one.dims == two.dims
    with torch.no_grad():
        assert (one(images) - two(images)).norm() <= 1e-3 * one(images).norm()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--calib_images", "2000"], "--calib_images 2000 is more than the 1437 training images"),
        (["--calib_images", "63"], "--calib_images must be at least 64 for each process, not 63"),
        (["--calib_images", "0"], "--calib_images must be above 0, not 0"),
        (["--resume"], "--resume goes with training; --one_shot has none"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(flags, tmp_path, more, message):
    with pytest.raises(BadArguments) as error:
        run(main_full_global_latency, *flags, "--output_dir", tmp_path / "new", *more)
    assert message in error.value.problems and not (tmp_path / "new").exists()


def test_one_shot_needs_a_target(flags, tmp_path):
    without = [flag for flag in flags if flag not in ("--latency_target", 0.6)]
    with pytest.raises(BadArguments) as error:
        run(main_full_global_latency, *without, "--output_dir", tmp_path)
    assert error.value.problems == ["--one_shot needs --latency_target"]


def test_a_target_out_of_reach_fails(flags, tmp_path):
    with pytest.raises(RunFailed, match="target 0.0001 not reached"):
        run(main_full_global_latency, *flags, "--output_dir", tmp_path, "--latency_target", "0.0001")
