"""What one run of a script holds until it ends: its folders, its heartbeat, and the lines it says last."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from files.locking import locked
from runtime.console import complain
from runtime.elastic import Heartbeat
from runtime.ranks import is_main, rank


class Run:
    """The state that the modules of `runtime` share, with this object as its only writer.

    saved: what is on disk once training is over, for the message of a failure after it.
    """

    def __init__(self) -> None:
        self.heartbeat: Heartbeat | None = None
        self.saved = ""
        self._folders: contextlib.ExitStack | None = None
        self._last_words: list[Callable[[], str]] = []

    def begin(self) -> None:
        """Folders are locked from here on."""
        self._folders = contextlib.ExitStack()

    def join(self, heartbeat: Heartbeat) -> None:
        """Keep this process's heartbeat, to be stopped at the end."""
        self.heartbeat = heartbeat

    def lock(self, folder: Path) -> tuple[bool, str]:
        """(whether the folder is now this run's, a line to say about the run before it or ''). Raises ValueError."""
        if self._folders is None or not is_main():
            return False, ""
        return True, self._folders.enter_context(locked(folder))

    def remember_saved(self, line: str) -> None:
        """Note what is on disk; '' while training may still change it."""
        self.saved = line

    def say_at_end(self, line: Callable[[], str]) -> None:
        """Have this process say a line when the run ends, however that happens; '' for nothing."""
        self._last_words.append(line)

    def say_last_words(self) -> None:
        """Say what was left for the end, each line once."""
        for line in dict.fromkeys(line() for line in self._last_words):
            if line:
                complain("warning", line if is_main() else f"rank {rank()}: {line}")
        self._last_words.clear()

    def end(self, reason: str) -> None:
        """Say the last words and release what the run holds. reason: why it failed, '' where it did not."""
        self.say_last_words()
        for reader in multiprocessing.active_children():  # they outlive SIGTERM, and this process would wait for them
            reader.kill()
        if self._folders is not None:
            self._folders.close()
            self._folders = None
        if self.heartbeat:
            self.heartbeat.stop(failure=reason)
        if dist.is_initialized():
            dist.destroy_process_group()


current = Run()
