"""What is public says what it is: docstrings, types, help of every flag."""

import argparse
import ast
import importlib
from pathlib import Path

import pytest
from test_imports import FILES, SCRIPTS

USUAL = {"main", "get_args_parser", "check_args", "forward", "state_dict", "load_state_dict"}  # known by their names
SHORT = 3  # statements up to which a name and its types may say it all


def functions(node, inside=""):
    """(dotted name, function, statements) of the public functions and methods of a module or class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from functions(child, f"{child.name}.")
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and child.name not in USUAL:
            yield inside + child.name, child, sum(isinstance(n, ast.stmt) for n in ast.walk(child)) - 1


LIBRARY = [name for name in FILES if not name.startswith("benchmarks")]


def public(name):
    return functions(ast.parse(FILES[name].read_text()))


@pytest.mark.parametrize("name", LIBRARY)
def test_public_functions_say_what_they_compute(name):
    silent = [called for called, function, length in public(name) if length > SHORT and not ast.get_docstring(function)]
    assert not silent and ast.get_docstring(ast.parse(FILES[name].read_text())), f"without docstring: {silent}"


@pytest.mark.parametrize("name", LIBRARY)
def test_public_functions_have_types(name):
    untyped = []
    for called, function, _ in public(name):
        named = [a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")]
        if any(a.annotation is None for a in named) or function.returns is None:
            untyped.append(called)
    assert not untyped, f"arguments or result without type: {untyped}"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_flag_has_help(name):
    module = importlib.import_module(name)
    parser = module.get_args_parser()
    assert parser.description
    for action in parser._actions:
        assert action.help and (action.help is argparse.SUPPRESS or len(action.help) > 5), action.dest


def test_the_reader_finds_what_is_missing(tmp_path):
    (path := Path(tmp_path / "odd.py")).write_text("def f(x):\n    a = x\n    b = a\n    c = b\n    return c\n")
    ((called, function, length),) = functions(ast.parse(path.read_text()))
    assert called == "f" and length == 4 > SHORT and function.returns is None
