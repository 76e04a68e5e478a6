"""Every published command, in its own shell script, runs to its end: shrunk, on the digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from jobs import MODEL, PLAIN, table_file

from files import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
KWARGS = MODEL[3:]  # of --model-kwargs
SMALL = [*PLAIN, "--input-size", "16", "--lr", "1e-3", "--log-interval", "5"]  # later flags win over the recipe's
PRUNE = ["--interval_prune", "2", "--prune_per_iter", "128", "--latency_regularization", "1e-3"]


def execute(words, **environment):
    """What it printed; torchrun takes a port that is free."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHON=sys.executable, PET_STANDALONE="1") | environment,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(runs, tmp_path_factory):
    return dense_and_cnn(runs, tmp_path_factory.mktemp("commands"))


def dense_and_cnn(runs, root):
    """Dense weights of a small DeiT, which a DeiT-B of that size can take, and a CNN teacher, as if downloaded."""
    dense = checkpoint.load(runs["dense"] / "ft_checkpoint.pth")
    torch.save(dict(model=dense["model"]), root / "dense.pth")
    torch.save(dict(model=timm.create_model("resnet10t", num_classes=10).state_dict()), root / "cnn.pth")
    table_file(root / "table.json")
    return root


def local(place):
    """In place of downloads."""
    return [
        "--initial-checkpoint",
        place / "dense.pth",
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        place / "cnn.pth",
    ]


def prune_flags(place, output):
    return [
        *SMALL,
        *local(place),
        "--model-kwargs",
        *KWARGS,
        *PRUNE,
        "--epochs",
        "4",
        "--latency_look_up_table",
        place / "table.json",
        "--output_dir",
        output,
    ]


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("variant", ["b", "h", "s", "t"])
def test_pruning_and_finetuning(place, tmp_path, variant, processes):
    """The target of T lies below the small model's floors: it takes the lowest that it has."""
    flags = prune_flags(place, tmp_path) + (["--latency_target", "0.3"] if variant == "t" else [])
    out = execute(["bash", f"scripts/nvit_{variant}.sh", tmp_path, *flags], GPUS=processes)
    (pruned,) = tmp_path.glob("global_prune_*")
    target = dict(b=0.54, h=0.5, s=0.39, t=0.3)[variant]
    assert json.loads((pruned / "summary.json").read_text())["pruned"]["latency_predicted"] <= target
    assert "pruned: " in out.splitlines()[-1]
    if variant == "b":
        tune = ["bash", "scripts/nvit_finetune.sh", pruned, tmp_path, *SMALL, "--epochs", "2", *local(place)]
        assert "measured latency" in execute(tune, GPUS=processes).splitlines()[-1]
        execute([*tune, "--scratch"], GPUS=processes)
        execute([*tune, "--resume", "--start_epoch", "2"], GPUS=processes)
        (tuned,) = pruned.glob("ft_dense_*")
        evaluation = ["--eval", "--finetune", tuned / "ft_checkpoint.pth", "--batch-size", "256", *PLAIN[:2]]
        out = execute([sys.executable, "finetune_dense.py", *evaluation])
        assert "top-1" in out.splitlines()[-1]


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("variant", ["revit_t", "revit_s"])
def test_revit(place, tmp_path, variant, processes):
    flags = [
        *SMALL,
        "--model-kwargs",
        "img_size=16",
        "patch_size=8",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--batch-size",
        "16",
        "--output_dir",
        tmp_path,
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        place / "cnn.pth",
    ]
    out = execute(["bash", f"scripts/{variant}.sh", tmp_path, *flags], GPUS=processes)
    (folder,) = tmp_path.glob("scratch_revit_EMB_*_CNN_only")
    assert str(folder / "ft_checkpoint.pth") in out.splitlines()[-1]


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_prune_and_merge(tmp_path, size):
    """From prune to speed, finetuning on two processes."""
    arch, kwargs = f"deit_{size}_patch16_224", dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    model = timm.create_model(arch, num_classes=10, **kwargs)
    torch.save(dict(arch=arch, kwargs=kwargs, model=model.state_dict()), tmp_path / "dense.pth")
    flags = [*PLAIN, "--input-size", "16", "--output_dir"]
    execute(
        [
            "bash",
            f"scripts/pm_vit_{size}.sh",
            tmp_path,
            tmp_path / "dense.pth",
            *flags,
            tmp_path / "pruned",
            "--prune_iter",
            "3",
        ],
        GPUS="1",
    )
    pruned = tmp_path / "pruned" / "pruned_checkpoint.pth"
    out = execute(
        [
            "bash",
            f"scripts/pm_vit_{size}_finetune.sh",
            pruned,
            tmp_path / "dense.pth",
            tmp_path,
            *flags,
            tmp_path / "tuned",
            "--final_finetune",
            "2",
        ],
        GPUS="2",
    )
    tuned = tmp_path / "tuned" / "ft_checkpoint.pth"
    assert f"{tuned}: top-1" in out.splitlines()[-1]
    common = ["main_pm_vit.py", "--model", f"tmvit_{size}_patch16_224", "--batch-size", "64", "--resume", tuned]
    assert "top-1" in execute([sys.executable, *common, "--eval", *PLAIN])
    assert "images/s" in execute([sys.executable, *common, "--speed-only", "--device", "cpu"])
