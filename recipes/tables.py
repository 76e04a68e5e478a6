"""The latency table of a run: the one that is named, or one of this machine that is measured and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from latency.cache import find_or_measure
from latency.measure import DTYPES
from latency.table import LatencyTable
from runtime.console import say
from runtime.device import device_name
from runtime.errors import Problems
from runtime.ranks import is_main, world_size
from training.full_model import FullModel
from training.results import other_conditions

NAME = "latency.json"  # in the folder of a run that measured its own, for --resume


def load(args: Any, full: FullModel) -> LatencyTable | None:
    """The table that --latency_look_up_table names, None where it names none. Raises ValueError."""
    if not args.latency_look_up_table:
        return None
    table = LatencyTable.load(args.latency_look_up_table)
    table.check_covers(full.dims)
    if not (args.tokens and full.arch.merges_tokens):
        return table
    if not table.tokens:
        raise ValueError(
            f"--tokens: {table.name} knows one token count alone: build it with python -m "
            "latency.build_table … --tokens N N …, or leave --latency_look_up_table out"
        )
    if args.tokens != (way := "content" if (table.meta.get("model_kwargs") or {}).get("content_merge") else "place"):
        raise ValueError(
            f"--tokens {args.tokens}: {table.name} was measured with tokens merged by {way}: build one "
            f"with python -m latency.build_table … --tokens N N … --merge {args.tokens}"
        )
    return table


def check(args: Any, table: LatencyTable, device: torch.device, dtype: torch.dtype | None, problems: Problems) -> None:
    """With --strict_table, complaints about a table of other conditions than the run's."""
    if args.strict_table:
        for difference in other_conditions(table, device, dtype):
            problems.add(f"--strict_table: {difference}")


def can_be_measured(table: LatencyTable, device: torch.device) -> bool:
    """Whether what is measured here is what the table predicts: it is of this device, and of torch."""
    theirs = table.device.rpartition(", ")[0] if "threads_wanted" in table.meta else table.device
    here = device_name(device)
    return table.meta.get("runtime", "torch") == "torch" and theirs in (here, here.rpartition(", ")[0])


def measures_target(args: Any, table: LatencyTable, device: torch.device) -> bool:
    """Whether --latency_target is a measured ratio, not a predicted one."""
    if args.latency_predicted or args.latency_target is None:
        return False
    return args.latency_measured or can_be_measured(table, device)


def find(args: Any, full: FullModel, device: torch.device, dtype: torch.dtype | None, run: Path | None) -> LatencyTable:
    """The table of a run that names none: that of the run it resumes, one kept from earlier, or one measured now.

    The main rank finds it, the others wait. dtype: in which the run computes, None for fp32; run: the folder of the
    checkpoint that is resumed.
    """
    content: list[Any] = [None, ""]
    if is_main():
        table = LatencyTable.load(run / NAME) if run and (run / NAME).exists() else _own(args, full, device, dtype)
        content = [table.data, table.name]
    if world_size() > 1:
        dist.broadcast_object_list(content)
    return LatencyTable(*content)


def _own(args: Any, full: FullModel, device: torch.device, dtype: torch.dtype | None) -> LatencyTable:
    arch = full.arch.plain.without_drops
    by_tokens = bool(args.tokens) and arch.merges_tokens
    return find_or_measure(
        replace(arch, merge=args.tokens) if by_tokens else arch,
        args.latency_batch_size,
        device.type,
        {v: k for k, v in DTYPES.items()}[dtype or torch.float32],
        by_tokens=by_tokens,
        folder=args.table_cache or None,
        progress=say,
    )


def keep(args: Any, table: LatencyTable, folder: Path) -> None:
    """Write a table that the run did not name into its folder, so that --resume finds the same one."""
    if is_main() and not args.latency_look_up_table:
        table.save(folder / NAME)
