"""`pruning_configs/*.json` as a value: what is scored, how it is averaged, in what groups units go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from files import schema
from models.axes import Axis
from models.masks import Masks
from models.swin_dims import Dims
from pruning.saliency import Saliency

AXES = ("embed", "heads", "qk", "v", "mlp")
TOKENS = dict(tokens=8)  # patches of a group, where a config does not say
PUBLISHED_METHODS = {2: "magnitude", 22: "taylor_elementwise", 23: "taylor_sq"}
PUBLISHED_GROUPS = dict(embed=16, heads=2, qk=8, v=8, mlp=16)
# Keys of the published files that its code overwrites or never reads.
PUBLISHED_DEAD = frozenset(
    "do_after_step fixed_criteria fixed_layer flops_regularization frequency group_size "
    "l2_normalization_per_layer latency_look_up_table latency_regularization latency_target "
    "leave_at_least_one_group maximum_pruning_iterations prune_neurons_max prune_per_iteration pruning_silent "
    "pruning_threshold push_down push_group_down rank_neurons_equally set_moment_zero "
    "start_pruning_after_n_iterations starting_neuron use_momentum".split()
)


class ConfigError(ValueError):
    """A pruning config that cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class PruningConfig:
    """criterion: see `Saliency`; momentum: of the mean over events, in [0, 1); group_size: units per group, by axis."""

    criterion: str = "taylor_sq"
    momentum: float = 0.9
    group_size: dict[str, int] = field(default_factory=lambda: dict(PUBLISHED_GROUPS))

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, str) or self.criterion not in Saliency.CRITERIA:
            raise ConfigError(f"criterion {self.criterion!r} is none of {', '.join(Saliency.CRITERIA)}")
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        if not number or not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be a number in [0, 1), not {self.momentum!r}")
        if not isinstance(self.group_size, dict) or set(self.group_size) - set(TOKENS) != set(AXES):
            raise ConfigError(f"group_size needs exactly the axes {', '.join(AXES)}, and may have tokens")
        for axis, size in self.group_size.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"group_size of {axis} must be a whole number above 0, not {size!r}")

    def group_sizes(self, of: Dims | Masks, multiple: int = 1, left_alone: Collection[str] = ()) -> dict[str, int]:
        """Units per group of every axis: at most an eighth of the axis, rounded up: narrow models keep a choice.

        They are rounded up to multiples of `multiple` (heads and tokens may be any number), so that widths end at
        multiples. An axis that is left alone is one group, and the last group stays.
        """

        sizes = TOKENS | self.group_size

        def size(axis: str, n: int) -> int:
            kind = Axis.parse(axis).kind
            if kind in left_alone:
                return n
            step = 1 if kind in ("heads", "tokens") else multiple
            return max(1, min(n, -(-min(sizes[kind], -(-n // 8)) // step) * step))

        return {axis: size(axis, n) for axis, n in of.sizes().items()}


def _from_published(data: dict[str, Any]) -> tuple[PruningConfig, list[str]]:
    if not isinstance(data["method"], int) or data["method"] not in PUBLISHED_METHODS:
        known = ", ".join(f"{number} ({word})" for number, word in PUBLISHED_METHODS.items())
        raise ConfigError(f"method {data['method']!r} is none of {known}")
    if unknown := set(data) - PUBLISHED_DEAD - {"method", "pruning_momentum"}:
        raise ConfigError(f"unknown key {sorted(unknown)[0]!r}")
    config = PruningConfig(PUBLISHED_METHODS[data["method"]], data.get("pruning_momentum", 0.0))
    return config, sorted(set(data) & PUBLISHED_DEAD)


def load_config(path: str | Path) -> tuple[PruningConfig, list[str]]:
    """(config, published keys that have no effect) of a JSON file, in this project's words or the published numbers.

    A file with a numeric `method` is a published one: its group sizes were 16/2/8/8/16 whatever it says. A relative
    path that does not exist may be one of this project's own files. Raises ConfigError.
    """
    try:
        data = schema.read_json(schema.find_own(path))
    except schema.SchemaError as error:
        raise ConfigError(f"pruning config {error}") from None
    try:
        if not isinstance(data, dict):
            raise ConfigError("expected an object")
        if "method" in data:
            return _from_published(data)
        known = [f.name for f in fields(PruningConfig)]
        if unknown := set(data) - set(known):
            raise ConfigError(f"unknown key {sorted(unknown)[0]!r}; known: {', '.join(known)}")
        return PruningConfig(**data), []
    except ConfigError as error:
        raise ConfigError(f"pruning config {path}: {error}") from None
