"""What a run needs to survive on machines that come and go: SIGTERM, and ranks that fall silent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.console import complain

STOPPING = (signal.SIGTERM, signal.SIGINT)
GONE = "rank 0, or the launcher, has gone away"


_meeting = 1  # how often the ranks of this run have met at their store


def arrive(store: dist.Store, rank: int) -> dist.Store:
    """A part of the store for this start alone: torchrun keeps dead ranks' addresses in it over restarts."""
    global _meeting
    _meeting = store.add(f"starts/{rank}", 1)
    return dist.PrefixStore(f"start_{_meeting}", store)


def restarts() -> int:
    """How often these processes were restarted, by torchrun --max-restarts or by SLURM."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return max(_meeting - 1, *map(int, counts))


def report_to_launcher(reason: str) -> None:
    """Tell torchrun, where it has started this process, why the process ends: its own report then closes with that.

    The file is that of torch.distributed.elastic's @record, with the line in place of a traceback.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = dict(py_callstack=reason, timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(dict(message=dict(message=reason, extraInfo=more))))


class Terminated(SystemExit):
    """SIGTERM or SIGINT asked the run to stop: exit code 143 or 130."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class StopRequest:
    """SIGTERM or SIGINT, handled between two updates, on all ranks between the same two. A second SIGINT ends at once.

    Signals reach the ranks at different moments. So the ranks exchange what they have seen in the background, during
    the next update: no step waits for it, and all ranks stop one update later.
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
        """Let a signal raise Terminated right here, in work that may be interrupted anywhere, such as evaluation.

        With several ranks the signal waits for the next update: a rank that leaves alone would block the others.
        """
        self.interruptible = self._group is None
        try:
            if self.seen and self.interruptible:
                raise Terminated(self.seen)
            yield
        finally:
            self.interruptible = False

    def poll(self) -> int:
        """The signal to stop for, or 0; the same on every rank. All ranks call it after each update."""
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
        """Restore the earlier signal handlers. waiting: first collect the last answers of the other ranks."""
        if waiting:
            self._collect()
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Heartbeat(threading.Thread):
    """Tells the other ranks that this one is alive, and ends this process when another rank is silent for too long.

    A rank that was killed, stopped or cut off cannot report it: the others would wait in a collective whose error names
    an address at best. Beats go through the store that the ranks met at. Only this thread uses it: a call to a stopped
    host never returns, which a second thread notices.
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
        """Start beating, once every rank has a heartbeat."""
        self.start()
        threading.Thread(target=self._watch_the_store, daemon=True).start()

    def run(self) -> None:
        """The thread's work: beat, and check the beats of the others."""
        beat = 0
        try:
            while not self._end.wait(self.interval):
                beat += 1
                self._exchange(str(beat))
                if problem := self._named(self._silent(self.timeout)):
                    _end_process(problem)
            self._store.set(self._keys[self.rank], self._last_word)
            while self.rank == 0 and self._last_word == "done" and self._waited_for():  # this rank may host the store
                time.sleep(self.interval)
                self._exchange("done")
        except RuntimeError:  # whoever hosts the store is gone: nobody would ever stop this process
            if not self._end.is_set():
                _end_process(GONE)

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
        """Ranks that failed, with the reason, and ranks that have been silent for so many seconds."""
        now, silent = time.monotonic(), {}
        for other, (said, when) in self._heard.items():
            if said.startswith("failed: "):
                silent[other] = said
            elif said != "done" and other != self.rank and now - when > seconds:
                silent[other] = f"has not answered for {now - when:.0f} s"
        return silent

    def _waited_for(self) -> bool:
        """Whether another rank is alive and still working."""
        silent = self._silent(self.timeout)
        return any(said != "done" and r not in silent and r != self.rank for r, (said, _) in self._heard.items())

    @staticmethod
    def _named(silent: dict[int, str]) -> str:
        return "; ".join(f"rank {r} {reason}" for r, reason in silent.items())

    def who_is_gone(self) -> str:
        """After a failed collective: the ranks at fault, '' if all of them answer."""
        time.sleep(4 * self.interval)
        if time.monotonic() - self._answered > 2.5 * self.interval:
            return GONE
        return self._named(self._silent(2.5 * self.interval))

    def stop(self, failure: str = "") -> None:
        """Send the last beat: done, or failed with the reason. Rank 0 then waits until the others are done."""
        self._last_word = f"failed: {failure}" if failure else "done"
        self._end.set()
        self.join(None if self.rank == 0 and not failure else self.interval + 1)


def _end_process(reason: str) -> None:
    complain("error", reason)
    report_to_launcher(f"error: {reason}")
    os._exit(1)
