"""What a run says: where everything is, which command comes next, and help with examples."""
import argparse
import importlib
import io
import shlex
import sys

import pytest
from test_readme import PARSERS

import engine
import results

TRAINING = ("main_full_global_latency", "finetune_dense", "revit_scratch", "main_savit", "main_savit_deploy")


def test_the_next_commands_can_be_typed(runs, tmp_path, capsys):
    args = argparse.Namespace(data_set="IMNET", data_path=str(tmp_path / "my images"))
    command = f"finetune_dense.py --finetune {runs['pruned']} {results.data_flags(args)}"
    results.say_where(runs["tuned"], command, *results.after_training(runs["tuned"]))
    first, *following = capsys.readouterr().out.splitlines()
    assert "ft_checkpoint.pth" in first and "summary.json" in first and f"--logdir {runs['tuned']}" in first
    words = [shlex.split(line.removeprefix("next: python ").removeprefix("-m ")) for line in following]
    parsed = [PARSERS[script].get_args_parser().parse_args(flags) for script, *flags in words]
    assert parsed[0].data_path == args.data_path and parsed[1].runs == [runs["tuned"]]
    assert parsed[2].checkpoint == str(runs["tuned"] / "ft_checkpoint.pth")


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
