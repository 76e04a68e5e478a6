"""Latency tables: measured seconds of a transformer block at a grid of widths, and interpolation between them.

A table is JSON in the grammar that NViT published, `EMB_{e}` -> `QK_{heads}_{qk}` -> `V_{v}` -> `MLP_{m}` -> seconds
for ONE block, and up to three more keys: `_meta` (how it was measured), `_overhead` (seconds outside the blocks, per
embedding width) and `_parts` (seconds of the attention and of the MLP branch by themselves, which lookups prefer). Grid
points come from the keys. Widths below the grid are extrapolated linearly, widths above it are refused.
"""
from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.dims import BlockDims, ViTDims

MAX_BYTES = 200_000_000
MAX_LEAVES = 2_000_000
COLUMNS = ("embed", "heads", "qk", "v", "mlp")  # of a row of widths
LEVELS = dict(EMB=("embed",), QK=("heads", "qk"), V=("v",), MLP=("mlp",))  # widths written in one key of the grammar
GRAMMARS = dict(block=("EMB", "QK", "V", "MLP"), attention=("EMB", "QK", "V"), mlp=("EMB", "MLP"), overhead=("EMB",))
SHOWN = dict(embed="EMB_{}", heads="QK_{}_*", qk="QK_*_{}", v="V_{}", mlp="MLP_{}")
_KEY = {level: re.compile(level + r"_(0|[1-9]\d{0,8})" * len(widths)) for level, widths in LEVELS.items()}


class LatencyTableError(ValueError):
    """A latency table that cannot be used; one line that names the file, the key, and what would be right."""


class MonotoneReport(NamedTuple):
    """What the monotone clean-up changed: values raised, of how many, and the largest relative change."""

    raised: int
    values: int
    largest_change: float


def _seconds(value: Any, path: str, widths: tuple[int, ...]) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -1e300 < value < 1e300:  # NaN fails the comparison too
        raise LatencyTableError(f"{path} must be a finite number of seconds, not {str(value)[:40]!r}")
    if value < 0 or (value == 0 and all(widths)):
        raise LatencyTableError(f"{path} must be above 0 seconds, not {value}")
    return float(value)


def _leaves(node: Any, levels: tuple[str, ...], path: str, widths: tuple[int, ...] = ()) -> Iterator[tuple]:
    """(widths, seconds) of every leaf under a node of the grammar."""
    if not levels:
        yield widths, _seconds(node, path, widths)
        return
    expected = "_".join([levels[0], *(f"{{{width}}}" for width in LEVELS[levels[0]])])
    if not isinstance(node, dict) or not node:
        raise LatencyTableError(f"{path or 'the table'} must hold keys {expected}, not {str(node)[:40]!r}")
    for key, child in node.items():
        here = f"{path} -> {key}" if path else key
        if not (match := _KEY[levels[0]].fullmatch(key)):
            raise LatencyTableError(f"{here} is no key of a latency table; expected {expected}")
        yield from _leaves(child, levels[1:], here, (*widths, *map(int, match.groups())))


