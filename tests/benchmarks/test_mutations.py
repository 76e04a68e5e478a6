"""The table of mutations fits the code, and says who killed a mutation and which one survived."""

import ast
import subprocess

import pytest

from benchmarks import mutations
from benchmarks.mutation_table import MUTATIONS, Mutation
from benchmarks.mutations import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_can_be_made_and_its_tests_are_fast_ones(mutation, tmp_path):
    assert not mutation.missing(ROOT)
    mutated = tmp_path / mutation.file
    mutated.parent.mkdir(exist_ok=True)
    mutated.write_text(source := (ROOT / mutation.file).read_text())
    assert mutation.apply_(tmp_path) == source != mutated.read_text()
    ast.parse(mutated.read_text())
    for path, name in (test.split("::") for test in mutation.tests):
        functions = {node.name: node for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert not any("slow" in ast.unparse(decorator) for decorator in functions[name].decorator_list)


def test_names_differ():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one line and one test, with a mutation that the test sees and one that it does not."""
    (tmp_path / "sums.py").write_text("x = 1 + 2\n")
    (tmp_path / "test_sums.py").write_text("import sums\n\n\ndef test_sum():\n    assert sums.x == 3\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    table = [Mutation(n, "sums.py", e, ("test_sums.py",)) for n, e in (("less", {"+": "-"}), ("same", {"+ 2": "* 3"}))]
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "MUTATIONS", table)
    return tmp_path


def run(*words):
    """The exit code."""
    with pytest.raises(SystemExit) as end:
        mutations.main(mutations.get_args_parser().parse_args(words))
    return end.value.code


def test_killed_and_survived(project, capsys):
    before = (project / "sums.py").read_text()
    assert run() == 1
    printed = ["less: killed by test_sums.py::test_sum", "same: SURVIVED", "1 of 2 killed"]
    assert capsys.readouterr().out.splitlines() == printed
    assert (project / "sums.py").read_text() == before


def test_a_table_that_has_rotten_says_where(project):
    (project / "sums.py").write_text("x = 1 + 2 + 0\n")
    assert run("less") == "less: not exactly once in sums.py: '+'"
    assert run("other") == "no mutation is called other; --list names them"


def test_the_list_runs_nothing(project, capsys):
    mutations.main(mutations.get_args_parser().parse_args(["--list"]))
    assert capsys.readouterr().out == "less: sums.py\nsame: sums.py\n"
