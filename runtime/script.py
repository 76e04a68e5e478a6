"""How a script runs: its main, its exit code, and one line instead of a traceback for anything but a bug."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from runtime.console import complain
from runtime.elastic import report_to_launcher
from runtime.errors import BadArguments, FailedTogether, explain
from runtime.ranks import is_main, rank
from runtime.run import current


def run_script(main: Callable[[Any], None], args: Any) -> None:
    """Run a script's main; a user's mistake or a failed run ends in one line per problem, never in a traceback."""
    reason = ""
    sys.unraisablehook = _say_unless_starting
    try:
        current.begin()
        main(args)
    except BadArguments as error:
        reason = "; ".join(error.problems)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of this machine would repeat it
            for problem in error.problems:
                complain("error", problem)
        report_to_launcher("\n".join(f"error: {problem}" for problem in error.problems))
        sys.exit(2)
    except KeyboardInterrupt:
        reason = "interrupted"
        print(
            "interrupted: work since the last checkpoint is lost; --resume continues from that checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(130)
    except Exception as error:
        together = isinstance(error, FailedTogether)
        line = explain(error) + (f"; {current.saved}" if current.saved and isinstance(error, OSError) else "")
        if not line and isinstance(error, RuntimeError):
            line = current.heartbeat.who_is_gone() if current.heartbeat else ""
        reason = "" if together else line or type(error).__name__
        if not line:
            report_to_launcher(traceback.format_exc().strip())
            raise
        _fail(line, said=is_main() or not together, reason=reason)
    finally:
        current.end(reason)


def _say_unless_starting(args: Any) -> None:
    """Python's own message, except for a loader thread that was just starting when a dead worker ended the run."""
    frames = traceback.extract_tb(args.exc_traceback)
    if not frames or frames[-1].name != "_bootstrap_inner":
        sys.__unraisablehook__(args)


def _fail(line: str, said: bool, reason: str) -> None:
    """Print one line and exit with code 1, at once where other ranks may wait in a collective that never ends."""
    if said:
        complain("error", line if is_main() else f"rank {rank()}: {line}")
        report_to_launcher(f"error: {line}")
    if current.heartbeat:
        current.say_last_words()
        current.heartbeat.stop(failure=reason)
        os._exit(1)
    sys.exit(1)
