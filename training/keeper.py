"""When a run writes its checkpoints: inside an epoch, at its end, and when a signal asks the run to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import Progress
from files import checkpoint
from files.atomic import older
from runtime import elastic
from runtime.console import say, warn
from runtime.errors import RunFailed, explain
from runtime.ranks import check_identical
from runtime.run import current


class Keeper:
    """Writes a run's checkpoints: every `interval` updates, when a signal asks the run to end, and on `write`.

    A context around the training loop; a run that fails in there names its last good checkpoint. errors: what a
    checkpoint that cannot be written does, "stop" the run or "warn".
    """

    def __init__(
        self, progress: Progress, path: Path, interval: int, save: Callable[[], None], errors: str = "stop"
    ) -> None:
        self.progress, self.path, self.interval, self.save, self.errors = progress, path, interval, save, errors
        self.request = elastic.StopRequest()
        self.unwritten = ""  # why the newest state is on no disk

    def __enter__(self) -> None:
        check_identical("epoch and update to resume with", repr((self.progress.epoch, self.progress.step)).encode())
        self.request.listen()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self.request.close(waiting=error is None)
        if error is None and self.unwritten:
            self.errors = "stop"
            try:
                self.write()
            except RunFailed as failed:
                error = failed
        current.remember_saved(self._safe() if error is None else "")
        if isinstance(error, RunFailed):
            raise type(error)(f"{error}; {self._safe()}") from error
        if reason := explain(error):
            raise RunFailed(f"{reason}; {self._safe()}") from error

    def _safe(self) -> str:
        """What is on the disk."""
        last = next((path for path in (self.path, older(self.path)) if path.exists()), None)
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Whether the action, which writes, went well. Raises RunFailed where it did not, unless errors are to warn."""
        try:
            action(*args, **kwargs)
        except checkpoint.CheckpointError as error:
            raise RunFailed(str(error)) from None
        except OSError as error:
            self.unwritten = f"cannot write to {self.path.parent}: {error.strerror or error}"
            if self.errors == "stop":
                raise RunFailed(self.unwritten) from None
            warn(f"{self.unwritten}; the run continues, and {self._safe()}")
            return False
        return True

    def write(self) -> None:
        """A checkpoint of how things stand. Raises RunFailed."""
        if self.attempt(self.save):
            self.unwritten = ""

    def after_step(self) -> None:
        """Called after every update, by all ranks. Raises elastic.Terminated."""
        if number := self.request.poll():
            self._end(elastic.Terminated(number))
        if self.interval and self.progress.step % self.interval == 0:
            self.write()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around evaluation, which a signal may break off: it is done again."""
        try:
            with self.request.at_once():
                yield
        except elastic.Terminated as request:
            self._end(request)

    def _end(self, request: elastic.Terminated) -> None:
        self.errors = "stop"  # nothing is written after this
        self.write()
        say(f"stopped by {request.signal}: {self.path} is written; continue with --resume")
        raise request