class Grid:
    """Seconds at every combination of the widths of its axes, and multilinear interpolation between them."""

    def __init__(self, columns: tuple[str, ...], axes: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        self.columns, self.axes, self.values = columns, axes, values
        self.select = [COLUMNS.index(c) for c in columns]
        self.low, self.high = (np.array([a[i] if len(a) == 1 or i else 0 for a in axes]) for i in (0, -1))
        self._strides = [math.prod(values.shape[k + 1 :]) for k in range(values.ndim)]

    @classmethod
    def parse(cls, node: Any, grammar: str, path: str = "") -> Grid:
        """From a part of the file. Raises LatencyTableError naming the key that is odd, or the one that is missing."""
        levels = GRAMMARS[grammar]
        leaves = dict(islice(_leaves(node, levels, path), MAX_LEAVES + 1))
        if len(leaves) > MAX_LEAVES:
            raise LatencyTableError(f"{path or 'the table'} has more than {MAX_LEAVES:,} values")
        axes = [sorted(set(points)) for points in zip(*leaves, strict=True)]
        if math.prod(map(len, axes)) != len(leaves):
            missing = next(widths for widths in product(*axes) if widths not in leaves)
            raise LatencyTableError(f"hole in the grid: {cls._path(levels, missing, path)} is missing")
        values = np.array([leaves[widths] for widths in product(*axes)]).reshape([len(a) for a in axes])
        columns = tuple(column for level in levels for column in LEVELS[level])
        return cls(columns, tuple(np.array(a, dtype=float) for a in axes), values)

    @staticmethod
    def _path(levels: tuple[str, ...], widths: tuple[int, ...], path: str) -> str:
        rest = iter(widths)
        keys = ("_".join([level, *(str(next(rest)) for _ in LEVELS[level])]) for level in levels)
        return " -> ".join([path, *keys] if path else keys)

    def check_covers(self, widths: np.ndarray) -> None:
        """widths: (n, axes). Raises LatencyTableError naming the first width that lies above the grid."""
        outside = (widths > self.high) | (widths < self.low)
        if not outside.any():
            return
        row, k = np.argwhere(outside)[0]
        largest = SHOWN[self.columns[k]].format(int(self.high[k]))
        what = "holds only" if len(self.axes[k]) == 1 else "goes up to"
        raise LatencyTableError(
            f"the table {what} {largest} but the model has {widths[row, k]:g} ({self.columns[k]}); "
            "build a table for this model with python -m latency.build_table"
        )

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """Seconds, never below 0: (n, axes) -> (n,)."""
        self.check_covers(widths)
        corner = np.zeros((1, len(widths)), dtype=np.int64)  # flat index of each cell corner
        weight = np.ones((1, len(widths)))
        for axis, stride, width in zip(self.axes, self._strides, widths.T, strict=True):
            if len(axis) == 1:
                continue
            low = np.clip(np.searchsorted(axis, width, "right") - 1, 0, len(axis) - 2)
            part = (width - axis[low]) / (axis[low + 1] - axis[low])  # below 0: linear extrapolation
            corner = np.concatenate([corner + low * stride, corner + (low + 1) * stride])
            weight = np.concatenate([weight * (1 - part), weight * part])
        return np.maximum((self.values.ravel()[corner] * weight).sum(0), 0)

    def monotone(self) -> Grid:
        """A copy whose values never decrease along any axis: the cumulative maximum along each axis in turn."""
        values = self.values
        for axis in range(values.ndim):
            values = np.maximum.accumulate(values, axis=axis)
        return Grid(self.columns, self.axes, values)


class LatencyTable:
    """Seconds of blocks and models of any widths up to the table's largest, for the batch it was measured at.

    `data` is the file's content; `name` stands in error messages.
    """

    def __init__(self, data: Any, name: str = "latency table") -> None:
        self.data, self.name = data, str(name)
        try:
            self._parse(data)
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None
        self._clean = [grid.monotone() for grid in self._grids]

    def _parse(self, data: Any) -> None:
        if not isinstance(data, dict) or not data:
            raise LatencyTableError("the table is empty; expected an object with keys EMB_{embed}")
        meta = data.get("_meta", {})
        if not isinstance(meta, dict):
            raise LatencyTableError(f"_meta must be an object, not {str(meta)[:40]!r}")
        if meta.get("complete") is False:
            raise LatencyTableError(
                "the table is incomplete, its measurement was interrupted; "
                "run python -m latency.build_table again with the same settings to continue"
            )
        known = ("_meta", "_overhead", "_parts")
        if odd := [key for key in data if key.startswith("_") and key not in known]:
            raise LatencyTableError(f"{odd[0]} is no key of a latency table; expected EMB_{{e}}, {', '.join(known)}")
        block = Grid.parse({key: child for key, child in data.items() if key not in known}, "block")
        self._overhead = Grid.parse(data["_overhead"], "overhead", "_overhead") if "_overhead" in data else None
        self._grids = [block]
        if "_parts" in data:
            parts = data["_parts"]
            if not isinstance(parts, dict) or sorted(parts) != ["attention", "mlp"]:
                raise LatencyTableError("_parts must hold exactly the keys attention, mlp")
            self._grids = [Grid.parse(parts[name], name, f"_parts -> {name}") for name in ("attention", "mlp")]

    @classmethod
    def of_parts(cls, seconds: dict[str, float], meta: dict[str, Any]) -> LatencyTable:
        """From component seconds by key ("attention/EMB_96/QK_3_32/V_32", "mlp/EMB_96/MLP_384", "overhead/EMB_96").

        The published keys hold the sums of attention and MLP.
        """
        tree: dict[str, Any] = {}
        for name, value in seconds.items():
            *path, last = name.split("/")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[last] = float(f"{value:.6g}")
        overhead, blocks = tree.pop("overhead"), {}
        for emb, by_qk in tree["attention"].items():
            mlp = tree["mlp"][emb].items()
            blocks[emb] = {qk: {v: {m: a + b for m, b in mlp} for v, a in by_v.items()} for qk, by_v in by_qk.items()}
        return cls({"_meta": meta, **blocks, "_overhead": overhead, "_parts": tree})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Raises LatencyTableError, whatever is wrong with the file."""
        try:
            if (size := os.path.getsize(path)) > MAX_BYTES:
                raise LatencyTableError(f"{path}: {size:,} bytes; a latency table has at most {MAX_BYTES:,}")
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            hint = "build one with python -m latency.build_table"
            raise LatencyTableError(f"{path}: cannot read the latency table: {error.strerror}; {hint}") from None
        except UnicodeDecodeError:
            raise LatencyTableError(f"{path}: the latency table is not a text file; expected JSON") from None
        if not text.strip():
            raise LatencyTableError(f"{path}: the file is empty; expected a JSON object with keys EMB_{{embed}}")
        try:
            return cls(json.loads(text), str(path))
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise LatencyTableError(f"{path}: not JSON at {where}: {error.msg}") from None
        except RecursionError:
            raise LatencyTableError(f"{path}: nested too deeply for a latency table") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, atomically."""
        write_json(self.data, path)

    @property
    def meta(self) -> dict[str, Any]:
        """How the table was measured; empty for a published table."""
        return self.data.get("_meta", {})

    def blocks_seconds(self, widths: np.ndarray, *, monotone: bool = False) -> np.ndarray:
        """Seconds of n blocks: rows (embed, heads, qk, v, mlp), (n, 5) -> (n,).

        monotone looks up the cleaned table, in which no value decreases when a width grows. Raises LatencyTableError
        for a width above the grid.
        """
        widths = np.asarray(widths, dtype=float).reshape(-1, len(COLUMNS))
        grids = self._clean if monotone else self._grids
        try:
            if len(grids) == 1:
                return grids[0](widths)
            seconds = np.zeros(len(widths))
            for grid, decisive in zip(grids, ("heads", "mlp"), strict=True):
                alive = widths[:, COLUMNS.index(decisive)] > 0  # a branch of width 0 is not built
                seconds[alive] += grid(widths[alive][:, grid.select])
            return seconds
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None

    def block_seconds(self, embed: int, block: BlockDims) -> float:
        """Seconds of one block at residual width `embed`."""
        return float(self.blocks_seconds(_rows(embed, (block,)))[0])

    def model_seconds(self, dims: ViTDims) -> float:
        """Seconds of a model: its blocks, and what is outside them where the table has it."""
        blocks = float(self.blocks_seconds(_rows(dims.embed, dims.blocks)).sum())
        return blocks + self.overhead_seconds(dims.embed)

    def overhead_seconds(self, embed: int) -> float:
        """Seconds outside the blocks (patch embedding, final norm, heads); 0 where the table does not have them."""
        if self._overhead is None:
            return 0.0
        try:
            return float(self._overhead(np.array([[embed]], dtype=float))[0])
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: _overhead: {error}") from None

    def ratio(self, dims: ViTDims, dense: ViTDims) -> float:
        """Predicted time of `dims` over that of `dense`."""
        return self.model_seconds(dims) / self.model_seconds(dense)

    def check_covers(self, dims: ViTDims) -> None:
        """Raises LatencyTableError when a width lies above the table, or the token count is not the table's."""
        self.model_seconds(dims)
        tokens = self.meta.get("tokens")
        if odd := [b.tokens for b in dims.blocks if tokens is not None and b.tokens != tokens]:
            raise LatencyTableError(f"{self.name}: measured with {tokens} tokens but the model has {odd[0]}")

    def monotone_report(self) -> MonotoneReport:
        """What `monotone=True` changes."""
        raw, clean = (np.concatenate([g.values.ravel() for g in grids]) for grids in (self._grids, self._clean))
        raised = clean > raw
        change = (clean[raised] - raw[raised]) / np.maximum(raw[raised], np.finfo(float).tiny)
        return MonotoneReport(int(raised.sum()), raw.size, float(change.max(initial=0)))


def _rows(embed: int, blocks: tuple[BlockDims, ...]) -> np.ndarray:
    return np.array([(embed, b.heads, b.qk, b.v, b.mlp) for b in blocks], dtype=float).reshape(-1, len(COLUMNS))


def write_json(data: Any, path: str | os.PathLike) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
