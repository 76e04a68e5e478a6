"""Seconds of the blocks of one stage at any widths: what a latency table holds for each embedding that it has.

A stage is JSON in the grammar that NViT published, `EMB_{e}` -> `QK_{heads}_{qk}` -> `V_{v}` -> `MLP_{m}` -> seconds
for ONE block; with several token counts, all under `TOK_{tokens}`. There may be two more keys: `_overhead` (seconds
outside the blocks, by embedding width) and `_parts` (seconds of the attention and of the MLP branch by themselves,
which lookups prefer; with several token counts under `N_{tokens}`, and with `tokens`, the cost of merging the model's
tokens into fewer and of putting them back). Grid points and interpolation are in `latency.grid`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np

from latency.grid import COLUMNS, Grid, LatencyTableError
from models.dims import BlockDims

PUBLISHED_POINTS = dict(embed=8, heads=6, qk=5, v=5, mlp=9)  # at most, of the keys made from measured parts
KEYS = ("_overhead", "_parts")
ALL = np.inf  # in the column of queries: every token is one


def block_rows(embed: int, blocks: Iterable[BlockDims]) -> np.ndarray:
    """Rows (embed, heads, qk, v, mlp, tokens, queries) for `StageTable.blocks_seconds`: (L, 7)."""
    rows = [(embed, b.heads, b.qk, b.v, b.mlp, b.tokens, ALL if b.queries is None else b.queries) for b in blocks]
    return np.array(rows, dtype=float).reshape(-1, len(COLUMNS) + 1)


class StageTable:
    """Seconds of blocks of any widths up to the stage's largest. name: stands in error messages."""

    def __init__(self, data: dict[str, Any], name: str) -> None:
        self.name = name
        try:
            self._parse(data)
        except LatencyTableError as error:
            raise LatencyTableError(f"{name}: {error}") from None
        self._clean = [grid.monotone() for grid in self._grids]

    def _parse(self, data: dict[str, Any]) -> None:
        if odd := [key for key in data if key.startswith("_") and key not in KEYS]:
            known = ", ".join(("_meta", *KEYS))
            raise LatencyTableError(f"{odd[0]} is not a key of a latency table; expected EMB_{{e}}, {known}")
        block = Grid.parse({key: child for key, child in data.items() if key not in KEYS}, "block")
        self._overhead = Grid.parse(data["_overhead"], "overhead", "_overhead") if "_overhead" in data else None
        self._grids, self._merging = [block], None
        if "_parts" in data:
            parts = data["_parts"]
            if not isinstance(parts, dict) or sorted({*parts, "tokens"}) != ["attention", "mlp", "tokens"]:
                raise LatencyTableError("_parts must hold the keys attention and mlp, and may hold tokens")
            if "tokens" in parts:
                self._merging = Grid.parse(parts["tokens"], "tokens", "_parts -> tokens")
            self._grids = [Grid.parse(parts[name], name, f"_parts -> {name}") for name in ("attention", "mlp")]
        columns, most = self._grids[0].columns, self._grids[0].high
        self._tokens = most[columns.index("tokens")] if "tokens" in columns else 0.0  # of rows that do not say

    @property
    def tokens(self) -> int:
        """The largest token count of a block if the stage was measured at several, else 0."""
        return int(self._tokens)

    @property
    def grids(self) -> list[tuple[Grid, Grid]]:
        """Every grid as measured, and with no value below that of a narrower layer."""
        return list(zip(self._grids, self._clean, strict=True))

    def blocks_seconds(self, widths: np.ndarray, *, monotone: bool = False) -> np.ndarray:
        """Seconds of blocks: rows (embed, heads, qk, v, mlp[, tokens[, queries]]), (…, 5 to 7) -> (…).

        monotone: look up the cleaned table, in which no value decreases when a width grows. A block with fewer queries
        than tokens (`models.dims.BlockDims`) is not measured by itself: each branch takes the share of its seconds that
        it has left of its MACs. Raises LatencyTableError for a width above the grid.
        """
        widths = np.asarray(widths, dtype=float)
        shape, rows = widths.shape[:-1], widths.reshape(-1, widths.shape[-1])
        queries = rows[:, len(COLUMNS)] if rows.shape[1] > len(COLUMNS) else np.full(len(rows), ALL)
        rows = rows[:, : len(COLUMNS)]
        if rows.shape[1] < len(COLUMNS):
            rows = np.insert(rows, COLUMNS.index("tokens"), self._tokens, axis=1)
        grids = self._clean if monotone else self._grids
        try:
            shares = _shares(rows, queries, len(grids))
            if len(grids) == 1:
                return (grids[0](rows[:, grids[0].select]) * shares[0]).reshape(shape)
            seconds = np.zeros(len(rows))
            for grid, decisive, share in zip(grids, ("heads", "mlp"), shares, strict=True):
                alive = rows[:, COLUMNS.index(decisive)] > 0  # a branch of width 0 is not built
                seconds[alive] += grid(rows[alive][:, grid.select]) * share[alive]
            if self._merging:
                fewer = rows[:, COLUMNS.index("tokens")] < self._tokens
                seconds[fewer] += self._merging(rows[fewer][:, self._merging.select])
            return seconds.reshape(shape)
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None

    def overhead_seconds(self, embed: int) -> float:
        """Seconds outside the blocks (patch embedding, final norm, heads); 0 where the stage does not have them."""
        if self._overhead is None:
            return 0.0
        try:
            return float(self._overhead(np.array([[embed]], dtype=float))[0])
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: _overhead: {error}") from None


