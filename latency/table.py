"""Latency tables: measured seconds of a transformer block at a grid of widths, and interpolation between them.

A table is JSON in the grammar that NViT published, `EMB_{e}` -> `QK_{heads}_{qk}` -> `V_{v}` -> `MLP_{m}` -> seconds
for ONE block; of several token counts, all under `TOK_{tokens}`. There may be three more keys: `_meta` (how it was
measured), `_overhead` (seconds outside the blocks, per embedding width) and `_parts` (seconds of the attention and of
the MLP branch by themselves, which lookups prefer; they may be given for several token counts, under `N_{tokens}`, with
`tokens`, what it takes to merge the model's tokens into fewer and to put them back). Everything about points and
between them is in `grid`.
"""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic import write_compact_json
from latency.grid import COLUMNS, MAX_LEAVES, Grid, LatencyTableError
from models.dims import BlockDims, ViTDims

MAX_BYTES = 200_000_000
PUBLISHED_POINTS = dict(embed=8, heads=6, qk=5, v=5, mlp=9)  # at most, of the keys made from measured parts


class MonotoneReport(NamedTuple):
    """What the monotone clean-up changed: values raised, of how many, and the largest relative change."""

    raised: int
    values: int
    largest_change: float


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
        self._grids, self._merging = [block], None
        if "_parts" in data:
            parts = data["_parts"]
            if not isinstance(parts, dict) or sorted({*parts, "tokens"}) != ["attention", "mlp", "tokens"]:
                raise LatencyTableError("_parts must hold the keys attention, mlp, and may hold tokens")
            if "tokens" in parts:
                self._merging = Grid.parse(parts["tokens"], "tokens", "_parts -> tokens")
            self._grids = [Grid.parse(parts[name], name, f"_parts -> {name}") for name in ("attention", "mlp")]
        columns, most = self._grids[0].columns, self._grids[0].high
        self._tokens = most[columns.index("tokens")] if "tokens" in columns else 0.0  # of rows that do not say

    @classmethod
    def of_parts(cls, seconds: dict[str, float], meta: dict[str, Any]) -> LatencyTable:
        """From component seconds by key ("attention/EMB_96/QK_3_32/V_32", "mlp/EMB_96/MLP_384", "overhead/EMB_96").

        Of several token counts, attention and mlp keys go on with "N_66" in second place, and there are "tokens/N_40/
        EMB_96". The published keys hold the sums of attention and MLP, at the most tokens and a part of the points.
        """
        tree: dict[str, Any] = {}
        for name, value in seconds.items():
            *path, last = name.split("/")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[last] = float(f"{value:.6g}")
        overhead = {"_overhead": tree.pop("overhead")} if "overhead" in tree else {}
        return cls({"_meta": meta, **_published(tree), **overhead, "_parts": tree})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """The table in a file, a `SwinTable` where it is one. Raises LatencyTableError, whatever is wrong with it."""
        from latency.swin_table import SwinTable, is_swin_table  # made of these tables

        try:
            if (size := os.path.getsize(path)) > MAX_BYTES:
                raise LatencyTableError(f"{path}: {size:,} bytes; a latency table has at most {MAX_BYTES:,}")
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            hint = "build one with python -m latency.build_table"
            raise LatencyTableError(f"{path}: cannot read the latency table: {error.strerror}; {hint}") from None
        except UnicodeDecodeError:
            raise LatencyTableError(f"{path}: the latency table is not a text file; expected JSON") from None
        if (values := sum(map(text.count, ",[{"))) > 2 * MAX_LEAVES:  # before anything is made of them
            raise LatencyTableError(f"{path}: some {values:,} values; a latency table has at most {MAX_LEAVES:,}")
        if not text.strip():
            raise LatencyTableError(f"{path}: the file is empty; expected a JSON object with keys EMB_{{embed}}")
        try:
            data = json.loads(text)
            return (SwinTable if is_swin_table(data) else cls)(data, str(path))
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise LatencyTableError(f"{path}: not JSON at {where}: {error.msg}") from None
        except RecursionError:
            raise LatencyTableError(f"{path}: nested too deeply for a latency table") from None
        except LatencyTableError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise LatencyTableError(f"{path}: not JSON: {str(error)[:60]}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, atomically."""
        write_compact_json(path, self.data)

    @property
    def meta(self) -> dict[str, Any]:
        """How the table was measured; empty for a published table."""
        return self.data.get("_meta", {})

    @property
    def tokens(self) -> int:
        """Most tokens of a block, where the table was measured at several counts; else 0."""
        return int(self._tokens)

    def blocks_seconds(
        self, widths: np.ndarray, *, monotone: bool = False, asking: int | np.ndarray | None = None
    ) -> np.ndarray:
        """Seconds of blocks: rows (embed, heads, qk, v, mlp), (…, 5) -> (…); or (…, 6), with tokens at the end.

        monotone looks up the cleaned table, in which no value decreases when a width grows. asking: only so many
        tokens ask and pass the MLP (`lean_last` of `models.build_vit`), None for all; it is broadcast to the blocks.
        That is not measured by itself, so each branch takes the share of its seconds that it has left of its MACs.
        Raises LatencyTableError for a width above the grid.
        """
        widths = np.asarray(widths, dtype=float)
        shape, widths = widths.shape[:-1], widths.reshape(-1, widths.shape[-1])
        each = None if asking is None else np.broadcast_to(asking, shape).ravel()
        if widths.shape[-1] == len(COLUMNS) - 1:
            widths = np.insert(widths, COLUMNS.index("tokens"), self._tokens, axis=1)
        grids = self._clean if monotone else self._grids
        try:
            shares = np.ones((len(grids), len(widths))) if each is None else _shares(widths, each, len(grids))
            if len(grids) == 1:
                return (grids[0](widths[:, grids[0].select]) * shares[0]).reshape(shape)
            seconds = np.zeros(len(widths))
            for grid, decisive, share in zip(grids, ("heads", "mlp"), shares, strict=True):
                alive = widths[:, COLUMNS.index(decisive)] > 0  # a branch of width 0 is not built
                seconds[alive] += grid(widths[alive][:, grid.select]) * share[alive]
            if self._merging:
                fewer = widths[:, COLUMNS.index("tokens")] < self._tokens
                seconds[fewer] += self._merging(widths[fewer][:, self._merging.select])
            return seconds.reshape(shape)
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None

    def block_seconds(self, embed: int, block: BlockDims) -> float:
        """Seconds of one block at residual width `embed`."""
        return float(self.blocks_seconds(_rows(embed, (block,)))[0])

    def model_seconds(self, dims: ViTDims, asking: int | None = None) -> float:
        """Seconds of a model: its blocks, of which the last lets only `asking` tokens ask (None for all), and what is
        outside them where the table has it."""
        each = asking_per_block(len(dims.blocks), asking)
        blocks = float(self.blocks_seconds(_rows(dims.embed, dims.blocks), asking=each).sum())
        return blocks + self.overhead_seconds(dims.embed)

    def overhead_seconds(self, embed: int) -> float:
        """Seconds outside the blocks (patch embedding, final norm, heads); 0 where the table does not have them."""
        if self._overhead is None:
            return 0.0
        try:
            return float(self._overhead(np.array([[embed]], dtype=float))[0])
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: _overhead: {error}") from None

    def ratio(self, dims: ViTDims, dense: ViTDims, asking: int | None = None) -> float:
        """Predicted time of `dims`, of whose last block only `asking` tokens ask, over that of `dense`."""
        return self.model_seconds(dims, asking) / self.model_seconds(dense)

    def check_covers(self, dims: ViTDims) -> None:
        """Raises LatencyTableError when a width lies above the table, or the token count is not the table's."""
        if not isinstance(dims, ViTDims):
            raise LatencyTableError(
                f"{self.name}: measured on a plain ViT but the model has {len(dims.stages)} stages;"
                " build a table for it with python -m latency.build_table"
            )
        self.model_seconds(dims)
        tokens = None if self._tokens else self.meta.get("tokens")
        if odd := [b.tokens for b in dims.blocks if tokens is not None and b.tokens != tokens]:
            raise LatencyTableError(f"{self.name}: measured with {tokens} tokens but the model has {odd[0]}")

    def monotone_report(self) -> MonotoneReport:
        """What `monotone=True` changes."""
        raw, clean = (np.concatenate([g.values.ravel() for g in grids]) for grids in (self._grids, self._clean))
        raised = clean > raw
        change = (clean[raised] - raw[raised]) / np.maximum(raw[raised], np.finfo(float).tiny)
        return MonotoneReport(int(raised.sum()), raw.size, float(change.max(initial=0)))


def asking_per_block(depth: int, asking: int | None) -> np.ndarray | None:
    """`asking` of the last of `depth` blocks as that of each, for `LatencyTable.blocks_seconds`; None stays None."""
    return None if asking is None else np.append(np.full(depth - 1, np.inf), asking) if depth else np.empty(0)


def _published(parts: dict[str, Any]) -> dict[str, Any]:
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


def _shares(rows: np.ndarray, asking: np.ndarray, branches: int) -> np.ndarray:
    """What is left of the MACs of attention and of the MLP (branches 2), or of both together (1), where `asking` tokens
    ask: (branches, n) of rows (n, 6) and asking (n,). The counts are those of `models.count`, which latency tables do
    without."""
    e, h, q, v, m, n = rows.T
    n = np.maximum(n, 1)  # not known: then all of them ask

    def macs(a: np.ndarray) -> np.ndarray:
        counts = np.stack([h * (q + v) * ((a + n) * e + a * n), 2 * a * e * m])
        return counts if branches == 2 else counts.sum(0, keepdims=True)

    left, full = macs(np.minimum(asking, n)), macs(n)
    return np.divide(left, full, out=np.ones_like(full), where=full > 0)


def _rows(embed: int, blocks: tuple[BlockDims, ...]) -> np.ndarray:
    rows = [(embed, b.heads, b.qk, b.v, b.mlp, b.tokens) for b in blocks]
    return np.array(rows, dtype=float).reshape(-1, len(COLUMNS))
