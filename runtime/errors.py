"""Errors a person can read: why a run failed, and what is wrong with its arguments."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch


class RunFailed(RuntimeError):
    """A run that cannot continue although its arguments are right; exit code 1 and this line."""


class FailedTogether(RunFailed):
    """A failure that every rank detects alike, so that only the main rank reports it."""


class BadArguments(Exception):
    """Arguments that contradict each other or name something missing; exit code 2, one line per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems:
    """Collects everything that is wrong with the arguments, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of the action, or None after noting its ValueError."""
        try:
            return action(*args, **kwargs)
        except ValueError as error:
            self.add(" ".join(str(error).split()))
            return None

    def add(self, problem: str) -> None:
        if problem not in self.found:
            self.found.append(problem)

    def raise_if_any(self) -> None:
        if self.found:
            raise BadArguments(self.found)


def explain(error: BaseException | None) -> str:
    """One line for an error that is not a bug: of the machine, or of a data worker; '' for any other."""
    if isinstance(error, OSError | torch.OutOfMemoryError | RunFailed):
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"a data loader worker died: {' '.join(str(error).split())[:200]}"
    return ""


def first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, 160, placeholder=" …")
