"""One run per folder: the second is told which process has it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold the folder's lock; gives a line to say where a run before ended without giving it back, else ''.

    The lock is the system's: it ends with the process, however that ends, and processes that it has started do not keep
    it. Raises ValueError, naming the process, where another has it.
    """
    handle = _open_locked(folder)
    if handle is None:
        yield f"{folder}: this file system has no locks, so that a second run in the folder would not be noticed"
        return
    with os.fdopen(handle, "r+") as file:
        left = _holder(file.read())
        file.seek(0)
        file.truncate()
        file.write(
            json.dumps(
                dict(
                    pid=os.getpid(),
                    host=socket.gethostname(),
                    since=time.strftime("%Y-%m-%d %H:%M:%S"),
                    command=sys.argv,
                )
            )
        )
        file.flush()
        try:
            yield f"{folder}: taken over from {left}, which ended without finishing" if left else ""
        finally:
            (folder / NAME).unlink(missing_ok=True)


def _open_locked(folder: Path) -> int | None:
    """The lock's file, None where the file system has no locks. Raises ValueError where another process has it."""
    path = folder / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with os.fdopen(handle) as file:
                holder = _holder(file.read()) or "another process"
            raise ValueError(
                f"output folder {folder} is in use by {holder}: wait for it, stop it, or choose another"
            ) from None
        except OSError:
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)  # the run before has just removed the file


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {int(found['pid'])} on {found['host']} since {found['since']}"
    except (ValueError, TypeError, KeyError):
        return ""
