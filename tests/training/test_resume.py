"""A run that is broken off anywhere and goes on ends where the undisturbed run ends, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import PRUNE, TUNE, equal, interrupted, only, run, same

import finetune_dense
import main_full_global_latency
from engine import Progress
from files import checkpoint
from runtime.errors import BadArguments
from training import dense
from training.keeper import Keeper

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prune(runs):
    """Flags of a pruning run of 44 updates, an event every 6."""
    return [
        *PRUNE,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--latency_look_up_table",
        runs["table"],
        "--prune_per_iter",
        "16",
        "--interval_prune",
        "6",
    ]


@pytest.fixture(scope="module")
def whole(prune, tmp_path_factory):
    """Where it ran undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(main_full_global_latency, *prune, "--output_dir", folder)
    return folder


@pytest.fixture
def pruned(runs, tmp_path):
    """A copy of the pruned run's result, to finetune in."""
    folder = tmp_path / "pruned"
    folder.mkdir()
    for name in ("pruned_checkpoint.pth", "summary.json"):
        shutil.copy(runs["pruned"] / name, folder)
    return folder


@pytest.mark.parametrize("updates, workers", [(1, 0), (15, 2), (22, 0), (24, 0), (40, 0)])
def test_pruning_goes_on_at_any_update(prune, whole, tmp_path, monkeypatch, updates, workers):
    """The first update, inside an epoch and a window (with workers), an epoch's last, an event's, the second epoch."""
    flags = [*prune, "--num_workers", workers, "--output_dir", tmp_path]
    interrupted(monkeypatch, main_full_global_latency, flags, updates)
    run(main_full_global_latency, *prune, "--output_dir", tmp_path, "--resume")
    equal(only(whole, "global_*"), only(tmp_path, "global_*"), "pruned_checkpoint.pth")
    debug = [sorted((only(f, "global_*") / "debug").iterdir()) for f in (whole, tmp_path)]
    assert [p.read_text() for p in debug[0]] == [p.read_text() for p in debug[1]]


