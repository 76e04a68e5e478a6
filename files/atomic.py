"""Atomic writes: a temporary file that is flushed to disk and then renamed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\..+\.(pth|json|txt|safetensors)\.([a-z0-9_]{8}|link)")  # as tempfile and `_set_aside` name
os.umask(_UMASK := os.umask(0))  # the mode that open() would give: temporary files are private


class _Patient:
    """A file that remembers the first write error: torch's C++ writer would report another one in its place."""

    def __init__(self, file: Any) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def older(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_suffix(".older.pth")


def write_atomically(path: str | Path, write: Any, keep_older: bool = False) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk and rename it.

    A reader sees the old file or the new one, never a part. keep_older: the old file becomes `older(path)`, and at any
    moment at least one of the two exists. Raises OSError.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            patient = _Patient(file)
            write(patient)
            if patient.error is not None:
                raise patient.error
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_UMASK)
            if keep_older and path.exists():
                _set_aside(path)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _flush_folder(path.parent)


def _set_aside(path: Path) -> None:
    """Keep `path` as `older(path)` too, without a moment in which neither exists."""
    link = path.with_name(f".{path.name}.link")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment only the older name exists
        os.replace(path, older(path))
    else:
        os.replace(link, older(path))


def name_also(path: Path, alias: str) -> None:
    """Let `alias` in the same folder name whatever is at `path`, now and later. Raises OSError.

    On a file system without symbolic links it is a copy.
    """
    other, link = path.with_name(alias), path.with_name(f".{alias}.link")
    if other.is_symlink() and os.readlink(other) == path.name:
        return
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(path.name)
    except OSError:
        shutil.copyfile(path, link)
    os.replace(link, other)


def aside(paths: Sequence[Path]) -> list[Path]:
    """New names for files or folders: `….previous…`, or where one of them is taken `….previous2…` and so on."""
    for number in itertools.count(1):
        mark = f".previous{number if number > 1 else ''}"
        found = [path.with_suffix(mark + path.suffix) for path in paths]
        if not any(path.exists() for path in found):
            return found


def _flush_folder(folder: Path) -> None:
    """Flush the renaming itself to disk, where the system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def clear_unfinished(folder: Path) -> None:
    """Remove the temporary files of a killed run. Call it only while this run holds the folder's lock."""
    for left in folder.glob(".*"):
        if _UNFINISHED.fullmatch(left.name):
            left.unlink(missing_ok=True)


def write_compact_json(path: str | Path, value: Any) -> None:
    """Write JSON without white space, atomically. Raises OSError."""
    write_atomically(path, lambda file: file.write(json.dumps(value, separators=(",", ":")).encode()))
