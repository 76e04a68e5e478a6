"""Runs that share a folder: each finds its own files alone, and none overwrites what another one finished."""

from __future__ import annotations

import pytest

from training import resuming

FINISHED = dict(
    prune=("checkpoint.pth", resuming.PRUNED),
    savit=("pruned_checkpoint.pth", (*resuming.PRUNED, "importance.json")),
    tune=("ft_checkpoint.pth", resuming.TUNED),
)
LOGS = ("log.txt", "args.json", "run.json", "debug/debugOutput_pruning_00000001.txt", "logs/savit.log")
CURVES = "events.out.tfevents.1.host.2.0"


def write_run(folder, names, text):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def texts(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", FINISHED)
def test_every_seed_of_several_is_kept(tmp_path, kind, capsys):
    name, results = FINISHED[kind]
    files = {name, *results, *resuming.SUMMARY, *resuming.RECORDS, *(LOGS if kind != "tune" else ())} - {
        "debug",
        "logs",
    }
    for seed in "0123":
        resuming.start_anew(tmp_path, name, results)
        assert not (tmp_path / name).exists() and not (tmp_path / "log.txt").exists()
        write_run(tmp_path, {*files, CURVES}, seed)
    found = texts(tmp_path)
    for mark, seed in (("", "3"), (".previous", "0"), (".previous2", "1"), (".previous3", "2")):
        for path in files:
            stem, dot, suffix = path.partition("/") if "/" in path else path.rpartition(".")
            assert found.pop(f"{stem}{mark}{dot}{suffix}") == seed
        assert found.pop(f"curves{mark}/{CURVES}" if mark else CURVES) == seed
    assert not found
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{tmp_path} holds an earlier run: its checkpoint is now {name[:-4]}.previous3.pth"


def test_a_run_leaves_what_it_starts_from(tmp_path):
    """Pruned and finetuned in one folder: the pruned checkpoint and the summary that finetuning adds to stay."""
    pruned = {*resuming.PRUNED, "importance.json"} - {"debug", "logs"}
    write_run(tmp_path, {*pruned, *LOGS}, "pruned")
    resuming.start_anew(tmp_path, "ft_checkpoint.pth")
    kept = {*pruned, *LOGS[3:], "args.previous.json", "log.previous.txt", "run.previous.json"}
    assert kept <= texts(tmp_path).keys() and not {"args.json", "log.txt"} & texts(tmp_path).keys()


def test_a_run_that_finished_nothing_is_cleared(tmp_path, capsys):
    write_run(tmp_path, {*LOGS, CURVES}, "broken off")
    resuming.start_anew(tmp_path, "checkpoint.pth", resuming.PRUNED)
    assert texts(tmp_path).keys() == {"args.json", "run.json", "logs/savit.log"}  # which the new run writes
    assert not capsys.readouterr().out
