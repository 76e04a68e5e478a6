"""Whether two models compute the same function: in float32 proper, which a GPU's TF32 is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 tensors without TF32, whose 10 bits differ by 1e-4 between two widths.

    PyTorch has two sets of switches, and refuses to read the older one where a program has set the newer.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(products, "fp32_precision"):
        switches = [(products, "fp32_precision", "ieee"), (convolutions.conv, "fp32_precision", "ieee")]
    else:
        switches = [(products, "allow_tf32", False), (convolutions, "allow_tf32", False)]
    before = [getattr(where, name) for where, name, _ in switches]
    try:
        for where, name, exact in switches:
            setattr(where, name, exact)
        yield
    finally:
        for (where, name, _), value in zip(switches, before, strict=True):
            setattr(where, name, value)
