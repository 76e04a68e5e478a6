"""SLURM jobs, run by submitit's local executor."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import TUNE, run, same

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
