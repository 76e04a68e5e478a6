"""Seconds on a grid of widths: the grammar of a table's keys, and multilinear interpolation between its points.

Grid points come from the keys. Widths below the grid are extrapolated linearly, widths above it are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

import numpy as np

MAX_LEAVES = 2_000_000
COLUMNS = ("embed", "heads", "qk", "v", "mlp", "tokens")  # of a row of widths
LEVELS = dict(
    EMB=("embed",),
    QK=("heads", "qk"),
    V=("v",),
    MLP=("mlp",),
    N=("tokens",),
    TOK=("tokens",),
    OUT=("out",),
)
GRAMMARS = dict(
    block=("EMB", "QK", "V", "MLP"),
    attention=("EMB", "QK", "V"),
    mlp=("EMB", "MLP"),
    tokens=("EMB",),
    overhead=("EMB",),
    merging=("EMB", "OUT"),
)
SHOWN = dict(embed="EMB_{}", heads="QK_{}_*", qk="QK_*_{}", v="V_{}", mlp="MLP_{}", tokens="N_{}", out="OUT_{}")
_KEY = {level: re.compile(level + r"_(0|[1-9]\d{0,8})" * len(widths)) for level, widths in LEVELS.items()}


class LatencyTableError(ValueError):
    """A latency table that cannot be used; one line that names the file, the key, and what would be right."""


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
            raise LatencyTableError(f"{here} is not a key of a latency table; expected {expected}")
        yield from _leaves(child, levels[1:], here, (*widths, *map(int, match.groups())))


class Grid:
    """Seconds at every combination of the widths of its axes, and multilinear interpolation between them."""

    def __init__(self, columns: tuple[str, ...], axes: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        self.columns, self.axes, self.values = columns, axes, values
        self.select = [COLUMNS.index(c) for c in columns if c in COLUMNS]
        self.low, self.high = (np.array([a[i] if len(a) == 1 or i else 0 for a in axes]) for i in (0, -1))
        self._strides = [math.prod(values.shape[k + 1 :]) for k in range(values.ndim)]

    @classmethod
    def parse(cls, node: Any, grammar: str, path: str = "") -> Grid:
        """From a part of the file. Raises LatencyTableError naming the key that is odd, or the one that is missing."""
        levels = GRAMMARS[grammar]
        outer = "TOK" if grammar == "block" else "N"
        if isinstance(node, dict) and str(next(iter(node), "")).startswith(f"{outer}_"):
            levels = (outer, *levels)
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
