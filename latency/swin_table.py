"""Latency tables of Swin Transformers: one table per stage, and what lies between the stages.

A file has `_meta` as every table, and `STAGE_0`, `STAGE_1`, …: each is a table of that stage's blocks in the grammar of
`latency.table`, at the stage's resolution and windows. `_overhead` of the first stage is the patch embedding, of the
last one the final norm and the classifier. `_merging` of the later stages, `EMB_{e}` -> `OUT_{o}` -> seconds, is the
downsampling from `e` channels of the stage before to the stage's own `o`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from files.atomic import write_compact_json
from latency.grid import Grid, LatencyTableError
from latency.table import LatencyTable, MonotoneReport
from models.swin_dims import Dims, SwinDims

STAGE = "STAGE_"


def is_swin_table(data: Any) -> bool:
    """Whether a file's content is a table of stages."""
    return isinstance(data, dict) and any(str(key).startswith(STAGE) for key in data)


class SwinTable:
    """Seconds of Swin Transformers of any widths up to the table's largest; the methods are those of `LatencyTable`.

    stages: the table of each stage's blocks, with what is outside them and depends on that stage alone.
    """

    def __init__(self, data: dict[str, Any], name: str = "latency table") -> None:
        self.data, self.name = data, str(name)
        keys = [f"{STAGE}{i}" for i in range(len(data) - ("_meta" in data))]
        if odd := sorted(set(data) - {"_meta", *keys}):
            raise LatencyTableError(f"{self.name}: {odd[0]} is no key of a table of {len(keys)} stages")
        self.stages = [self._stage(i, key) for i, key in enumerate(keys)]
        self._merging = [self._between(key) for key in keys[1:]]

    def _stage(self, index: int, key: str) -> LatencyTable:
        node, meta = self.data[key], self.meta
        if not isinstance(node, dict):
            raise LatencyTableError(f"{self.name}: {key} must be an object, not {str(node)[:40]!r}")
        if isinstance(meta, dict):
            tokens = meta.get("tokens")
            own = tokens[index] if isinstance(tokens, list) and index < len(tokens) else None
            meta = meta | dict(tokens=own)
        table = {name: child for name, child in node.items() if name != "_merging"}
        return LatencyTable(table | dict(_meta=meta), f"{self.name}: {key}")

    def _between(self, key: str) -> Grid:
        if "_merging" not in self.data[key]:
            raise LatencyTableError(f"{self.name}: {key} lacks _merging, the seconds of its downsampling")
        try:
            return Grid.parse(self.data[key]["_merging"], "merging", f"{key} -> _merging")
        except LatencyTableError as error:
            raise LatencyTableError(f"{self.name}: {error}") from None

    @classmethod
    def of_parts(cls, seconds: dict[str, float], meta: dict[str, Any]) -> SwinTable:
        """From seconds by key: those of `LatencyTable.of_parts` behind the stage ("STAGE_0/mlp/EMB_96/MLP_384"), and
        "STAGE_1/merging/EMB_96/OUT_192"."""
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
            table = {k: v for k, v in LatencyTable.of_parts(parts[stage], {}).data.items() if k != "_meta"}
            data[stage] = table | (dict(_merging=merging[stage]) if stage in merging else {})
        return cls(data)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, atomically."""
        write_compact_json(path, self.data)

    @property
    def meta(self) -> dict[str, Any]:
        """How the table was measured."""
        return self.data.get("_meta", {})

    def model_seconds(self, dims: SwinDims) -> float:
        """Seconds of a model: its stages, and the downsampling between them. Raises LatencyTableError."""
        self._check_kind(dims)
        stages = zip(self.stages, dims.stages, strict=True)
        return sum(table.model_seconds(stage) for table, stage in stages) + self.merging_seconds(dims)

    def merging_seconds(self, dims: SwinDims) -> float:
        """Seconds of the downsampling between the stages."""
        embeds = [float(stage.embed) for stage in dims.stages]
        total = 0.0
        for grid, widths in zip(self._merging, zip(embeds, embeds[1:], strict=False), strict=True):
            try:
                total += float(grid(np.array([widths]))[0])
            except LatencyTableError as error:
                raise LatencyTableError(f"{self.name}: _merging: {error}") from None
        return total

    def ratio(self, dims: SwinDims, dense: SwinDims) -> float:
        """Predicted time of `dims` over that of `dense`."""
        return self.model_seconds(dims) / self.model_seconds(dense)

    def _check_kind(self, dims: Dims) -> None:
        if len(dims.stages) != len(self.stages) or not isinstance(dims, SwinDims):
            what = f"{len(dims.stages)} stages" if isinstance(dims, SwinDims) else "no stages"
            raise LatencyTableError(
                f"{self.name}: measured on a Swin Transformer of {len(self.stages)} stages but the "
                f"model has {what}; build a table for it with python -m latency.build_table"
            )

    def check_covers(self, dims: Dims) -> None:
        """Raises LatencyTableError when stages, widths or token counts are not the table's."""
        self.model_seconds(dims)
        for table, stage in zip(self.stages, dims.stages, strict=True):
            table.check_covers(stage)

    def monotone_report(self) -> MonotoneReport:
        """What `monotone=True` changes in the stages."""
        found = [table.monotone_report() for table in self.stages]
        return MonotoneReport(
            sum(r.raised for r in found), sum(r.values for r in found), max(r.largest_change for r in found)
        )
