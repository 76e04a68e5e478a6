"""What is read from files and command lines: no input ends in anything but a result or a user's error.

The long run: pytest tests/test_fuzz.py --hypothesis-profile long (10,000 examples a target); for ten minutes each,
benchmarks/fuzz_run.py.
"""

import pytest
from hypothesis import given

from benchmarks import fuzz_run
from benchmarks.fuzz_inputs import texts
from benchmarks.fuzz_targets import STRATEGIES, TARGETS, files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_a_users_error_comes_out(name):
    @given(STRATEGIES[name])
    def run(data):
        TARGETS[name](data)

    run()


def test_the_inputs_are_worth_it():
    """Some valid, some not: a generator of noise alone would find nothing."""
    from hypothesis import find

    from files.schema import SchemaError, parse_json
    from models.dims import DimsError, ViTDims

    def kind(text):
        try:
            ViTDims.from_dict(parse_json(text.decode(errors="replace")))
        except (DimsError, SchemaError) as error:
            return type(error)
        return None

    dims = dict(embed=8, blocks=[dict(heads=2, qk=4, v=4, mlp=32, tokens=6)])
    for wanted in (None, DimsError, SchemaError):
        find(texts([dims]), lambda text, wanted=wanted: kind(text) is wanted)
    assert find(files(), lambda data: data[:2] == b"PK")


@pytest.mark.slow
def test_a_fuzzer_for_some_seconds(capsys):
    fuzz_run.main(fuzz_run.get_args_parser().parse_args(["config", "--minutes", "0.001", "--with", "hypothesis"]))
    assert "config: 500 examples" in capsys.readouterr().out


def test_a_bug_is_found(monkeypatch):
    """A target that lets a TypeError out."""
    monkeypatch.setitem(TARGETS, "dims", lambda data: len(data) > 30 and (_ for _ in ()).throw(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        fuzz_run.with_hypothesis("dims", 0.05, 0)


def test_without_atheris_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(fuzz_run.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as end:
        fuzz_run.main(fuzz_run.get_args_parser().parse_args(["dims", "--with", "atheris"]))
    assert end.value.code == 2 and "atheris is not installed" in capsys.readouterr().err
