"""What a run prints: lines on the main rank, warnings and errors, tables, and colour on terminals."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tqdm import tqdm

from runtime.ranks import is_main

CODES = dict(warning="1;33", error="1;31", result="1;32")  # bold yellow, red, green


def coloured(stream: TextIO) -> bool:
    """Whether to colour what goes to a stream: on a terminal that supports it, unless the environment says otherwise.

    NO_COLOR (https://no-color.org) takes precedence over FORCE_COLOR, and that over TERM=dumb, as in Python itself.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, kind: str, stream: TextIO) -> str:
    """`text` in the colour of its kind (warning, error or result), where `stream` takes colour."""
    return f"\033[{CODES[kind]}m{text}\033[0m" if coloured(stream) else text


def complaint(kind: str, text: str) -> str:
    """A line for stderr: kind (warning or error), a colon and the text."""
    return f"{paint(f'{kind}:', kind, sys.stderr)} {text}"


def complain(kind: str, text: str) -> None:
    """Print a warning or an error on stderr, at once."""
    print(complaint(kind, text), file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print on the main rank, at once and above the progress bar."""
    if is_main():
        tqdm.write(line)
        sys.stdout.flush()


def say_result(line: str) -> None:
    """Print the result of a run."""
    say(paint(line, "result", sys.stdout))


def say_next(*commands: str) -> None:
    """Print the commands to run next; they are given without `python`."""
    for command in commands:
        say(f"next: python {command}")


def warn(line: str) -> None:
    """Print a warning on the main rank, at once and above the progress bar."""
    if is_main():
        tqdm.write(complaint("warning", line), file=sys.stderr)
        sys.stderr.flush()


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Columns of plain text, right-aligned except for the first."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [headers, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(lines)
