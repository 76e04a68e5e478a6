"""Latency tables that are measured where none is named, and kept for the next time.

A file's name and its `_meta` say what it is of: model, device, type, batch, threads, runtime and the versions of torch
and timm. Whatever differs is another table, so that one of another device is never taken by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir

from files.atomic import write_compact_json
from latency.disturbance import MOSTLY, describe
from latency.grid import LatencyTableError
from latency.quick import describe_coarse, measure_table
from latency.steady import steady_threads
from latency.table import LatencyTable
from models.arch import Arch
from runtime.seeds import preserved_random_state


def default_folder() -> Path:
    """Where tables are kept unless a folder is named: in the user's cache folder, as the system has it."""
    return Path(user_cache_dir("vit-compression", appauthor=False)) / "latency_tables"


def find_or_measure(
    arch: Arch,
    batch_size: int,
    device: str = "cpu",
    dtype: str = "fp32",
    *,
    by_tokens: bool = False,
    folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """The coarse table of a model under these conditions: one measured earlier, or measured now and kept.

    by_tokens: at several token counts. folder: where tables are kept, by default `default_folder()`; one that cannot be
    written costs a measurement every time. progress: called with a line about what is done. No random generator moves.
    """
    folder, wanted = Path(folder) if folder else default_folder(), torch.get_num_threads()
    conditions = arch, batch_size, device, dtype, by_tokens
    if table := _find(conditions, folder, progress):
        return table
    with preserved_random_state(), steady_threads(arch, batch_size, torch.device(device), dtype, progress) as threads:
        if threads < wanted and (table := _find(conditions, folder, progress)):
            return table
        return _measure(conditions, folder, progress, wanted)


def _path_and_meta(conditions: tuple, folder: Path) -> tuple[Path, dict[str, Any]]:
    meta = json.loads(json.dumps(describe_coarse(*conditions)))
    return folder / file_name(meta), meta


def _find(conditions: tuple, folder: Path, progress: Callable[[str], None]) -> LatencyTable | None:
    """The table that was kept of these conditions and the threads of torch."""
    path, meta = _path_and_meta(conditions, folder)
    if table := _read(path, meta, progress):
        progress(f"latency table: {path}, measured on this device on {table.meta['date'][:10]}")
    return table


def _measure(conditions: tuple, folder: Path, progress: Callable[[str], None], wanted: int) -> LatencyTable:
    """Measure a table, and keep it unless others disturbed most of it without a correction."""
    path, meta = _path_and_meta(conditions, folder)
    arch, batch_size, _, dtype, _ = conditions
    progress(
        f"no latency table is named and none is kept: measuring a coarse one of {arch.name} on {meta['device']}, batch "
        f"{batch_size}, {dtype}; this takes about a minute"
    )
    begin = time.perf_counter()
    table = measure_table(*conditions, progress, wanted)
    if (disturbed := table.meta.get("disturbed", 0)) > MOSTLY:
        progress(describe(meta["threads"], meta["threads"], disturbed))
    kept = _keep(table, path) if disturbed <= MOSTLY else "it is not kept for the next time"
    dense = f"{1e3 * table.model_seconds(arch.dims):.1f} ms per batch of {batch_size}"
    progress(f"latency table: {dense}, measured in {time.perf_counter() - begin:.0f} s; {kept}")
    table.name = str(path)
    return table


def file_name(meta: dict[str, Any]) -> str:
    """Of the table with this `_meta`: readable, and another one for whatever differs."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    words = f"{meta['model']}-{meta['device']}-b{meta['batch']}-{meta['dtype']}"
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', words)[:80]}-{digest}.json"


def _read(path: Path, meta: dict[str, Any], progress: Callable[[str], None]) -> LatencyTable | None:
    """The table at `path` if it is one of these conditions."""
    try:
        if not path.is_file():
            return None
        table = LatencyTable.load(path)
    except (LatencyTableError, OSError) as error:
        progress(f"the kept latency table cannot be used, it is measured anew: {error}")
        return None
    if odd := [name for name, value in meta.items() if table.meta.get(name) != value]:
        progress(f"{path} is of another {', '.join(odd)}: it is measured anew")
        return None
    return table


def _keep(table: LatencyTable, path: Path) -> str:
    """What became of the attempt to keep it, in words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_compact_json(path, table.data)
    except OSError as error:
        return f"it cannot be kept for the next time: {path.parent}: {error.strerror}"
    return f"kept for the next time in {path}"
