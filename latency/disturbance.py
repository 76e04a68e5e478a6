"""Whether a measurement was disturbed: how long the threads of this process waited for a core while it ran.

A thread that loses its core stops all others at their next barrier. So with as many threads as cores one busy neighbour
ruins a wall time, and no average over such samples mends it. With one thread the time that it ran is what an idle
machine would take, and that is what counts; with several, disturbed samples are replaced (`latency.measure`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

LOST = 0.02  # share of its wall time above which a sample is disturbed
MOSTLY = 0.5  # share of disturbed samples above which a figure is said to be made of them
FINE = 1e-5  # seconds: coarser clocks of a thread's time, as on Windows, say nothing about a sample
TASKS = "/proc/self/task"
GPU_SECONDS = 1.0  # NVML tells who computed in about the last second


class Sample(NamedTuple):
    """Seconds per call, and the share of the wall time during which a thread waited for a core."""

    seconds: float
    lost: float

    @property
    def is_disturbed(self) -> bool:
        return self.lost > LOST


@contextlib.contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Compute with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fewer_threads(count: int) -> list[int]:
    """Thread counts to try one after another: `count` and its halves, down to 1."""
    return [count, *(fewer_threads(count // 2) if count > 1 else [])]


def describe(threads: int, wanted: int, disturbed: float) -> str:
    """What to say beside a figure that was measured so; "" where nothing has to be said."""
    lines = [f"measured with {threads} of {wanted} threads, since others use the machine"] * (threads < wanted)
    if disturbed > MOSTLY:
        how = "only the time that it ran counts" if threads == 1 else "the figure may be far off"
        lines.append(f"{disturbed:.0%} of the samples were disturbed by other processes; {how}")
    return "; ".join(lines)


class _Reading(NamedTuple):
    """ran: CPU seconds, of the only thread or of all of them; waited: seconds that they waited for a core; switches:
    how often one of them lost its core. None where the system does not say."""

    ran: float
    waited: float | None
    switches: int | None


class Watch:
    """Times calls on a device, after they were warmed up, and says what of that time others took.

    On a CPU under Linux that is the time that the threads of this process waited for a core; elsewhere it is judged by
    CPU time and involuntary context switches. A GPU is disturbed where NVML (`pip install nvidia-ml-py`) sees other
    processes compute on it, or its clocks held down. Use it as a context manager.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.threads = device, torch.get_num_threads()
        self._alone = self.threads == 1 and time.get_clock_info("thread_time").resolution < FINE
        self._waits: list[int] = []  # descriptors of what the kernel says of every thread
        self._gpu = GpuWatch(device) if device.type == "cuda" else None

    def __enter__(self) -> Watch:
        if self.device.type == "cpu" and not self._alone:
            with contextlib.suppress(OSError):
                paths = [f"{TASKS}/{task}/schedstat" for task in os.listdir(TASKS)]
                self._waits = [os.open(path, os.O_RDONLY) for path in paths]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._waits:
            os.close(handle)
        self._waits = []

    def time(self, call: Callable[[], object], repeats: int = 1) -> Sample:
        """Seconds per call over `repeats` calls in a row, of a GPU between two events on an empty queue."""
        if self._gpu:
            return Sample(seconds_on_gpu(call, repeats, self.device), self._gpu.lost())
        before, begin = self._read(), time.perf_counter()
        for _ in range(repeats):
            call()
        wall, after = time.perf_counter() - begin, self._read()
        lost = min(1.0, max(0.0, self._lost(before, after, wall)))
        return Sample((wall * (1 - lost) if self._alone else wall) / repeats, lost)

    def _read(self) -> _Reading:
        if self._alone:
            return _Reading(time.thread_time(), None, None)
        waited = None
        if self._waits:
            with contextlib.suppress(OSError, IndexError):  # a thread has ended
                waited = sum(int(os.pread(handle, 80, 0).split()[1]) for handle in self._waits) / 1e9
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else None
        return _Reading(time.process_time(), waited, switches)

    def _lost(self, before: _Reading, after: _Reading, wall: float) -> float:
        ran = after.ran - before.ran
        if self._alone:
            return 1 - ran / wall
        if before.waited is not None and after.waited is not None:
            return (after.waited - before.waited) / wall
        preempted = before.switches is not None and after.switches > before.switches
        return 1 - ran / (self.threads * wall) if preempted else 0.0


def seconds_on_gpu(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call between two events, the queue empty before and after."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3 / repeats


class GpuWatch:
    """What NVML says of a GPU: whether other processes compute on it, and whether its clocks are held down."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = self._handle = None
        with contextlib.suppress(Exception):  # no package, no driver, a card that NVML does not know
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml

    def lost(self) -> float:
        """1 where the last sample was disturbed, else 0; 0 where NVML does not say."""
        if self._nvml is None:
            return 0.0
        with contextlib.suppress(Exception):
            return float(self._is_held_down() or self._others_compute())
        return 0.0

    def _is_held_down(self) -> bool:
        """By heat or power, in hardware or by its driver; the limits of an application do not count."""
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        named = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown")
        return any(reasons & getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0) for name in named)

    def _others_compute(self) -> bool:
        since = int((time.time() - GPU_SECONDS) * 1e6)
        used = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, since)
        return any(process.pid != os.getpid() and process.smUtil > 0 for process in used)
