"""Faults in running jobs, some of every kind: the long run is benchmarks/faults.py."""

import pytest

import finetune_dense
import main_full_global_latency
from benchmarks import faults
from benchmarks.fault_jobs import Material
from benchmarks.fault_kinds import KINDS
from files import checkpoint

QUICK = ("kill -9 inside a save", "bit-flipped checkpoint", "SIGINT")  # on the job that prunes


@pytest.fixture(scope="module")
def material(runs, tmp_path_factory):
    return Material(
        tmp_path_factory.mktemp("faults"),
        1,
        main_full_global_latency,
        finetune_dense,
        runs["dense"] / "ft_checkpoint.pth",
        runs["pruned"] / "pruned_checkpoint.pth",
    )


@pytest.fixture(scope="module")
def references(material):
    """Undisturbed runs, made when they are asked for."""
    made = {}

    def reference(name):
        if name not in made:
            made[name] = faults.run_undisturbed(material, name)
        return made[name]

    return reference


@pytest.mark.parametrize("kind", QUICK)
def test_the_result_is_the_undisturbed_one(references, kind):
    row = faults.inject(references("prune"), kind, 1, seed=1)
    assert row["did"] and not row["failure"], row


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(references, kind):
    row = faults.inject(references(faults.OF_KIND.get(kind, "tune")), kind, 2, seed=2)
    assert row["did"] and not row["failure"], row


def test_a_wrong_result_is_noticed(references, monkeypatch):
    """A checkpoint whose weights were changed, with a checksum that fits."""

    def spoil(job, rng):
        job.run()
        (path,) = job.folder.glob("*/pruned_checkpoint.pth")
        (path.with_name("checkpoint.pth")).unlink()
        (path.with_name("checkpoint.older.pth")).unlink()
        monkeypatch.setattr(job, "run", lambda **_: None)
        content = checkpoint.load(path)
        content["model"]["norm.bias"] = content["model"]["norm.bias"] + 1
        checkpoint.save(path, **content)
        return "spoilt"

    monkeypatch.setitem(KINDS, "spoilt", spoil)
    row = faults.inject(references("prune"), "spoilt", 0, seed=0)
    assert row["failure"] == "other than the undisturbed run's: model"


def test_the_plan_and_the_table():
    kinds = list(KINDS)
    todo = faults.plan(kinds, 200)
    assert len(set(todo)) == 200 and {kind for kind, _ in todo} == set(kinds)
    rows = [dict(kind="SIGINT", failure="", seconds=2.0), dict(kind="SIGINT", failure="lost", seconds=4.0)]
    lines = faults.report(rows).splitlines()
    assert lines[2].split() == ["SIGINT", "2", "1", "1", "3.0"]
    assert lines[-1].split() == ["in", "all", "2", "1", "1", "3.0"]
