"""What a run needs to survive on machines that come and go: SIGTERM, and ranks that fall silent.

Knows torch.distributed and the console alone; `runtime.processes` starts it, training loops ask it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from runtime.console import complain

STOPPING = (signal.SIGTERM, signal.SIGINT)


_meeting = 1  # how often the ranks of this run have met at their store


def arrive(store: dist.Store, rank: int) -> dist.Store:
    """A part of the store of this start alone: torchrun keeps it over restarts, with the dead ranks' addresses."""
    global _meeting
    _meeting = store.add(f"starts/{rank}", 1)
    return dist.PrefixStore(f"start_{_meeting}", store)


def restarts() -> int:
    """How often these processes were started again, by torchrun --max-restarts or by SLURM."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return max(_meeting - 1, *map(int, counts))


class Terminated(SystemExit):
    """SIGTERM or SIGINT asked the run to end: exit code 143 or 130."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class StopRequest:
    """SIGTERM or SIGINT, noticed between two updates, on all ranks between the same two. A second SIGINT ends at once.

    Ranks are told at different moments, so each update's answers are gathered in the background during the next one:
    no step waits for it, and all ranks stop one update later.
    """

    def __init__(self) -> None:
        self.seen = 0  # the signal's number
        self.interruptible = False
        self._when = 0.0
        self._before: dict[int, Any] = {}
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def listen(self) -> None:
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == self.seen == signal.SIGINT and now - self._when > 1:  # a terminal and a launcher may both send it
            raise KeyboardInterrupt
        self.seen, self._when = number, now
        if self.interruptible:
            raise Terminated(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises Terminated right here: for work that may be broken off anywhere, such as evaluation.

        Among several ranks it waits for the next updates: one that left alone would leave the others in a collective.
        """
        self.interruptible = self._group is None
        try:
            if self.seen and self.interruptible:
                raise Terminated(self.seen)
            yield
        finally:
            self.interruptible = False

    def agreed(self) -> int:
        """The signal to stop for now, or 0; the same on every rank. Called after each update, by all."""
        if self._group is None:
            return self.seen
        answer = self._collect()
        flag = torch.tensor(self.seen)
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return answer

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        work, flag = self._pending
        work.wait()
        self._pending = None
        return int(flag)

    def close(self, waiting: bool) -> None:
        """The signals mean what they meant before. waiting: for the other ranks' last answers, where they live."""
        if waiting:
            self._collect()
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Heartbeat(threading.Thread):
    """Tells the other ranks that this one lives, and ends this process when another has fallen silent for too long.

    A rank that was killed, stopped or cut off cannot say so; without this the others wait in a collective, and its
    error names an address at best. Beats go through the store that the ranks met at. Only this thread touches it: where
    its host is stopped a call never returns, and a second thread notices that.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float, interval: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.rank, self.timeout, self.interval = rank, timeout, min(interval, timeout / 4)
        self._store, self._keys = store, [f"heartbeat/{r}" for r in range(world_size)]
        self._answered = time.monotonic()
        self._heard = {r: ("", self._answered) for r in range(world_size)}
        self._end, self._last_word = threading.Event(), "done"
        self._store.set(self._keys[rank], "0")

    def begin(self) -> None:
        """Once every rank has one."""
        self.start()
        threading.Thread(target=self._watch_the_store, daemon=True).start()

    def run(self) -> None:
        """The thread itself: beat, and look at the others' beats."""
        beat = 0
        with contextlib.suppress(RuntimeError):  # the store has gone; the other thread says so
            while not self._end.wait(self.interval):
                beat += 1
                self._exchange(str(beat))
                if problem := self._named(self._silent(self.timeout)):
                    _end_process(problem)
            self._store.set(self._keys[self.rank], self._last_word)
            while self.rank == 0 and self._last_word == "done" and self._waited_for():  # this rank may hold the store
                time.sleep(self.interval)
                self._exchange("done")

    def _exchange(self, beat: str) -> None:
        self._store.set(self._keys[self.rank], beat)
        now = time.monotonic()
        for other, said in enumerate(self._store.multi_get(self._keys)):
            if said.decode() != self._heard[other][0]:
                self._heard[other] = (said.decode(), now)
        self._answered = now

    def _watch_the_store(self) -> None:
        while not self._end.wait(self.interval):
            if (silence := time.monotonic() - self._answered) > self.timeout:
                _end_process(f"rank 0, or the launcher, has not answered for {silence:.0f} s")

    def _silent(self, seconds: float) -> dict[int, str]:
        """Ranks that failed, with their reason, and those not heard of for that long."""
        now, found = time.monotonic(), {}
        for other, (said, when) in self._heard.items():
            if said.startswith("failed: "):
                found[other] = said
            elif said != "done" and other != self.rank and now - when > seconds:
                found[other] = f"has not answered for {now - when:.0f} s"
        return found

    def _waited_for(self) -> bool:
        """Whether another rank still lives and works."""
        silent = self._silent(self.timeout)
        return any(said != "done" and r not in silent and r != self.rank for r, (said, _) in self._heard.items())

    @staticmethod
    def _named(silent: dict[int, str]) -> str:
        return "; ".join(f"rank {r} {reason}" for r, reason in silent.items())

    def who_is_gone(self) -> str:
        """After a collective has failed: the ranks that are to blame, '' where all answer."""
        time.sleep(4 * self.interval)
        if time.monotonic() - self._answered > 2.5 * self.interval:
            return "rank 0, or the launcher, has gone away"
        return self._named(self._silent(2.5 * self.interval))

    def stop(self, failure: str = "") -> None:
        """The last beat: this rank is done, or failed and why. Rank 0 waits for the others to be done."""
        self._last_word = f"failed: {failure}" if failure else "done"
        self._end.set()
        self.join(None if self.rank == 0 and not failure else self.interval + 1)


def _end_process(reason: str) -> None:
    complain("error", reason)
    os._exit(1)
