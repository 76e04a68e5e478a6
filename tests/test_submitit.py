"""SLURM jobs, run by submitit's local executor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import TUNE, only, run, same

import run_with_submitit
from runtime.errors import BadArguments

ROOT = Path(__file__).parent.parent


def test_wrong_flags_are_noticed_before_the_queue(capsys):
    with pytest.raises(SystemExit):
        run(run_with_submitit, "--cluster", "local", "finetune_dense.py", "--epoch", "3")
    assert "unrecognized arguments: --epoch 3" in capsys.readouterr().err
    with pytest.raises(BadArguments, match="--nodes must be above 0"):
        run(run_with_submitit, "--nodes", "0", "finetune_dense.py", "--finetune", "x")


def test_a_job_that_is_queued_again_counts_its_restarts():
    job = run_with_submitit.Job("finetune_dense.py", ["--finetune", "x"])
    again = job.checkpoint().function.checkpoint().function
    assert (again.script, again.arguments, again.restarts) == ("finetune_dense.py", ["--finetune", "x"], 2)
    assert again.folder == job.folder == os.getcwd()


@pytest.mark.slow
def test_it_is_submitted_from_any_folder(runs, tmp_path):
    """Paths are those of the folder it is submitted from."""
    shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", tmp_path)
    flags = ["--cluster", "local", "--ngpus", "1", "finetune_dense.py", *TUNE, "--epochs", "1", "--finetune", "."]
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert only(tmp_path, "ft_dense_*/ft_checkpoint.pth") and (tmp_path / "submitit").is_dir()


@pytest.mark.slow
def test_a_job_that_fails_is_named_in_one_line(tmp_path):
    flags = ["--cluster", "local", "--ngpus", "1", "finetune_dense.py", "--finetune", "nothing.pth", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    number = only(tmp_path / "submitit", "[0-9]*").name
    line = f"error: job {number} failed, logs in {tmp_path}/submitit/{number}: checkpoint nothing.pth does not exist"
    assert (done.returncode, done.stderr.splitlines()) == (1, [line])


@pytest.mark.slow
def test_two_processes_of_a_local_job_equal_torchrun(runs, tmp_path):
    flags, folders = [*TUNE, "--epochs", "1", "--batch-size", "32"], [tmp_path / name for name in ("job", "torchrun")]
    commands = [
        ["run_with_submitit.py", "--cluster", "local", "--ngpus", "2", "--job_dir", str(tmp_path / "logs")],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    ]
    for folder, command in zip(folders, commands, strict=True):
        folder.mkdir()
        shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", folder)
        flags_here = [*command, "finetune_dense.py", *flags, "--finetune", str(folder)]
        subprocess.run([sys.executable, *flags_here], cwd=ROOT, check=True, capture_output=True)
    job, torchrun = (torch.load(next(f.glob("ft_*/ft_checkpoint.pth")), weights_only=True) for f in folders)
    assert same(job["model"], torchrun["model"])
