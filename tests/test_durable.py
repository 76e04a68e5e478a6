"""Checkpoints that outlive damage, full disks and other runs: what is written, kept, fallen back to, and said."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import PRUNE, TRAIN, TUNE, run

import finetune_dense
import main_full_global_latency
from files import checkpoint
from files.atomic import older
from files.checkpoint import DamagedError
from files.locking import lock_folder
from pruning.saliency import Saliency
from runtime.errors import BadArguments, RunFailed
from runtime.folders import make_folder
from runtime.script import run_script
from training import provenance
from training.keeper import Keeper

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tuned(runs, tmp_path):
    """A finished finetuning run's copy, inside that of its pruned run: (flags, its folder)."""
    folder = tmp_path / "pruned"
    shutil.copytree(runs["pruned"], folder)
    (inner,) = folder.glob("ft_dense_*")
    return [*TUNE, "--finetune", folder], inner


def content(path):
    """Digest of everything but where the dense weights are."""
    found = checkpoint.load(path)
    return checkpoint.digest({key: found[key] for key in checkpoint.KEYS if key not in ("args", "format")})


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(b"" if how == "empty" else data[: len(data) // 3] if how == "truncated" else data)


@pytest.mark.parametrize(
    "how", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "empty", "gone"))]
)
def test_a_damaged_newest_falls_back_to_the_one_before(runs, tuned, how, capsys):
    flags, folder = tuned
    newest, before = folder / "ft_checkpoint.pth", folder / "ft_checkpoint.older.pth"
    assert (checkpoint.load(newest)["epoch"], checkpoint.load(before)["epoch"]) == (1, 0)
    newest.unlink() if how == "gone" else damage(newest, how)
    run(finetune_dense, *flags, "--resume")
    said = capsys.readouterr()
    (line,) = (text for text in said.err.splitlines() if "resuming from the one before it" in text)
    assert str(newest) in line and str(before) in line and "resumed: continuing with epoch 1" in said.out
    assert content(newest) == content(runs["tuned"] / "ft_checkpoint.pth")
    assert (folder / "ft_checkpoint.damaged.pth").exists() == (how != "gone")
    assert checkpoint.load(before)["epoch"] == 0  # the damaged one is never the one before


def test_both_damaged_is_an_error(tuned):
    flags, folder = tuned
    for path in folder.glob("ft_checkpoint*.pth"):
        damage(path, "flipped")
    with pytest.raises(BadArguments, match="damaged"):
        run(finetune_dense, *flags, "--resume")


def test_every_bit_of_the_tensors_counts(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, model=dict(w=torch.randn(50)), args=dict(lr=0.1))
    whole = path.read_bytes()
    place = whole.index(checkpoint.load(path)["model"]["w"].numpy().tobytes())
    for byte in range(place, place + 200):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        with pytest.raises(checkpoint.CheckpointError, match="checksum|finite"):
            checkpoint.load(path)


