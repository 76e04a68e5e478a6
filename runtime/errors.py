"""Errors that a person can read: what ends a run, and what is wrong with its arguments."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in its arguments; exit code 1 with this one line."""


class FailedTogether(RunFailed):
    """One that every rank comes to alike: said once."""


class BadArguments(Exception):
    """Arguments that cannot work together or name what is not there; exit code 2, one line per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems:
    """Collects everything that is wrong with the arguments, so that it is reported at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The action's result, or None with its ValueError noted."""
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


def explained(error: BaseException | None) -> str:
    """One line for an error that is no bug: of the machine, or of a process that reads data; '' for any other."""
    if isinstance(error, OSError | torch.OutOfMemoryError | RunFailed):
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"a process that reads data died: {' '.join(str(error).split())[:200]}"
    return ""


def first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, 160, placeholder=" …")
