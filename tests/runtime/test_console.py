"""What a run says: where everything is, which command comes next, in colour where it is seen; help with examples."""

import argparse
import importlib
import io
import re
import shlex
import sys

import pytest
from test_imports import SCRIPTS
from test_readme import PARSERS
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import engine
from runtime import console
from runtime.console import say, say_result, warn
from runtime.errors import BadArguments, RunFailed
from runtime.folders import append_log
from runtime.script import run_script
from training import results

TRAINING = ("main_full_global_latency", "finetune_dense", "revit_scratch", "main_savit", "main_savit_deploy")


def test_the_next_commands_can_be_typed(runs, tmp_path, capsys):
    args = argparse.Namespace(data_set="IMNET", data_path=str(tmp_path / "my images"))
    command = f"finetune_dense.py --finetune {runs['pruned']} {results.data_flags(args)}"
    results.say_where(runs["tuned"], command, *results.after_training(runs["tuned"]), *results.after_dense(tmp_path))
    first, *following = capsys.readouterr().out.splitlines()
    assert "ft_checkpoint.pth" in first and "summary.json" in first and f"--logdir {runs['tuned']}" in first
    words = [shlex.split(line.removeprefix("next: python ").removeprefix("-m ")) for line in following]
    parsed = [PARSERS[script].get_args_parser().parse_args(flags) for script, *flags in words]
    assert parsed[0].data_path == args.data_path and parsed[1].runs == [runs["tuned"]]
    assert parsed[3].initial_checkpoint == str(tmp_path / "ft_checkpoint.pth") and "lock" not in first
    assert parsed[2].checkpoint == str(runs["tuned"] / "ft_checkpoint.pth")


def test_curves_are_named_where_there_are_any(tmp_path, capsys):
    (tmp_path / "dims.json").touch()
    results.say_where(tmp_path)
    assert capsys.readouterr().out == f"in {tmp_path}: dims.json\n"


@pytest.mark.parametrize("name", TRAINING)
def test_help_is_grouped_and_has_an_example(name):
    text = importlib.import_module(name).get_args_parser().format_help()
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert {"model:", "data:", "run:"} <= set(groups) and f"python {name}.py --" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_on_a_terminal_only(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    stream.isatty = lambda: terminal
    for _ in engine.progress_bar(range(3), 3, "epoch 0"):
        pass
    assert ("epoch 0" in stream.getvalue() and "<" in stream.getvalue()) == terminal  # time left stands after <


@pytest.fixture
def terminal(monkeypatch):
    """A stream that is one or is none, under what the environment says of colour."""

    def make(isatty, **environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stream = io.StringIO()
        stream.isatty = lambda: isatty
        return stream

    return make


@pytest.mark.parametrize(
    "isatty, environment, wanted",
    [
        (True, dict(TERM="xterm"), True),
        (True, {}, True),
        (False, dict(TERM="xterm"), False),
        (True, dict(TERM="dumb"), False),
        (True, dict(NO_COLOR="1"), False),
        (True, dict(NO_COLOR="0"), False),
        (True, dict(NO_COLOR=""), True),
        (False, dict(FORCE_COLOR="1"), True),
        (False, dict(FORCE_COLOR=""), False),
        (False, dict(FORCE_COLOR="1", TERM="dumb"), True),
        (True, dict(NO_COLOR="1", FORCE_COLOR="1"), False),
    ],
)
def test_colour_is_for_terminals_and_for_those_who_ask(terminal, isatty, environment, wanted):
    stream = terminal(isatty, **environment)
    assert console.coloured(stream) == wanted
    assert console.paint("done", "result", stream) == ("\033[1;32mdone\033[0m" if wanted else "done")


@pytest.mark.parametrize("isatty", [True, False])
def test_warnings_errors_and_the_result_have_their_colours(terminal, monkeypatch, isatty):
    out, err = terminal(isatty), terminal(isatty)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main(args):
        warn("mind")
        say("so far")
        say_result("done")
        raise RunFailed("no")

    with pytest.raises(SystemExit):
        run_script(main, None)
    yellow, red, green, end = ("\033[1;33m", "\033[1;31m", "\033[1;32m", "\033[0m") if isatty else [""] * 4
    assert err.getvalue() == f"{yellow}warning:{end} mind\n{red}error:{end} no\n"
    assert out.getvalue() == f"so far\n{green}done{end}\n"


def test_log_files_have_no_colour(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    append_log(tmp_path, epoch=0, note="done")
    assert "\033" not in (tmp_path / "log.txt").read_text()


def test_a_mistyped_flag_is_told_the_closest_in_one_line(capsys):
    parser = importlib.import_module("main_full_global_latency").get_args_parser()
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--latency-target=0.5", "--qqqq", "stray"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "error: unrecognized arguments: --latency-target=0.5 --qqqq stray; closest: --latency_target "
        "(--help lists all)\n"
    )


PEOPLE = sorted(name for name in SCRIPTS if not name.startswith("benchmarks"))


@pytest.mark.parametrize("name", PEOPLE)
def test_help_has_an_example_that_can_be_typed(name):
    parser = importlib.import_module(name).get_args_parser()
    text = parser.format_help()
    commands = re.split(r"^(?:examples?:)? +(?=python )", text[text.rindex("example") :], flags=re.M)[1:]
    assert commands and text.startswith("usage: ")
    for line in (command.partition("\n\n")[0] for command in commands):
        words = shlex.split(line)[1:]
        program = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        assert program == name
        parser.parse_args(words[2 if words[0] == "-m" else 1 :])  # exits at what it does not know


@pytest.mark.parametrize("name", PEOPLE)
def test_many_flags_are_grouped(name):
    parser = importlib.import_module(name).get_args_parser()
    ungrouped = [action for action in parser._optionals._group_actions if action.dest != "help"]
    assert len(ungrouped) <= 6, [action.dest for action in ungrouped]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (BadArguments(["--seed is wrong", "--lr is wrong"]), 2, "error: --seed is wrong\nerror: --lr is wrong"),
        (RunFailed("the disk is full"), 1, "error: the disk is full"),
        (KeyError("a bug"), 1, "KeyError: 'a bug'"),
    ],
)
def test_the_launcher_is_told_why_a_run_ends(error, code, line, tmp_path, monkeypatch):
    """As torch.distributed.elastic's @record does, so that torchrun's report, which comes last, closes with it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fail(_):
        raise error

    with pytest.raises((SystemExit, KeyError)) as ended:
        run_script(fail, None)
    assert getattr(ended.value, "code", 1) == code
    failure = ProcessFailure(0, 1, code, str(tmp_path / "error.json"))
    report = ChildFailedError("script", {0: failure}).format_msg()
    assert report.rstrip("=\n").endswith(line.replace("\n", "\n  "))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_a_machine_names_a_mistyped_flag(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("finetune_dense").get_args_parser().parse_args(["--epoch", "3"])
    line = "error: unrecognized arguments: --epoch 3; closest: --epochs (--help lists all)"
    assert ended.value.code == 2 and capsys.readouterr().err == (f"{line}\n" if rank == "0" else "")
    assert ProcessFailure(0, 1, 2, str(tmp_path / "error.json")).message["message"] == line
