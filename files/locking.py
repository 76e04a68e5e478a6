"""One run per folder: a second run is told which process holds it."""

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
def lock_folder(folder: Path) -> Iterator[str]:
    """Hold the lock of a folder. Yields a line to print if an earlier run ended without releasing it, else ''.

    The operating system holds the lock: it ends with this process, however that ends, and child processes do not keep
    it. Raises ValueError, naming the process, if another one holds the lock.
    """
    handle = _open_lock(folder)
    if handle is None:
        yield f"{folder}: this file system has no locks, so a second run in this folder would go unnoticed"
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


def _open_lock(folder: Path) -> int | None:
    """Descriptor of the lock file, None on a file system without locks. Raises ValueError if the lock is taken."""
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
        os.close(handle)  # an earlier run has just removed the file


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {int(holder['pid'])} on {holder['host']} since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return ""
