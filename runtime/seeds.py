"""Random generators: seed them, save their state and restore it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from runtime.ranks import rank


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return dict(
        python=[version, list(internal), gauss],
        numpy=[kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        torch=torch.get_rng_state(),
        cuda=cuda,
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state that `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_generators(*numbers: int) -> None:
    """Seed the generators of Python, numpy and torch (CPU) with a function of all the numbers."""
    python, numpy, torch_seed = np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)


def seed_everything(*numbers: int) -> None:
    """Seed every generator of this process with a function of all the numbers and the rank."""
    seed_generators(*numbers, rank())
    if torch.cuda.is_available():
        torch.cuda.manual_seed(torch.initial_seed())


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the CPU generators of this process on exit, whatever is drawn inside."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
