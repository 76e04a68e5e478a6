"""The folder of a run: create it, lock it, and write its files atomically on the main rank."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from files.atomic import clear_unfinished, write_atomically
from runtime.console import say
from runtime.ranks import is_main
from runtime.run import current


def make_folder(path: Path, lock: bool = True) -> Path:
    """Create the folder of a run, check that it can be written, and lock it until the run ends. Raises ValueError.

    lock: False for a program that only adds to a finished run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {path} cannot be written: {error.strerror}") from None
    if lock:
        own, note = current.lock(path)
        if note:
            say(note)
        if own:
            clear_unfinished(path)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, on the main rank."""
    if is_main():
        write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically, on the main rank."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_log(folder: Path, **line: Any) -> None:
    """Append one JSON object to log.txt, completely or not at all, on the main rank."""
    if is_main():
        with open(folder / "log.txt", "ab", buffering=0) as file:
            before = file.tell()
            text = (json.dumps(line) + "\n").encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
