"""Samples of every point of a table: taken in rounds and random order, judged by a reference."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from files.atomic import aside, write_compact_json
from runtime.console import complain

NOISY = 0.2  # relative spread between rounds above which a point is measured again
QUIET = 1.25  # times the quick reference: slower moments are those when others use the machine


class Source(Protocol):
    """What measures: `Bench` in this process, or a runtime elsewhere."""

    keys: list[tuple[str, ...]]
    clock: list[float]  # seconds of the reference, in between
    at_once: bool  # a point is dear to set up: all its samples are taken in one visit

    def tick(self) -> None: ...

    def samples(self, key: tuple[str, ...], count: int = 1) -> list[tuple[float, int]]: ...


def _describe(name: str, before: Any, now: Any) -> str:
    """How a setting differs; of a long one, such as the grid of points, the name alone."""
    long = any(isinstance(value, dict | list) for value in (before, now))
    return f"another {name}" if long else f"{name} was {before}, now {now}"


class Progress:
    """Samples of every key, kept in `<output>.part` so that an interrupted run can be continued."""

    def __init__(self, output: str, settings: dict[str, Any]) -> None:
        self.path, self.meta = Path(f"{output}.part"), json.loads(json.dumps(settings | {"complete": False}))
        self.samples: dict[str, list[list[float]]] = {}
        self.clock: list[float] = []
        if not self.path.exists():
            return
        if differing := self._read():
            kept = aside([self.path])[0]
            self.path.replace(kept)
            complain("warning", f"{self.path}: {differing}; it is kept as {kept}, and measuring starts afresh")
        else:
            count = sum(map(len, self.samples.values()))
            print(f"continuing with {count} samples of", self.path, file=sys.stderr)

    def _read(self) -> str:
        """Take the stored samples over; or why they are of no use here."""
        try:
            stored = json.loads(self.path.read_text())
            before, samples, clock = stored["_meta"], stored["_samples"], stored["_clock"]
            names = [name for name in {**before, **self.meta} if before.get(name) != self.meta.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "no file of an interrupted measurement"
        if not names:
            self.samples, self.clock = samples, clock
        return ", ".join(_describe(name, before.get(name), self.meta.get(name)) for name in names)

    def save(self) -> None:
        write_compact_json(self.path, {"_meta": self.meta, "_samples": self.samples, "_clock": self.clock})

    def quiet(self, key: str) -> list[float]:
        """Times of a key over the reference's around them, of undisturbed moments; ascending."""
        limit = QUIET * np.quantile(self.clock, 0.1)
        around = [(s, self.clock[max(0, i - 1) : i + 2]) for s, i in self.samples[key]]
        return sorted(s / float(np.median(near)) for s, near in around if max(near) <= limit)

    def relative(self, key: str) -> float:
        """Time of a key over the reference's: the lower median of undisturbed moments, or the quickest of all."""
        if quiet := self.quiet(key):
            return quiet[(len(quiet) - 1) // 2]
        return min(s / self.clock[i] for s, i in self.samples[key])

    def seconds(self) -> dict[str, float]:
        """Seconds of every key."""
        reference = float(np.quantile(self.clock, 0.1))
        return {key: self.relative(key) * reference for key in self.samples}

    def spread(self, key: str) -> float:
        """Relative interquartile range of a key's time; infinite before it was measured twice undisturbed."""
        quiet = self.quiet(key)
        return float(np.subtract(*np.quantile(quiet, (0.75, 0.25))) / np.median(quiet)) if len(quiet) > 1 else math.inf


class OutOfTime(RuntimeError):
    """A measurement that did not end within its time limit; what was measured is kept."""


def sample_all(bench: Source, progress: Progress, rounds: int, limit: float = math.inf) -> None:
    """Measure every key once a round, in random order; then the unsettled ones, for half as long at most.

    limit: of `time.perf_counter`, after which OutOfTime is raised.
    """
    bench.clock = progress.clock
    visits, per_visit = (1, rounds) if bench.at_once else (rounds, 1)
    keys = {"/".join(key): key for key in bench.keys}

    def visit(names: list[str], title: str, until: float = math.inf) -> None:
        random.shuffle(names)
        for name in tqdm(names, desc=title, unit="point", leave=False, mininterval=0.5, disable=None):
            if time.perf_counter() >= limit:
                raise OutOfTime("the time limit is over")
            if time.perf_counter() < until:
                new = bench.samples(keys[name], per_visit)
                progress.samples.setdefault(name, []).extend(new)
        bench.tick()

    begin = time.perf_counter()
    try:
        for i in range(visits):
            visit([k for k in keys if len(progress.samples.get(k, ())) <= i], f"round {i + 1}/{visits}")
            progress.save()
        until = time.perf_counter() + (time.perf_counter() - begin) / 2
        while time.perf_counter() < until and (unsettled := [k for k in keys if progress.spread(k) > NOISY]):
            visit(unsettled, "again, undisturbed", until)
    finally:
        progress.save()
