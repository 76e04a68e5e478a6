"""Which process this is, how many there are, and whether all of them agree."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch.distributed as dist

from runtime.errors import FailedTogether


def check_identical(what: str, value: bytes) -> None:
    """Raises RunFailed, naming the ranks, unless `value` is the same on all of them."""
    if world_size() == 1:
        return
    digests: list[Any] = [None] * world_size()
    dist.all_gather_object(digests, hashlib.sha256(value).hexdigest())
    if odd := [str(r) for r, digest in enumerate(digests) if digest != digests[0]]:
        ranks = ", ".join(odd)
        raise FailedTogether(f"{what} of rank {ranks} differ from rank 0's: the ranks no longer train the same model")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0
