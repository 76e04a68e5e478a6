"""The processes of `benchmarks/faults.py`: scripts in forks of this process, which can be killed at any point."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from runtime.script import run_script
from training.results import Effort

QUICK = Effort(builds=1, rounds=1)  # what a run measures at its end is not compared


class Process:
    """A forked process that runs a script's main, in a session of its own."""

    def __init__(
        self, script: Any, flags: list[str], log: Path, patch: Callable[[], None] | None, environment: dict[str, str]
    ) -> None:
        self.log, self.code = log, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(script, flags, patch, environment)

    def _become(
        self, script: Any, flags: list[str], patch: Callable[[], None] | None, environment: dict[str, str]
    ) -> None:
        code = 1
        try:
            os.setsid()
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(environment)
            sys.argv = [script.__file__, *flags]
            if patch:
                patch()
            run_script(partial(script.main, effort=QUICK), script.get_args_parser().parse_args(flags))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code or 0)

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: of a signal), or None where it still runs after so long."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)  # what it had started
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> list[int]:
        with contextlib.suppress(OSError):
            return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        return []
