"""What one run of a script holds until it ends: its folders, its heartbeat, and its closing lines."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from files.locking import lock_folder
from runtime.console import complain
from runtime.elastic import Heartbeat
from runtime.ranks import is_main, rank


class Run:
    """The state that the modules of `runtime` share; only this object changes it.

    saved: what is on disk once training has ended, for the message of a later failure.
    """

    def __init__(self) -> None:
        self.heartbeat: Heartbeat | None = None
        self.saved = ""
        self._folders: contextlib.ExitStack | None = None
        self._last_words: list[Callable[[], str]] = []

    def begin(self) -> None:
        """Start a run: from now on, folders are locked."""
        self._folders = contextlib.ExitStack()

    def join(self, heartbeat: Heartbeat) -> None:
        """Keep the heartbeat of this process, which `end` stops."""
        self.heartbeat = heartbeat

    def lock(self, folder: Path) -> tuple[bool, str]:
        """(whether this run now holds the folder, a line about an earlier run or ''). Raises ValueError."""
        if self._folders is None or not is_main():
            return False, ""
        return True, self._folders.enter_context(lock_folder(folder))

    def remember_saved(self, line: str) -> None:
        """Note what is on disk; '' while training may still change it."""
        self.saved = line

    def say_at_end(self, line: Callable[[], str]) -> None:
        """Print what `line` returns when the run ends, however it ends; '' for nothing."""
        self._last_words.append(line)

    def say_last_words(self) -> None:
        """Print the closing lines, each once."""
        for line in dict.fromkeys(line() for line in self._last_words):
            if line:
                complain("warning", line if is_main() else f"rank {rank()}: {line}")
        self._last_words.clear()

    def end(self, reason: str) -> None:
        """Print the closing lines and release what the run holds. reason: why the run failed, '' if it did not."""
        self.say_last_words()
        for (
            reader
        ) in multiprocessing.active_children():  # workers survive SIGTERM, and this process would wait for them
            reader.kill()
        if self._folders is not None:
            self._folders.close()
            self._folders = None
        if self.heartbeat:
            self.heartbeat.stop(failure=reason)
        if dist.is_initialized():
            dist.destroy_process_group()


current = Run()
