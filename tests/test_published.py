"""Every published command as it stands: it parses, and runs on two processes with nothing but what shrinks appended."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from jobs import PLAIN, equal, only
from published import COMMANDS, SAVIT_SCRIPT
from test_commands import SMALL, dense_and_cnn, execute, local, prune_flags

from models import load_dense

KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
TWO = "--nproc_per_node=2"


def words_of(name):
    return shlex.split(COMMANDS[name])


def run_as_published(name, *shrinking, **environment):
    """On two processes where a launcher starts it, in the project's folder."""
    words = [TWO if word.startswith("--nproc_per_node") else word for word in words_of(name)]
    return execute([sys.executable, *words, *shrinking], **environment)


@pytest.mark.parametrize("name", COMMANDS)
def test_it_parses(name):
    words = words_of(name)
    script = next(word for word in words if word.endswith(".py"))
    parser = importlib.import_module(script.removesuffix(".py")).get_args_parser()
    args = parser.parse_args(words[words.index(script) + 1 :])
    assert args.model is None or args.model.startswith(("deit_", "tmit_", "tmvit_"))


@pytest.fixture(scope="module")
def place(runs, tmp_path_factory):
    return dense_and_cnn(runs, tmp_path_factory.mktemp("published"))


def plain_dense(path, name):
    """Dense weights of a small DeiT without a distillation token."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **KWARGS)
    torch.save(dict(arch=name, kwargs=KWARGS | dict(num_classes=10), model=model.state_dict()), path)
    return path


@pytest.mark.slow
def test_nvit(place, tmp_path):
    run_as_published("nvit_b", *prune_flags(place, tmp_path))
    pruned = only(tmp_path, "global_prune_*")
    assert json.loads((pruned / "summary.json").read_text())["pruned"]["latency_predicted"] <= 0.54
    shrinking = [*SMALL, "--epochs", "2", *local(place), "--finetune", pruned]
    assert "measured latency" in run_as_published("finetune", *shrinking).splitlines()[-1]
    run_as_published("finetune_resume", *shrinking)
    run_as_published("finetune_scratch", *shrinking)
    tuned = only(pruned, "ft_dense_*") / "ft_checkpoint.pth"
    assert "top-1" in run_as_published("evaluate", "--finetune", tuned, *PLAIN[:4]).splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["revit_t", "revit_s"])
def test_revit(place, tmp_path, name):
    size = ["--model-kwargs", "img_size=16", "patch_size=8", "--epochs", "1", "--batch-size", "16"]
    out = run_as_published(name, *SMALL, *size, "--output_dir", tmp_path, *local(place)[2:])
    assert str(only(tmp_path, "scratch_revit_*") / "ft_checkpoint.pth") in out.splitlines()[-1]


@pytest.fixture(scope="module")
def savit(tmp_path_factory):
    """Folder with dense weights, and what the published pruning command makes of them."""
    root = tmp_path_factory.mktemp("savit")
    dense = plain_dense(root / "dense.pth", "deit_base_patch16_224")
    shrinking = [*PLAIN[:6], "--mixup", "0", "--cutmix", "0", "--finetune", dense]
    run_as_published("savit", *shrinking, "--output_dir", root / "pruned")
    again = ["--output_dir", root / "again", "--pruning_pickle_from", root / "pruned"]
    run_as_published("savit_again", *shrinking, *again)
    return root


def deploy_flags(savit, *more):
    masked = savit / "pruned" / "pruned_checkpoint.pth"
    return [*PLAIN, "--masked_model", masked, "--epochs", "3", "--lr", "1e-3", "--teacher-path", "", *more]


@pytest.mark.slow
def test_savit(savit, tmp_path):
    dims = [load_dense(savit / name / "pruned_checkpoint.pth").dims for name in ("pruned", "again")]
    assert dims[0] == dims[1]
    run_as_published("savit_finetune", *deploy_flags(savit, "--output_dir", tmp_path))
    assert load_dense(tmp_path / "checkpoint.pth").dims == dims[0]


def start(savit, output_dir):
    """SAViT's finetuning script as published, on two processes, in a session of its own."""
    script = SAVIT_SCRIPT.replace("--nproc_per_node=8", TWO)
    flags = map(str, deploy_flags(savit))
    environment = os.environ | dict(PYTHON=sys.executable, PET_STANDALONE="1", output_dir=str(output_dir))
    root = Path(__file__).parent.parent
    return subprocess.Popen(["bash", "-c", script, "script", *flags], cwd=root, env=environment, start_new_session=True)


@pytest.mark.slow
def test_savits_script_killed_twice_ends_as_the_undisturbed_run(savit, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(savit, whole).wait(600) == 0
    for epochs in (1, 2):
        process = start(savit, killed)
        until = time.monotonic() + 600
        while time.monotonic() < until and not _has_epochs(killed, epochs):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(savit, killed).wait(600) == 0
    assert not list(killed.glob("*previous*"))
    for name in ("ft_checkpoint.pth", "checkpoint.pth"):
        equal(whole, killed, name)


def _has_epochs(folder, number):
    """Whether that many epochs are in the log, and a checkpoint of one is there."""
    log = folder / "log.txt"
    return (folder / "checkpoint.pth").exists() and log.exists() and log.read_text().count("\n") >= number


@pytest.mark.slow
def test_prune_and_merge(tmp_path):
    """The pruning command names no folder; it says which it takes, and a second run keeps what is there."""
    dense = plain_dense(tmp_path / "dense.pth", "deit_tiny_patch16_224")
    work = tmp_path / "work"
    work.mkdir()

    def execute_there(name, *shrinking):
        root, words = Path(__file__).parent.parent, words_of(name)
        command = [sys.executable, root / words[0], *words[1:], *shrinking]
        done = subprocess.run(list(map(str, command)), cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    for _ in range(2):
        out = execute_there("pm_prune", "--resume", dense, *PLAIN, "--prune_iter", "3")
    folder = "runs/pm_deit_tiny_patch16_224_attn_0.1_0.6"
    assert f"no --output_dir: writing to {folder}" in out
    pruned = work / folder / "pruned_checkpoint.pth"
    assert pruned.exists() and pruned.with_name("pruned_checkpoint.previous.pth").exists()
    shrinking = ["--resume", pruned, "--teacher-path", dense, *PLAIN, "--final_finetune", "1"]
    execute_there("pm_finetune", *shrinking, "--output_dir", tmp_path / "tuned")
    tuned = ["--resume", tmp_path / "tuned" / "checkpoint.pth"]
    assert "top-1" in execute_there("pm_eval", *tuned, *PLAIN)
    assert "images/s" in execute_there("pm_speed", *tuned, "--batch-size", "64", "--device", "cpu")
