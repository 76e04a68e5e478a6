"""What a person at a terminal gets beside the words: colour where they see it, and flags that explain themselves."""
from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

CODES = dict(warning="1;33", error="1;31", result="1;32")  # bold yellow, red, green


def coloured(stream: TextIO) -> bool:
    """Whether colour belongs on a stream: on a terminal that knows it, unless the environment says otherwise.

    NO_COLOR (https://no-color.org) goes before FORCE_COLOR, and that before TERM=dumb, as in Python's own programs.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, kind: str, stream: TextIO) -> str:
    """`text` as it goes to `stream`, in the colour of its kind: warning, error or result."""
    return f"\033[{CODES[kind]}m{text}\033[0m" if coloured(stream) else text


def complaint(kind: str, text: str) -> str:
    """A line for stderr: kind (warning or error), a colon and the text."""
    return f"{paint(f'{kind}:', kind, sys.stderr)} {text}"


def complain(kind: str, text: str) -> None:
    """Say a warning or an error, at once."""
    print(complaint(kind, text), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse's, with one line for a mistake, the closest flag for one that is unknown, and no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; exits with code 2."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            flags = (word.partition("=")[0] for word in left if word.startswith("-"))
            close = (difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in flags)
            closest = ", ".join(name for names in close for name in names)
            self.error(f"unrecognized arguments: {' '.join(left)}{f'; closest: {closest}' if closest else ''}")
        return found

    def error(self, message: str) -> NoReturn:
        """One line instead of a page of usage; exit code 2."""
        complain("error", f"{message} (--help lists all)")
        self.exit(2)