def test_there_is_always_one(tmp_path, monkeypatch):
    """At every step of a save a whole checkpoint lies under one of the two names; without links in the system, too."""
    path = tmp_path / "a.pth"
    seen = []

    def looking(action):
        def look(*args, **kwargs):
            seen.append({p.name for p in (path, older(path)) if p.exists() and checkpoint.load(p)})
            return action(*args, **kwargs)

        return look

    for name in ("replace", "link", "fsync"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
        for epoch in range(3):
            checkpoint.save(path, keep_older=True, epoch=epoch)
        assert [checkpoint.load(p)["epoch"] for p in (path, older(path))] == [2, 1]
    assert all(seen[2:]) and len(seen) > 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.older.pth", "a.pth"]


def test_another_runs_checkpoint_is_refused(tuned, tmp_path):
    """The flags are the same, the pruned model is not."""
    flags, folder = tuned
    pruned = checkpoint.load(folder.parent / "pruned_checkpoint.pth")
    pruned["model"]["cls_token"] = pruned["model"]["cls_token"] + 1e-3
    checkpoint.save(folder.parent / "pruned_checkpoint.pth", **pruned)
    with pytest.raises(BadArguments, match="was made from other weights than this run has"):
        run(finetune_dense, *flags, "--resume")


def full_disk(limit):
    """No file larger than that, in this process, until it is undone."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit else hard, hard))


@pytest.mark.parametrize("errors", ["stop", pytest.param("warn", marks=pytest.mark.slow)])
def test_a_full_disk(runs, tmp_path, errors, monkeypatch, capsys):
    """Full in the second epoch: the run stops with what is safe, or goes on until there is room again."""
    folder = tmp_path / "pruned"
    folder.mkdir()
    shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", folder)
    original = Keeper.after_step

    def after_step(self):
        full = self.progress.epoch == 1 and self.progress.step < 20
        full_disk(20_000 if full else 0)
        original(self)

    flags = [*TUNE, "--finetune", folder, "--recovery-interval", "9", "--checkpoint_errors", errors]
    args = finetune_dense.get_args_parser().parse_args(list(map(str, flags)))
    try:
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(Keeper, "after_step", after_step)
            run_script(finetune_dense.main, args)
            assert errors == "warn"
    finally:
        full_disk(0)
    said = capsys.readouterr().err
    (path,) = folder.glob("ft_dense_*/ft_checkpoint.pth")
    assert f"cannot write to {path.parent}: File too large" in said and f"the last good checkpoint is {path}" in said
    assert not list(path.parent.glob(".ft_*"))
    if errors == "stop":
        assert checkpoint.load(path)["epoch"] == 0 and "Traceback" not in said
        run(finetune_dense, *TUNE, "--finetune", folder, "--recovery-interval", "9", "--resume")
    equal = [torch.load(p, weights_only=True)["model"] for p in (path, runs["tuned"] / "ft_checkpoint.pth")]
    assert all(torch.equal(equal[0][name], equal[1][name]) for name in equal[1])


@pytest.mark.slow
def test_an_end_that_cannot_be_written_is_no_success(runs, tmp_path, monkeypatch):
    shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", tmp_path)
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunFailed, match="No space left; no checkpoint was written yet"):
        run(finetune_dense, *TUNE, "--finetune", tmp_path, "--checkpoint_errors", "warn")


@pytest.mark.slow
def test_a_new_run_does_not_show_an_earlier_ones_results(tuned, monkeypatch):
    flags, folder = tuned

    def crash(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "after_step", crash)
    with pytest.raises(KeyboardInterrupt):
        run(finetune_dense, *flags)
    there = {p.name for p in folder.iterdir()}
    assert not there & {"summary.json", "dims.json", "ft_best.pth", "ft_checkpoint.pth", "ft_checkpoint.older.pth"}
    assert {"summary.previous.json", "ft_best.previous.pth", "ft_checkpoint.previous.pth"} <= there


@pytest.mark.slow
def test_equal_runs_write_equal_files(runs, tmp_path):
    """Dense training, pruning and finetuning again, elsewhere, from the same table."""
    root = tmp_path / "elsewhere"
    run(finetune_dense, *TRAIN, "--output_dir", root / "dense")
    (dense,) = (root / "dense").glob("scratch_*")
    run(
        main_full_global_latency,
        *PRUNE,
        "--initial-checkpoint",
        dense / "ft_checkpoint.pth",
        "--output_dir",
        root,
        "--latency_look_up_table",
        runs["table"],
    )
    (pruned,) = root.glob("global_prune_*")
    run(finetune_dense, *TUNE, "--finetune", pruned)
    (tuned,) = pruned.glob("ft_dense_*")
    for ours, theirs in ((dense, runs["dense"]), (tuned, runs["tuned"])):
        files = [hashlib.sha256((f / "ft_checkpoint.pth").read_bytes()).hexdigest() for f in (ours, theirs)]
        assert files[0] == files[1]
    run(finetune_dense, "--eval", "--finetune", tuned, *TUNE)  # the dense weights are found from there


@pytest.mark.slow
def test_what_is_needed_to_repeat_a_run(runs, tuned, monkeypatch):
    flags, folder = tuned
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__.split("+")[0] or start["versions"]["torch"]
    assert start["data"]["train"]["images"] == 1437 and start["threads"] == torch.get_num_threads()
    assert set(start["inputs"]) == {"training images", "validation images", "weights", "teacher"}
    assert start["command"] and start["device"] and start["when"]
    run(finetune_dense, *flags, "--resume")
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 2
    monkeypatch.setenv("PATH", "")
    assert provenance.revision() is None


class TestLock:
    def test_the_second_run_is_told_who_has_the_folder(self, tmp_path):
        code = (
            "import sys, time; sys.path.insert(0, '.')\nfrom pathlib import Path\n"
            "from runtime import folders, script\n"
            "def main(path):\n    folders.make_folder(Path(path))\n    print('held', flush=True)\n"
            "    time.sleep(60)\n"
            "script.run_script(main, sys.argv[1])\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert first.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {first.pid} on \S+ since"):
                with lock_folder(tmp_path):
                    pass
            first.send_signal(signal.SIGKILL)
            first.wait()
            with lock_folder(tmp_path) as note:  # the lock of a process that is gone
                assert f"taken over from process {first.pid}" in note and "ended without finishing" in note
        finally:
            first.kill()
        with lock_folder(tmp_path) as note:
            assert note == ""
        assert not list(tmp_path.iterdir())

    def test_what_a_killed_run_was_writing_is_removed(self, tmp_path, monkeypatch):
        (tmp_path / ".ft_checkpoint.pth.abcd12_z").write_text("half")
        (tmp_path / "checkpoint.pth").write_text("whole")
        run_script(lambda path: make_folder(path), tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_ctrl_c_writes_a_checkpoint_first(runs, tmp_path, monkeypatch, capsys):
    shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", tmp_path)
    original, done = Keeper.after_step, []

    def after_step(self):
        done.append(1)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(Keeper, "after_step", after_step)
    with pytest.raises(SystemExit) as stopped:
        run(finetune_dense, *TUNE, "--finetune", tmp_path)
    assert stopped.value.code == 130 and "stopped by SIGINT" in capsys.readouterr().out
    (path,) = tmp_path.glob("ft_dense_*/ft_checkpoint.pth")
    assert checkpoint.load(path)["step"] == 5


def test_a_saliency_that_is_not_finite_stops_the_run_at_its_next_event(runs, tmp_path, monkeypatch):
    step = Saliency.step

    def spoilt(self):
        if self.steps == 1:
            self._constant[40] = float("inf")
        step(self)

    monkeypatch.setattr(Saliency, "step", spoilt)
    flags = [
        *PRUNE,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--output_dir",
        tmp_path,
        "--latency_look_up_table",
        runs["table"],
    ]
    with pytest.raises(RunFailed, match=r"event 1: the saliency of blocks\.0\.\w+ was not finite"):
        run(main_full_global_latency, *flags)


def test_states_that_do_not_fit_are_one_line(tuned):
    flags, folder = tuned
    tuned = checkpoint.load(folder / "ft_checkpoint.pth") | dict(optimizer=dict(state={}, param_groups=[]))
    checkpoint.save(folder / "ft_checkpoint.pth", **tuned)
    with pytest.raises(RunFailed, match="cannot resume from .*: ValueError"):
        run(finetune_dense, *flags, "--resume")


@pytest.mark.slow
def test_a_summary_that_is_none_costs_no_result(tuned, capsys):
    flags, folder = tuned
    (folder.parent / "summary.json").write_text('{"pruned": {"batch": 1000000000')
    run(finetune_dense, *flags, "--resume")
    assert list(json.loads((folder / "summary.json").read_text())) == ["finetuned"]
    assert "is left out of this run's summary: is not JSON" in capsys.readouterr().err


def test_damage_is_told_from_other_files(tmp_path):
    checkpoint.save(tmp_path / "a.pth", epoch=1)
    damage(tmp_path / "a.pth", "truncated")
    with pytest.raises(DamagedError):
        checkpoint.load(tmp_path / "a.pth")
    torch.save(dict(epoch=1), tmp_path / "b.pth")
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load(tmp_path / "b.pth")
    assert not isinstance(error.value, DamagedError)


def test_a_thread_that_was_just_starting_prints_no_traceback():
    """A signal handler that raises inside Thread.start leaves the new thread without its place: CPython's KeyError."""
    code = """
import _thread, threading, time
from runtime import errors, script
def main(args):
    _thread.start_new_thread(threading.Thread(target=print)._bootstrap, ())
    time.sleep(0.2)
    {}
    raise errors.RunFailed("a data loader worker died")
script.run_script(main, None)
"""
    for more, shown in (("pass", False), ("_thread.start_new_thread(int, ('no number',)); time.sleep(0.2)", True)):
        done = subprocess.run([sys.executable, "-c", code.format(more)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "error: a data loader worker died" in done.stderr
        assert ("Exception ignored" in done.stderr) == shown and "_limbo" not in done.stderr, done.stderr


def test_no_process_is_waited_for_that_outlives_sigterm():
    """Where a data worker dies while the others start, nobody has asked those to end."""
    code = (
        "import multiprocessing, signal, sys, time; sys.path.insert(0, '.')\nfrom runtime import script\n"
        "def stay():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(100)\n"
        "def main(_):\n    multiprocessing.get_context('fork').Process(target=stay, daemon=True).start()\n"
        "    time.sleep(0.5)\n"
        "    raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed.')\n"
        "script.run_script(main, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == ("error: a data loader worker died: DataLoader worker (pid 1) is killed by signal: Killed.\n")
