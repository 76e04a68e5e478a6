"""What whole models cost beyond the sum of their parts: a factor and a constant, from a few measured models."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from latency.points import group_of, random_dims
from latency.table import STAGE, LatencyTable
from models.swin_dims import Dims

MODELS = 11  # narrow to wide, beside the dense one
MOST_CONSTANT = 0.1  # of the dense model's time
NOISE = 0.03  # relative errors beyond this count less: they are the machine's

MOST_ERROR = 0.1  # mean, above which parts and whole models disagree
Measure = Callable[[Sequence[Dims]], Sequence[Any]]  # -> ratios to dense, seconds of dense, and maybe more


class Fit(NamedTuple):
    """factor: of the table's predictions; constant: seconds to add outside the blocks; error: mean relative one, after
    that, of what the fit was made to."""

    factor: float
    constant: float
    error: float


def choose_models(dims: Dims, fixed: Collection[str] = (), seed: int = 0, count: int = MODELS) -> list[Dims]:
    """Random architectures whose embeddings are spread from the narrowest to the full one."""
    rng = random.Random(f"fit {seed}")

    def embed(full: int, i: int) -> int:
        group = group_of("embed", full)
        return min(full, round(np.linspace(group, full, count)[i] / group) * group)

    return [
        dims.with_stages(
            [
                replace(stage, embed=embed(full.embed, i))
                for stage, full in zip(random_dims(dims, rng, fixed).stages, dims.stages, strict=True)
            ]
        )
        for i in range(count)
    ]


def fit(table: LatencyTable, dense: Dims, chosen: Sequence[Dims], measure: Measure) -> Fit:
    """What brings the table's predictions to what models measure.

    Robust least squares of relative errors over the dense model and `chosen`. The seconds are what does not shrink with
    the widths: without them, small models come out too fast.
    """
    ratios, dense_seconds, *_ = measure(chosen)
    measured = dense_seconds * np.array([1.0, *ratios])
    predicted = np.array([table.model_seconds(d) for d in (dense, *chosen)])
    common, most = float(np.median(measured / predicted)), MOST_CONSTANT * dense_seconds

    def errors(x: np.ndarray) -> np.ndarray:
        return (x[0] * common * predicted + x[1] * most) / measured - 1

    solution = least_squares(errors, (1.0, 0.1), bounds=([0.5, 0], [2, 1]), loss="soft_l1", f_scale=NOISE)
    return Fit(float(solution.x[0] * common), float(solution.x[1] * most), float(np.abs(errors(solution.x)).mean()))


def correct(table: LatencyTable, factor: float, constant: float, **meta: Any) -> LatencyTable:
    """The table with every value multiplied by `factor`, and `constant` seconds added outside the blocks."""

    def scaled(node: Any, add: float = 0.0) -> Any:
        if isinstance(node, dict):
            return {key: scaled(child, add) for key, child in node.items()}
        return float(f"{factor * node + add:.6g}")

    data = {key: node if key == "_meta" else scaled(node) for key, node in table.data.items()}
    before, after = (d[f"{STAGE}0"] if table.is_staged else d for d in (table.data, data))
    outside = before.get("_overhead", {key: 0.0 for key in before if key.startswith("EMB_")})
    after["_overhead"] = scaled(outside, constant)
    return LatencyTable(data | dict(_meta=table.meta | meta), table.name)
