"""Swin end to end: train, measure, prune to a latency target, load, go on, finetune, export; and what is refused."""

import json
import re

import pytest
import torch
from jobs import PLAIN, equal, interrupted, run
from swin_parts import SMALL, parts

import finetune_dense
import main_full_global_latency
import main_pm_vit
import main_savit
import main_savit_deploy
import revit_scratch
from files import checkpoint
from latency import LatencyTable
from models import SwinDims, build_vit, load_dense, skeleton
from runtime.errors import BadArguments
from tools import export, report

DATA = ["--data-set", "DIGITS", "--num_workers", "0", "--device", "cpu"]
ARCH = "swin_tiny_patch4_window7_224"
MODEL = SMALL | dict(patch_size=4, window_size=2)  # 4 x 4 patches, then 2 x 2: it learns the digits in seconds
KWARGS = [f"{key}={json.dumps(MODEL[key], separators=(',', ':'))}" for key in MODEL if key != "num_classes"]
TRAIN = [
    "--scratch",
    "--model",
    ARCH,
    "--model-kwargs",
    *KWARGS,
    *PLAIN,
    "--epochs",
    "5",
    "--lr",
    "5e-2",
    "--kl_loss_coeff",
    "0",
    "--original_loss_coeff",
    "1",
]
PRUNE = [
    *PLAIN,
    "--pruning",
    "--latency_target",
    "0.5",
    "--latency_regularization",
    "1e-6",
    "--prune_per_iter",
    "64",
    "--interval_prune",
    "2",
    "--epochs",
    "5",
    "--lr",
    "2e-2",
    "--kl_loss_coeff",
    "10000",
    "--original_loss_coeff",
    "1",
]
TUNE = [*PLAIN, "--epochs", "3", "--lr", "3e-2", "--kl_loss_coeff", "10000", "--original_loss_coeff", "1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.json"
    LatencyTable.of_parts(parts(), dict(batch=16, tokens=[16, 4])).save(path)
    return path


@pytest.fixture(scope="module")
def swins(tmp_path_factory, table):
    """Folders of a dense, a pruning and a finetuning run."""
    root = tmp_path_factory.mktemp("swins")
    run(finetune_dense, *TRAIN, "--output_dir", root / "dense")
    (dense,) = (root / "dense").glob("scratch_*")
    prune = [*PRUNE, "--initial-checkpoint", dense / "ft_checkpoint.pth", "--latency_look_up_table", table]
    run(main_full_global_latency, *prune, "--output_dir", root)
    (pruned,) = root.glob("global_prune_*")
    run(finetune_dense, *TUNE, "--finetune", pruned)
    (tuned,) = pruned.glob("ft_dense_*")
    return dict(root=root, dense=dense, pruned=pruned, tuned=tuned, prune=prune)


@pytest.mark.slow
def test_the_target_is_met_and_the_widths_travel(swins):
    summary = json.loads((swins["tuned"] / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned", "finetuned"]
    assert 0.48 < summary["pruned"]["latency_predicted"] <= 0.5
    assert summary["pruned"]["latency_measured"] > 0
    dims = SwinDims.from_dict(json.loads((swins["pruned"] / "dims.json").read_text()))
    small = load_dense(swins["pruned"] / "pruned_checkpoint.pth")
    tuned = load_dense(swins["tuned"] / "ft_checkpoint.pth")
    assert small.dims == tuned.dims == dims and summary["pruned"]["dims"] == dims.to_dict()
    assert sum(p.numel() for p in small.parameters()) == summary["pruned"]["params"] < summary["dense"]["params"]
    row = sorted((swins["pruned"] / "debug").glob("*dimension*"))[-1].read_text().split(",")
    assert [int(n) for n in row[:2]] == [stage.embed for stage in dims.stages] and len(row) == 2 + 4 * 4
    lines = [json.loads(line) for line in (swins["pruned"] / "log.txt").read_text().splitlines()]
    assert lines[-1]["latency"] == pytest.approx(summary["pruned"]["latency_predicted"], abs=1e-4)


@pytest.mark.slow
def test_accuracy_comes_back(swins):
    summary = json.loads((swins["tuned"] / "summary.json").read_text())
    assert summary["dense"]["top1"] > 50 and summary["finetuned"]["top1"] > 0.6 * summary["dense"]["top1"]


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_one_does(swins, tmp_path, monkeypatch):
    """Stopped inside an epoch, the student compacted before: the result is that of one that goes through."""
    flags = [*swins["prune"], "--interval_prune", "6", "--shrink_interval", "2"]
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "whole")
    interrupted(monkeypatch, main_full_global_latency, [*flags, "--output_dir", tmp_path / "broken"], 27)
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "broken", "--resume")
    (whole,), (broken,) = ((tmp_path / name).glob("global_*") for name in ("whole", "broken"))
    equal(whole, broken, "pruned_checkpoint.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "onnx", "torch-export"])
def test_it_is_exported(swins, tmp_path, capsys, name):
    run(export, swins["tuned"] / "ft_checkpoint.pth", "--format", name, "--output", tmp_path)
    said = capsys.readouterr().out
    assert float(re.search(r"relative difference (\S+) on", said)[1]) <= 1e-4
    if name == "safetensors":
        assert load_dense(tmp_path).dims == load_dense(swins["tuned"] / "ft_checkpoint.pth").dims


@pytest.mark.slow
def test_formats_of_plain_vits_are_refused_and_the_report_is_written(swins, tmp_path):
    for name in ("timm", "standalone"):
        with pytest.raises(BadArguments, match=f"--format {name} is for plain ViTs, not for {ARCH}"):
            run(export, swins["tuned"] / "ft_checkpoint.pth", "--format", name, "--output", tmp_path)
    run(report, swins["tuned"], "--output", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"Embedding \d+, \d+ of 16, 32\.", page) and "Where pruning took them" in page


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A file of dense weights, as a run may start from."""
    path = tmp_path_factory.mktemp("dense") / "dense.pth"
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in MODEL.items()}
    torch.save(dict(arch=ARCH, kwargs=kwargs, model=build_vit(ARCH, **kwargs).state_dict()), path)
    return path


def test_flags_that_a_swin_is_not_pruned_with_are_named_at_once(dense, table, tmp_path):
    flags = [*PRUNE, "--initial-checkpoint", dense, "--latency_look_up_table", table, "--output_dir", tmp_path / "out"]
    odd = [("--selection", "value"), ("--saliency", "gates"), ("--compensate", "end"), ("--align",), ("--tokens",)]
    with pytest.raises(BadArguments) as refused:
        run(main_full_global_latency, *flags, "--calib_images", "64", *(word for words in odd for word in words))
    named = ("--selection value", "--saliency gates", "--compensate end", "--align blocks", "--tokens place")
    lines = [f"{words} is for plain ViTs, not for {ARCH}, a Swin Transformer" for words in named]
    assert set(lines) <= set(refused.value.problems)
    with pytest.raises(BadArguments, match="--one_shot is for plain ViTs"):
        run(main_full_global_latency, *flags, "--one_shot", "--calib_images", "64")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, flags",
    [
        (main_savit, ["--output_dir", "out", "--finetune"]),
        (main_savit_deploy, ["--output_dir", "out", "--masked_model"]),
        (main_pm_vit, ["--prune", "--output_dir", "out", "--resume"]),
        (
            revit_scratch,
            [
                "--scratch",
                "--output_dir",
                "out",
                "--kl_loss_coeff",
                "0",
                "--original_loss_coeff",
                "1",
                "--mixup",
                "0",
                "--cutmix",
                "0",
                "--initial-checkpoint",
            ],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["weights", "pruned"])
def test_the_other_methods_refuse_one_in_a_line(script, flags, kind, dense, tmp_path, monkeypatch):
    """As dense weights, and as a checkpoint of this project with fewer units."""
    monkeypatch.chdir(tmp_path)
    if kind == "pruned":
        dims = SwinDims.of(skeleton(ARCH, **MODEL)).resized({"layers.0.embed": 8})
        small = build_vit(ARCH, dims, **MODEL)
        checkpoint.save(
            tmp_path / "small.pth",
            arch=dict(name=ARCH, kwargs=MODEL),
            dims=dims.to_dict(),
            dim=dims.to_dim(),
            model=small.state_dict(),
            args={},
            metrics={},
        )
        dense = tmp_path / "small.pth"
    with pytest.raises(BadArguments) as refused:
        run(script, *DATA, *flags, dense)
    words = ("is a Swin Transformer, which", "is not a plain Vision Transformer", "was not written by this project")
    assert any(word in line for word in words for line in refused.value.problems), refused.value.problems


def test_relatives_are_refused_in_a_line(tmp_path):
    with pytest.raises(BadArguments, match="swinv2_tiny_window8_256 is not a Swin Transformer of the first version"):
        run(main_full_global_latency, *PLAIN, "--model", "swinv2_tiny_window8_256", "--output_dir", tmp_path)
