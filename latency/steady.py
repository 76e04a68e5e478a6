"""With how many threads a machine that others use, too, measures steadily, and what a table notes about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from latency.disturbance import MOSTLY, fewer_threads, thread_count
from latency.measure import interleaved
from latency.whole import build_random, random_images
from models.arch import Arch

TRIAL_ROUNDS = 5


@contextmanager
def steady_threads(
    arch: Arch, batch: int, device: torch.device, dtype: str = "fp32", progress: Callable[[str], None] = lambda _: None
) -> Iterator[int]:
    """Compute, inside the block, with as many threads as are not disturbed: those that torch uses, or half of them and
    so on down to one. progress: called with a line where they are fewer. Yields the count."""
    wanted = torch.get_num_threads()
    count = _settle(arch, batch, device, dtype, wanted) if device.type == "cpu" else wanted
    if count < wanted:
        progress(f"others use this machine: the latency table is measured with {count} of {wanted} threads")
    with thread_count(count):
        yield count


def _settle(arch: Arch, batch: int, device: torch.device, dtype: str, wanted: int) -> int:
    with torch.random.fork_rng(devices=[]):
        model, images = build_random(arch, None, device), random_images(arch, batch, device)
    for count in fewer_threads(wanted)[:-1]:
        with thread_count(count):
            if interleaved(dict(dense=model), images, TRIAL_ROUNDS, dtype=dtype)["dense"].disturbed <= MOSTLY:
                return count
    return 1


def notes(wanted: int, disturbed: float) -> dict[str, Any]:
    """Of a table's `_meta`: share of disturbed samples, and the threads that were wanted where it has fewer."""
    fewer = torch.get_num_threads() < wanted
    return dict(disturbed=round(disturbed, 3)) | (dict(threads_wanted=wanted) if fewer else {})
