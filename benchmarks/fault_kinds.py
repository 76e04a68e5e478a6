"""The faults that `benchmarks/faults.py` injects: each breaks off a running job, or what it has written, in a way.

A fault is a function (job, rng) -> what it did, in words. It may start the job any number of times; what it leaves
behind is then resumed without a fault and compared with what an undisturbed run writes.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files.atomic import _Patient

KINDS: dict[str, Callable[[Any, random.Random], str]] = {}


def fault(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        KINDS[name] = function
        return function

    return register


def _signal(job: Any, rng: random.Random, number: int, codes: tuple[int, ...]) -> str:
    moment = rng.uniform(0.0, 1.05) * job.seconds
    process = job.start()
    ended = process.wait(moment)
    if ended is None:
        process.send(number)
        code = process.wait(60)
        assert code in codes, f"exit code {code} after {signal.Signals(number).name}"
    return f"{signal.Signals(number).name} after {moment:.2f} s"


@fault("kill -9")
def kill(job: Any, rng: random.Random) -> str:
    return _signal(job, rng, signal.SIGKILL, (-9, 0))  # 0: it ended just before


@fault("SIGTERM")
def sigterm(job: Any, rng: random.Random) -> str:
    return _signal(job, rng, signal.SIGTERM, (143, -15, 0))  # -15: before training there is nothing to write


@fault("SIGINT")
def sigint(job: Any, rng: random.Random) -> str:
    return _signal(job, rng, signal.SIGINT, (130, 0))


def counting(at: Callable[[int], bool]) -> Callable[[], None]:
    """A patch that numbers every write, flush, link and renaming of a save, and kills the process where `at` says."""

    def patch() -> None:
        done = itertools.count(1)
        write = _Patient.write

        def written(self: Any, data: Any) -> int:
            if at(next(done)):
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, data)

        def count(action: Callable) -> Callable:
            def counts(*args: Any, **kwargs: Any) -> Any:
                if at(next(done)):
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*args, **kwargs)

            return counts

        _Patient.write = written
        for name in ("fsync", "link", "replace"):
            setattr(os, name, count(getattr(os, name)))

    return patch


@fault("kill -9 inside a save")
def kill_in_save(job: Any, rng: random.Random) -> str:
    chosen = rng.randrange(1, job.operations + 1)
    job.start(counting(lambda number: number == chosen)).wait(job.patience)
    return f"at operation {chosen} of {job.operations}"


def _broken_off(job: Any, rng: random.Random) -> list[Path]:
    """The checkpoints, newest first, of a job that was killed once it had written two."""
    process = job.start()
    end = time.monotonic() + job.patience
    while len(job.checkpoints()) < 2 and process.wait(0.02) is None and time.monotonic() < end:
        pass
    process.wait(rng.uniform(0, 0.3) * job.seconds)
    process.send(signal.SIGKILL)
    process.wait(60)
    return job.checkpoints()


@fault("truncated checkpoint")
def truncate(job: Any, rng: random.Random) -> str:
    newest = _broken_off(job, rng)[0]
    size = newest.stat().st_size
    left = rng.choice((0, size - 1, rng.randrange(size)))
    os.truncate(newest, left)
    return f"{newest.name} cut to {left} of {size} bytes"


@fault("bit-flipped checkpoint")
def flip(job: Any, rng: random.Random) -> str:
    newest = _broken_off(job, rng)[0]
    data = bytearray(newest.read_bytes())
    where, bit = rng.randrange(len(data)), rng.randrange(8)
    data[where] ^= 1 << bit
    newest.write_bytes(data)
    return f"{newest.name}: bit {bit} of byte {where}"


@fault("swapped checkpoints")
def swap(job: Any, rng: random.Random) -> str:
    """The two in each other's place, the newest gone, or another run's in its place (which must be refused)."""
    how = rng.choice(("swapped", "newest gone", "another run's"))
    newest, before = _broken_off(job, rng)[:2]
    content = newest.read_bytes()
    if how == "swapped":
        newest.write_bytes(before.read_bytes())
        before.write_bytes(content)
    elif how == "newest gone":
        newest.unlink()
    else:
        newest.write_bytes(job.strange_checkpoint())
        line = job.refused()
        assert "--resume" in line and "made" in line, f"another run's checkpoint was not refused: {line!r}"
        newest.write_bytes(content)
    return how


@fault("disk full")
def disk_full(job: Any, rng: random.Random) -> str:
    """No file may grow beyond a size that a checkpoint has; half of the runs are told to go on."""
    limit, warn = int(rng.uniform(0.02, 0.98) * job.size), rng.random() < 0.5
    soft = rng.uniform(0.0, 0.5) * job.seconds

    def patch() -> None:
        def fill(*_: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        signal.signal(signal.SIGALRM, fill)
        signal.setitimer(signal.ITIMER_REAL, max(soft, 0.001))

    process = job.start(patch, ["--checkpoint_errors", "warn"] if warn else [])
    code = process.wait(job.patience)
    said = process.errors()
    assert code == 0 or code == 1 and "File too large" in said, f"exit code {code}: {said[-300:]}"
    assert code == 0 or "checkpoint" in said or not job.checkpoints(), said[-300:]
    return f"files up to {limit:,} bytes, {'warn' if warn else 'stop'}: exit code {code}"


@fault("rank killed")
def rank_killed(job: Any, rng: random.Random) -> str:
    return _lose_rank(job, rng, signal.SIGKILL)


@fault("rank stopped")
def rank_stopped(job: Any, rng: random.Random) -> str:
    return _lose_rank(job, rng, signal.SIGSTOP)


def _lose_rank(job: Any, rng: random.Random, number: int) -> str:
    moment, gone = rng.uniform(0.2, 1.0) * job.seconds, rng.randrange(2)
    ranks = job.start_ranks()
    try:
        if ranks[gone].wait(moment) is None:
            ranks[gone].send(number)
            code, said = ranks[1 - gone].wait(60), ranks[1 - gone].errors()
            named = "has not answered" in said or "gone away" in said or "did not find one another" in said
            assert code == 0 or code == 1 and named, f"exit code {code}: {said[-300:]}"
    finally:
        for process in ranks:
            process.send(signal.SIGKILL)
            process.wait(60)
    return f"rank {gone}, {signal.Signals(number).name} after {moment:.2f} s"


@fault("data worker killed")
def worker_killed(job: Any, rng: random.Random) -> str:
    moment = rng.uniform(0.1, 1.0) * job.seconds
    process = job.start(None, ["--num_workers", "2"])
    process.wait(moment)
    while process.wait(0.005) is None and not (workers := process.children()):
        pass
    if process.wait(0) is not None:
        return "the job had ended before"
    os.kill(rng.choice(workers), signal.SIGKILL)
    code, said = process.wait(60), process.errors()
    assert code == 0 or code == 1 and "a data loader worker died" in said, f"exit code {code}: {said[-300:]}"
    return f"after {moment:.2f} s: exit code {code}"


@fault("data file lost")
def file_lost(job: Any, rng: random.Random) -> str:
    """Removed or overwritten during an epoch; it is back when the job resumes."""
    victim = rng.choice(sorted(job.images.glob("*/*/*.png")))
    content, how = victim.read_bytes(), rng.choice(("removed", "overwritten", "cut"))
    process = job.start()
    process.wait(rng.uniform(0.2, 0.9) * job.seconds)
    if how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(b"\0" * len(content) if how == "overwritten" else content[: len(content) // 2])
    try:
        code, said = process.wait(job.patience), process.errors()
        assert code == 0 or code == 1 and str(victim) in said, f"exit code {code}: {said[-300:]}"
        if how == "removed" and code and job.checkpoints():
            assert "other training images" in (line := job.refused()) or "validation images" in line, line
    finally:
        victim.write_bytes(content)
    return f"{victim.parent.parent.name}/{victim.name} {how}: exit code {code}"


@fault("clock going backwards")
def clock(job: Any, rng: random.Random) -> str:
    """Wall-clock time jumps back at random, and files are from the future; then it is killed."""
    jumps = [rng.uniform(0, 1e8) for _ in range(50)]

    def patch() -> None:
        real, calls = time.time, []

        def wrong() -> float:
            calls.append(1)
            return real() - jumps[len(calls) % len(jumps)]

        time.time = wrong

    process = job.start(patch)
    process.wait(rng.uniform(0.3, 1.0) * job.seconds)
    process.send(signal.SIGKILL)
    process.wait(60)
    for path in job.folder.rglob("*"):
        os.utime(path, (time.time() + 1e8 * rng.random(),) * 2)
    return "50 jumps, files from the future"