def stage_of_parts(seconds: dict[str, float]) -> dict[str, Any]:
    """The content of a stage, from seconds by "attention/EMB_96/QK_3_32/V_32", "mlp/EMB_96/MLP_384", "overhead/EMB_96".

    With several token counts, attention and mlp keys have "N_66" in second place, and there are "tokens/N_40/EMB_96".
    The published keys hold the sums of attention and MLP, at the most tokens and at some of the points.
    """
    tree: dict[str, Any] = {}
    for name, value in seconds.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = float(f"{value:.6g}")
    overhead = {"_overhead": tree.pop("overhead")} if "overhead" in tree else {}
    return {**_parse_published(tree), **overhead, "_parts": tree}


def _parse_published(parts: dict[str, Any]) -> dict[str, Any]:
    """The published keys, from component measurements."""
    grids = [Grid.parse(parts[kind], kind) for kind in ("attention", "mlp")]
    axes = {c: axis.astype(int).tolist() for grid in grids for c, axis in zip(grid.columns, grid.axes, strict=True)}
    for name, most in PUBLISHED_POINTS.items():
        spread = np.linspace(0, len(axes[name]) - 1, min(most, len(axes[name])))
        axes[name] = [axes[name][round(i)] for i in spread]
    rows = np.array(list(product(*(axes[c] for c in PUBLISHED_POINTS), [max(axes.get("tokens", [0]))])), dtype=float)
    seconds = sum(grid(rows[:, grid.select]) for grid in grids)
    tree: dict[str, Any] = {}
    for (e, h, q, v, m, _), value in zip(rows.astype(int).tolist(), seconds.tolist(), strict=True):
        leaf = tree.setdefault(f"EMB_{e}", {}).setdefault(f"QK_{h}_{q}", {}).setdefault(f"V_{v}", {})
        leaf[f"MLP_{m}"] = float(f"{value:.6g}")
    return tree


def _shares(rows: np.ndarray, queries: np.ndarray, branches: int) -> np.ndarray:
    """What is left of the MACs of attention and of the MLP (branches 2), or of both together (1), with n queries.

    rows: (n, 6); queries: (n,); result (branches, n). The counts are those of `models.count`, which tables do not need
    otherwise.
    """
    e, h, q, v, m, n = rows.T
    n = np.maximum(n, 1)  # unknown: then every token is a query
    if not (queries < n).any():
        return np.ones((branches, len(rows)))

    def macs(a: np.ndarray) -> np.ndarray:
        counts = np.stack([h * (q + v) * ((a + n) * e + a * n), 2 * a * e * m])
        return counts if branches == 2 else counts.sum(0, keepdims=True)

    left, full = macs(np.minimum(queries, n)), macs(n)
    return np.divide(left, full, out=np.ones_like(full), where=full > 0)
