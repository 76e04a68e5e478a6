"""What every script needs around its work: processes, seeds, folders, logs, and errors a person can read."""
from __future__ import annotations

import ast
import contextlib
import datetime
import errno
import hashlib
import json
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import elastic
from checkpoint import clear_unfinished, write_atomically
from console import complain, complaint, paint
from locking import locked


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


def run_script(main: Callable[[Any], None], args: Any) -> None:
    """Run a script's main; a user's mistake or a failed run ends in one line per problem, never in a traceback."""
    global _folders
    reason = ""
    sys.unraisablehook = _say_unless_starting
    try:
        _folders = contextlib.ExitStack()
        main(args)
    except BadArguments as error:
        reason = "; ".join(error.problems)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of this machine say the same
            for problem in error.problems:
                complain("error", problem)
        sys.exit(2)
    except KeyboardInterrupt:
        reason = "interrupted"
        print("interrupted: what was not written yet is lost; --resume goes on from the last checkpoint",
              file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(130)
    except Exception as error:
        together = isinstance(error, FailedTogether)
        line = explained(error) + (f"; {safe}" if safe and isinstance(error, OSError) else "")
        if not line and isinstance(error, RuntimeError):
            line = _heartbeat.who_is_gone() if _heartbeat else ""
        reason = "" if together else line or type(error).__name__
        if not line:
            raise
        _fail(line, said=is_main() or not together, reason=reason)
    finally:
        _let_go(reason)


def _say_unless_starting(args: Any) -> None:
    """Python's own message, but for a loader's thread that was just starting when a dead data process ends a run."""
    frames = traceback.extract_tb(args.exc_traceback)
    if not frames or frames[-1].name != "_bootstrap_inner":
        sys.__unraisablehook__(args)


def _let_go(reason: str) -> None:
    """Say what is left to say, and give back what a run holds; reason: why it failed, '' where it did not."""
    global _folders
    at_end()
    for reader in multiprocessing.active_children():  # they outlive SIGTERM, and this process would wait for them
        reader.kill()
    _folders.close()
    _folders = None
    if _heartbeat:
        _heartbeat.stop(failure=reason)
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(line: str, said: bool, reason: str) -> None:
    """One line, and exit code 1; at once where other ranks may be waiting in a collective that never ends."""
    if said:
        complain("error", line if is_main() else f"rank {rank()}: {line}")
    if _heartbeat:
        at_end()
        _heartbeat.stop(failure=reason)
        os._exit(1)
    sys.exit(1)


_heartbeat: elastic.Heartbeat | None = None
_folders: contextlib.ExitStack | None = None  # this run's, locked until its end
safe = ""  # what a run has on disk once its training is over
_last_words: list[Callable[[], str]] = []


def say_at_end(line: Callable[[], str]) -> None:
    """Have a process say a line at its run's end, however that ends; '' for nothing."""
    _last_words.append(line)


def at_end() -> None:
    """Say what was to be said."""
    for line in dict.fromkeys(line() for line in _last_words):
        if line:
            complain("warning", line if is_main() else f"rank {rank()}: {line}")
    _last_words.clear()


def init_distributed(device: str, timeout: float) -> torch.device:
    """Join the process group that torchrun (or launch --use_env) describes; without one, a single process.

    timeout: seconds after which a rank that does not answer ends the run. Raises ValueError for more processes on this
    machine than it has GPUs.
    """
    global _heartbeat
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"--nproc_per_node is {here} but this machine has {gpus} GPUs (or --device cpu)")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout + 60)  # the heartbeat is first, and knows names
    try:
        _heartbeat = _meet("nccl" if device.type == "cuda" else "gloo", timeout, limit)
    except RuntimeError as error:
        raise RunFailed(f"the processes did not find one another: {error}") from None
    return device


def _meet(backend: str, timeout: float, limit: datetime.timedelta) -> elastic.Heartbeat:
    store, number, processes = next(dist.rendezvous("env://", timeout=limit))
    store = elastic.arrive(store, number)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=limit)
    own = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                        wait_for_workers=False, timeout=limit)  # fmt: skip
    prefix = dist.PrefixStore(f"heartbeat_{elastic.restarts()}", own)  # a connection that no other thread waits on
    heartbeat = elastic.Heartbeat(prefix, number, processes, timeout)
    dist.barrier()
    heartbeat.begin()
    return heartbeat


def check_identical(what: str, value: bytes) -> None:
    """Raises RunFailed, naming the ranks, when `value` is not the same on all of them."""
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, hashlib.sha256(value).hexdigest())
    if odd := [str(r) for r, digest in enumerate(found) if digest != found[0]]:
        ranks = ", ".join(odd)
        raise FailedTogether(f"{what} of rank {ranks} differ from rank 0's: the ranks no longer train one model")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def say(line: str) -> None:
    """Print on the main rank, at once and above the progress bar."""
    if is_main():
        tqdm.write(line)
        sys.stdout.flush()


def say_result(line: str) -> None:
    """Say what a run has come to."""
    say(paint(line, "result", sys.stdout))


def say_next(*commands: str) -> None:
    """Say the commands that go on from here, without their `python`."""
    for command in commands:
        say(f"next: python {command}")


def warn(line: str) -> None:
    """A warning on the main rank, at once and above the progress bar."""
    if is_main():
        tqdm.write(complaint("warning", line), file=sys.stderr)
        sys.stderr.flush()


def seed_generators(*numbers: int) -> None:
    """Seed Python, numpy and torch's CPU generator with a function of all the numbers."""
    python, numpy, torch_seed = np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)


def seed_everything(*numbers: int) -> None:
    """Seed every generator of this process with a function of all the numbers and the rank: ranks draw differently."""
    seed_generators(*numbers, rank())
    if torch.cuda.is_available():
        torch.cuda.manual_seed(torch.initial_seed())


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """What is drawn in here does not move the generators of this process's CPU."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def make_folder(path: Path, lock: bool = True) -> Path:
    """Create a run's folder, prove that it can be written, and lock it until the run's end. Raises ValueError.

    lock: False for what only adds to a finished run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {path} cannot be written: {error.strerror}") from None
    if lock and _folders is not None and is_main():
        if note := _folders.enter_context(locked(path)):
            say(note)
        clear_unfinished(path)
    return path


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, on the main rank."""
    if is_main():
        write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, on the main rank."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_log(folder: Path, **line: Any) -> None:
    """Add one JSON object to log.txt, whole or not at all, on the main rank."""
    if is_main():
        with open(folder / "log.txt", "ab", buffering=0) as file:
            before = file.tell()
            text = (json.dumps(line) + "\n").encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise


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
