"""Latency tables: measured seconds of a transformer's blocks at a grid of widths, and of whole models from them.

A table of a plain ViT is one stage in the grammar of `latency.stage`, with `_meta` (how it was measured) beside its
keys. A table of a Swin Transformer has `_meta` and `STAGE_0`, `STAGE_1`, …, each a stage at its own resolution;
`_overhead` of the first is the patch embedding, of the last the final norm and the classifier, and `_merging` of the
later ones, `EMB_{e}` -> `OUT_{o}` -> seconds, the downsampling from `e` channels to the stage's own `o`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic import write_compact_json
from files.schema import find_own
from latency.grid import MAX_LEAVES, Grid, LatencyTableError
from latency.stage import StageTable, block_rows, stage_of_parts
from models.dims import BlockDims
from models.swin_dims import Dims, SwinDims

MAX_BYTES = 200_000_000
STAGE = "STAGE_"


class MonotoneReport(NamedTuple):
    """What the monotone clean-up changed: values raised, of how many, and the largest relative change."""

    raised: int
    values: int
    largest_change: float


class LatencyTable:
    """Seconds of blocks and models of any widths up to the table's largest, for the batch it was measured at.

    `data` is the file's content; `name` stands in error messages; `stages` are the tables of what shares one embedding:
    one of a plain ViT, several of a Swin Transformer.
    """

    def __init__(self, data: Any, name: str = "latency table") -> None:
        self.data, self.name = data, str(name)
        try:
            self._check_meta()
            self.is_staged = any(str(key).startswith(STAGE) for key in data)
            nodes = self._nodes()
            between = [node.pop("_merging", None) for node in nodes.values()][1:]
            self._merging = [self._between(f"{STAGE}{i}", node) for i, node in enumerate(between, 1)]
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None
        self.stages = [StageTable(node, f"{self.name}: {key}" if key else self.name) for key, node in nodes.items()]

    def _check_meta(self) -> None:
        if not isinstance(self.data, dict) or not self.data:
            raise LatencyTableError("the table is empty; expected an object with keys EMB_{embed}")
        if not isinstance(meta := self.data.get("_meta", {}), dict):
            raise LatencyTableError(f"_meta must be an object, not {str(meta)[:40]!r}")
        if meta.get("complete") is False:
            raise LatencyTableError(
                "the table is incomplete, its measurement was interrupted; "
                "run python -m latency.build_table again with the same settings to continue"
            )

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """The content of every stage by its key, "" for the only one of a plain ViT."""
        content = {key: node for key, node in self.data.items() if key != "_meta"}
        if not self.is_staged:
            return {"": content}
        keys = [f"{STAGE}{i}" for i in range(len(content))]
        if odd := sorted(set(content) - set(keys)):
            raise LatencyTableError(f"{odd[0]} is not a key of a table of {len(keys)} stages")
        for key in keys:
            if not isinstance(content[key], dict):
                raise LatencyTableError(f"{key} must be an object, not {str(content[key])[:40]!r}")
        return {key: dict(content[key]) for key in keys}

    @staticmethod
    def _between(key: str, node: Any) -> Grid:
        if node is None:
            raise LatencyTableError(f"{key} lacks _merging, the seconds of its downsampling")
        return Grid.parse(node, "merging", f"{key} -> _merging")

    @classmethod
    def of_parts(cls, seconds: dict[str, float], meta: dict[str, Any]) -> LatencyTable:
        """From component seconds by key, as `latency.stage.stage_of_parts` takes them.

        Those of a Swin Transformer begin with the stage ("STAGE_0/mlp/EMB_96/MLP_384"), and there are
        "STAGE_1/merging/EMB_96/OUT_192".
        """
        if not any(name.startswith(STAGE) for name in seconds):
            return cls({"_meta": meta} | stage_of_parts(seconds))
        parts: dict[str, dict[str, float]] = {}
        merging: dict[str, Any] = {}
        for name, value in seconds.items():
            stage, rest = name.split("/", 1)
            if rest.startswith("merging/"):
                _, before, own = rest.split("/")
                merging.setdefault(stage, {}).setdefault(before, {})[own] = float(f"{value:.6g}")
            else:
                parts.setdefault(stage, {})[rest] = value
        data: dict[str, Any] = {"_meta": meta}
        for stage in sorted(parts, key=lambda s: int(s.removeprefix(STAGE))):
            data[stage] = stage_of_parts(parts[stage]) | (dict(_merging=merging[stage]) if stage in merging else {})
        return cls(data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """The table in a file, or of this project's own. Raises LatencyTableError, whatever is wrong with it."""
        path = find_own(path)
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
            return cls(data, str(path))
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
    def device(self) -> str:
        """What it was measured on, as `runtime.device.device_name` calls it; "" for a published table."""
        return str(self.meta.get("device", "")).replace(", 1 threads", ", 1 thread")  # which older tables have

    @property
    def tokens(self) -> int:
        """The largest token count of a block if the table was measured at several, else 0."""
        return self.stages[0].tokens

    @property
    def branches_apart(self) -> bool:
        """Whether a block's seconds are the sum of those of its attention, its MLP and the merging of its tokens."""
        return all(len(stage.grids) == 2 for stage in self.stages)

    def blocks_seconds(self, widths: np.ndarray, *, monotone: bool = False) -> np.ndarray:
        """Seconds of blocks of a plain ViT, or of a Swin Transformer's first stage: `StageTable.blocks_seconds`."""
        return self.stages[0].blocks_seconds(widths, monotone=monotone)

    def block_seconds(self, embed: int, block: BlockDims) -> float:
        """Seconds of one block at residual width `embed`."""
        return float(self.blocks_seconds(block_rows(embed, (block,)))[0])

    def overhead_seconds(self, embed: int) -> float:
        """Seconds outside the blocks of a plain ViT: `StageTable.overhead_seconds`."""
        return self.stages[0].overhead_seconds(embed)

    def model_seconds(self, dims: Dims) -> float:
        """Seconds of a model: its blocks, what is outside them where the table has it, and downsampling between stages.

        Raises LatencyTableError for a model of another kind, and for widths above the table's.
        """
        self._check_kind(dims)
        seconds = 0.0
        for table, stage in zip(self.stages, dims.stages, strict=True):
            blocks = table.blocks_seconds(block_rows(stage.embed, stage.blocks))
            seconds += float(blocks.sum()) + table.overhead_seconds(stage.embed)
        return seconds + self.merging_seconds(dims)

    def merging_seconds(self, dims: Dims) -> float:
        """Seconds of the downsampling between the stages; 0 where there is one."""
        embeds = [float(stage.embed) for stage in dims.stages]
        try:
            pairs = zip(self._merging, zip(embeds, embeds[1:], strict=False), strict=True)
            return sum(float(grid(np.array([widths]))[0]) for grid, widths in pairs)
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: _merging: {error}") from None

    def ratio(self, dims: Dims, dense: Dims) -> float:
        """Predicted time of `dims` over that of `dense`."""
        return self.model_seconds(dims) / self.model_seconds(dense)

    def _check_kind(self, dims: Dims) -> None:
        staged = isinstance(dims, SwinDims)
        if staged == self.is_staged and len(dims.stages) == len(self.stages):
            return
        own = f"a Swin Transformer of {len(self.stages)} stages" if self.is_staged else "a plain ViT"
        what = f"{len(dims.stages)} stages" if staged else "no stages"
        raise LatencyTableError(
            f"{self.name}: measured on {own} but the model has {what}; build a table for it with "
            "python -m latency.build_table"
        )

    def check_covers(self, dims: Dims) -> None:
        """Raises LatencyTableError when stages, widths or token counts are not the table's."""
        self.model_seconds(dims)
        counts = self.meta.get("tokens")
        if not isinstance(counts, list):
            counts = [None if self.is_staged else counts] * len(self.stages)
        for table, stage, tokens in zip(self.stages, dims.stages, counts, strict=False):
            if tokens is None or table.tokens:
                continue
            if odd := [b.tokens for b in stage.blocks if b.tokens != tokens]:
                raise LatencyTableError(f"{table.name}: measured with {tokens} tokens but the model has {odd[0]}")

    def monotone_report(self) -> MonotoneReport:
        """What `monotone=True` changes."""
        grids = [pair for stage in self.stages for pair in stage.grids]
        raw, clean = (np.concatenate([grid.values.ravel() for grid in each]) for each in zip(*grids, strict=True))
        raised = clean > raw
        change = (clean[raised] - raw[raised]) / np.maximum(raw[raised], np.finfo(float).tiny)
        return MonotoneReport(int(raised.sum()), raw.size, float(change.max(initial=0)))
