"""What every script needs around its work: processes, seeds, folders, logs, and errors a person can read."""
from __future__ import annotations

import ast
import contextlib
import datetime
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import write_atomically


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in its arguments; exit code 1 with this one line."""


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


def run_script(main: Callable[[Any], None], args: Any) -> None:
    """Run a script's main; a user's mistake or a failed run ends in one line per problem, never in a traceback."""
    try:
        main(args)
    except BadArguments as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except (RunFailed, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def naming_the_last_good(path: Path) -> Iterator[None]:
    """A run that fails in here says which checkpoint is still good."""
    try:
        yield
    except RunFailed as error:
        good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
        raise RunFailed(f"{error}; {good}") from error


def init_distributed(device: str) -> torch.device:
    """Join the process group that torchrun (or launch --use_env) describes; without one, a single process."""
    device = torch.device(device)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    return device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def say(line: str) -> None:
    """Print on the main rank, at once."""
    if is_main():
        tqdm.write(line)
        sys.stdout.flush()


def warn(line: str) -> None:
    if is_main():
        print(f"warning: {line}", file=sys.stderr, flush=True)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch with seed + rank, so that ranks augment differently."""
    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())


def make_folder(path: Path) -> Path:
    """Create a run's folder and prove that it can be written. Raises ValueError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {path} cannot be written: {error.strerror}") from None
    return path


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, on the main rank."""
    if is_main():
        text = json.dumps(value, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def append_log(folder: Path, **line: Any) -> None:
    """Add one JSON object to log.txt, on the main rank."""
    if is_main():
        with open(folder / "log.txt", "a") as file:
            file.write(json.dumps(line) + "\n")


def key_values(items: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE arguments as a dict, with values read as Python literals where possible. Raises ValueError."""
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag}: {item!r} is not of the form KEY=VALUE")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = text
    return pairs


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Plain text columns, right-aligned but for the first."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [headers, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(lines)