@pytest.mark.parametrize("updates", [3, 22, 30])
def test_finetuning_goes_on_at_any_update(runs, pruned, monkeypatch, updates):
    flags = [*TUNE, "--finetune", pruned]
    interrupted(monkeypatch, finetune_dense, flags, updates)
    epoch = str(updates // 23)
    with pytest.raises(BadArguments, match=f"--start_epoch is 7 .* epoch {epoch}"):
        run(finetune_dense, *flags, "--resume", "--start_epoch", "7")
    run(finetune_dense, *flags, "--resume", "--start_epoch", epoch)
    equal(runs["tuned"], only(pruned, "ft_dense_*"), "ft_checkpoint.pth")


def test_twice_broken_off_during_evaluation_and_after_an_interval(runs, pruned, monkeypatch):
    flags = [*TUNE, "--finetune", pruned, "--recovery-interval", "10"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        evaluate, calls = dense.evaluate, []

        def killed(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:  # the one before training is the first
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        patch.setattr(dense, "evaluate", killed)
        run(finetune_dense, *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # as a crash: nothing is written

        def crash(self):
            original(self)
            if self.progress.step == 17:
                raise KeyboardInterrupt

        original = Keeper.after_step
        patch.setattr(Keeper, "after_step", crash)
        run(finetune_dense, *flags, "--resume")
    content = torch.load(only(pruned, "ft_dense_*") / "ft_checkpoint.pth", weights_only=True)
    assert (content["epoch"], content["step"]) == (0, 22 + 10)
    run(finetune_dense, *flags, "--resume")
    equal(runs["tuned"], only(pruned, "ft_dense_*"), "ft_checkpoint.pth")


def test_a_restart_by_the_launcher_goes_on_by_itself(runs, pruned, monkeypatch):
    flags = [*TUNE, "--finetune", pruned]
    interrupted(monkeypatch, finetune_dense, flags, 30)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(finetune_dense, *flags)
    equal(runs["tuned"], only(pruned, "ft_dense_*"), "ft_checkpoint.pth")


def test_a_new_run_in_an_old_folder_sets_its_checkpoint_aside(runs, pruned, monkeypatch, capsys):
    """So that a restart never goes on from another run's end."""
    flags = [*TUNE, "--finetune", pruned]
    run(finetune_dense, *flags)
    interrupted(monkeypatch, finetune_dense, flags, 5)
    assert "its checkpoint is now ft_checkpoint.previous.pth" in capsys.readouterr().out
    folder = only(pruned, "ft_dense_*")
    equal_models = [
        torch.load(f, weights_only=True)["model"]
        for f in (folder / "ft_checkpoint.previous.pth", runs["tuned"] / "ft_checkpoint.pth")
    ]
    assert same(*equal_models)
    assert torch.load(folder / "ft_checkpoint.pth", weights_only=True)["step"] == 5


def test_other_hyper_parameters_are_each_named(runs, pruned, monkeypatch):
    interrupted(monkeypatch, finetune_dense, [*TUNE, "--finetune", pruned], 5)
    path = only(pruned, "ft_dense_*") / "ft_checkpoint.pth"
    changed = ["--smoothing", "0.2", "--batch-size", "32", "--kl_loss_coeff", "1", "--aa", "augmix"]
    with pytest.raises(BadArguments) as refused:
        run(finetune_dense, *TUNE, "--finetune", pruned, "--resume", path, *changed)
    (problem,) = refused.value.problems
    for words in (
        "--smoothing was 0.1, now 0.2",
        "global batch was 64, now 32",
        "--kl_loss_coeff was 10000.0, now 1",
        "--aa was '', now augmix",
    ):
        assert words in problem
    free = ["--num_workers", "1", "--log-interval", "7", "--batch-size", "32", "--grad-accum-steps", "2"]
    run(finetune_dense, *TUNE, "--finetune", pruned, "--resume", path, *free)


def test_the_evaluation_after_the_last_event_can_be_broken_off(prune, whole, tmp_path, monkeypatch):
    """The target is met, but top-1 is not measured yet."""
    evaluate, flags = main_full_global_latency.evaluate, [*prune, "--output_dir", tmp_path]
    updates = torch.load(only(whole, "global_*") / "checkpoint.pth", weights_only=True)["step"]
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 + updates // 22:  # the dense model's is the first, then one an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(main_full_global_latency, "evaluate", killed)
        run(main_full_global_latency, *flags)
    run(main_full_global_latency, *flags, "--resume")
    equal(only(whole, "global_*"), only(tmp_path, "global_*"), "pruned_checkpoint.pth")


def test_going_on_in_another_folder_takes_the_log_along(runs, pruned, monkeypatch, tmp_path):
    interrupted(monkeypatch, finetune_dense, [*TUNE, "--finetune", pruned], 30)
    first = only(pruned, "ft_dense_*")
    with open(first / "log.txt", "a") as log:
        log.write('{"epoch": 1, "train_lo')  # as a crash leaves it
    other = tmp_path / "other"
    shutil.copytree(pruned, other, ignore=shutil.ignore_patterns("ft_dense_*"))
    run(finetune_dense, *TUNE, "--finetune", other, "--resume", first / "ft_checkpoint.pth")
    equal(runs["tuned"], only(other, "ft_dense_*"), "ft_checkpoint.pth")


def test_another_number_of_updates_is_refused(runs, pruned, monkeypatch, tmp_path):
    interrupted(monkeypatch, finetune_dense, [*TUNE, "--finetune", pruned], 5)
    path = only(pruned, "ft_dense_*") / "ft_checkpoint.pth"
    content = checkpoint.load(path)
    content["metrics"]["updates"] = 20
    checkpoint.save(path, **content)
    with pytest.raises(BadArguments, match="an epoch had 20 updates, now 22"):
        run(finetune_dense, *TUNE, "--finetune", pruned, "--resume")


def test_progress_counts_whole_epochs_and_updates():
    progress = Progress(10, epoch=2, step=3)
    progress.meters.add(dict(loss=torch.tensor(2.0)), 4)
    state = progress.state_dict()
    assert state == dict(epoch=1, step=23, metrics=dict(running=dict(loss=[8.0, 4]), updates=10))
    again = Progress(10)
    again.load_state_dict(state)
    assert (again.epoch, again.step) == (2, 3) and again.meters.fetch() == dict(loss=2.0)
    again.next_epoch()
    assert again.state_dict() == dict(epoch=2, step=30, metrics=dict(running={}, updates=10))


def killed(command, moments):
    """Run a command, killing it with -9 at each of the moments (seconds after its start), until it has ended."""
    for moment in [*moments, None]:
        process = subprocess.Popen(command(), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(moment) == 0
            return
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_kill_9_at_random_moments(prune, whole, tmp_path):
    """Ten kills across prune and finetune; a run that has written nothing yet starts anew."""
    rng, flags = random.Random(time.time_ns()), [*map(str, prune), "--recovery-interval", "3"]
    broken = tmp_path / "broken"
    run(finetune_dense, *TUNE, "--finetune", only(whole, "global_*"))
    begun = time.monotonic()
    command = [sys.executable, "main_full_global_latency.py", *flags, "--output_dir", str(tmp_path / "timed")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begun

    def stage(script, arguments, folder, name):
        def command():
            resume = ["--resume"] if list(folder.glob(f"*/{name}")) else []
            return [sys.executable, script, *arguments, *resume]

        killed(command, [rng.uniform(0.3, 1.0) * seconds for _ in range(5)])

    stage("main_full_global_latency.py", [*flags, "--output_dir", str(broken)], broken, "checkpoint.pth")
    equal(only(whole, "global_*"), only(broken, "global_*"), "pruned_checkpoint.pth")
    stage(
        "finetune_dense.py",
        [*TUNE, "--recovery-interval", "3", "--finetune", str(only(broken, "global_*"))],
        only(broken, "global_*"),
        "ft_checkpoint.pth",
    )
    tuned = [only(only(f, "global_*"), "ft_dense_*") for f in (whole, broken)]
    equal(*tuned, "ft_checkpoint.pth")
    assert json.loads((tuned[1] / "summary.json").read_text())["finetuned"]["top1"]
