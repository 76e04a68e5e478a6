"""An argument parser that explains itself, and the types of its values."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from options.ranges import Range
from runtime.console import complain
from runtime.elastic import report_to_launcher


def key_values(items: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE arguments as a dict, with values read as Python literals where possible. Raises ValueError."""
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag}: {item!r} is not of the form KEY=VALUE")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = text
    return pairs


@dataclass(frozen=True)
class Flag:
    """Facts about a flag that stand where it is declared, beyond what argparse takes.

    spelling: as users type it; check: what its value must be; path: it names a file or folder; may_differ: a run may be
    resumed with another value, because it changes how a step is computed and not what it computes.
    """

    spelling: str
    check: Range | None = None
    path: bool = False
    may_differ: bool = False


FLAGS: dict[str, Flag] = {}  # by argument: those of every parser that was made


class _Describes(argparse._ActionsContainer):
    """Takes the parts of a `Flag` with a flag's declaration."""

    def add_argument(
        self, *names: str, check: Range | None = None, path: bool = False, may_differ: bool = False, **kwargs: Any
    ) -> argparse.Action:
        """As argparse's, with the parts of a `Flag`."""
        action = super().add_argument(*names, **kwargs)
        if names and names[0].startswith("-"):
            known = FLAGS.get(action.dest)
            spelling = next((name for name in names if name.startswith("--")), names[0])
            if known:  # another script's flag of that name: what is said of one holds for both
                check, path, may_differ = check or known.check, path or known.path, may_differ or known.may_differ
            FLAGS[action.dest] = Flag(spelling, check, path, may_differ)
        return action


class _Group(_Describes, argparse._ArgumentGroup):
    """A named group of flags."""


class Parser(_Describes, argparse.ArgumentParser):
    """argparse's, with one line for a mistake, the closest flag for one that is unknown, and no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> argparse._ArgumentGroup:
        """As argparse's."""
        group = _Group(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; exits with code 2."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            flags = (word.partition("=")[0] for word in left if word.startswith("-"))
            close = (difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in flags)
            closest = ", ".join(name for names in close for name in names)
            self.error(f"unrecognized arguments: {' '.join(left)}{f'; closest: {closest}' if closest else ''}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line instead of a page of usage, from one process of a machine; exit code 2."""
        line = f"{message} (--help lists all)"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            complain("error", line)
        report_to_launcher(f"error: {line}")
        self.exit(2)


def boolean(text: str) -> bool:
    """True or False, as in `--student_eval=True`."""
    words = dict(true=True, yes=True, false=False, no=False) | {"1": True, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return words[text.lower()]


class KeyValues(argparse.Action):
    """`--model-kwargs img_size=32 depth=6`: a dict."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, key_values(values, option))
        except ValueError as error:
            parser.error(str(error))


class OneOrMore(argparse.Action):
    """`--latency_target 0.5`: a number; `--latency_target 0.8 0.5`: a list."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def flag(name: str) -> str:
    """How an argument is typed."""
    return FLAGS[name].spelling if name in FLAGS else f"--{name.replace('_', '-')}"


def new_parser(description: str, epilog: str = "", module: str = "") -> argparse.ArgumentParser:
    """module: of a program that runs with `python -m`."""
    return Parser(prog=f"python -m {module}" if module else None, description=description, epilog=epilog)


def amount(text: str) -> float:
    """A number that may end in K, M or G, as in `4.2G`."""
    factor = dict(K=1e3, M=1e6, G=1e9).get(text[-1:].upper(), 1)
    return float(text[:-1] if factor > 1 else text) * factor
