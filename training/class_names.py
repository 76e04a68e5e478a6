"""Names of classes: a classifier's outputs mean what they meant when it was trained, or the run does not start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_names_of(dataset: Any) -> list[str]:
    """Of a data set, or of the one that it wraps."""
    while not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    return [str(name) for name in dataset.classes]


def are_others(known: Sequence[str], names: Sequence[str]) -> bool:
    """Whether both are known, as many, and not the same set: not those of another order."""
    return bool(known and names) and len(known) == len(names) and sorted(known) != sorted(names)


def check_class_names(known: Sequence[str], names: Sequence[str], path: str) -> None:
    """Raises ValueError where the weights of `path` know other classes than the data has, or in another order.

    Another number of classes, and names that are not known, are no matter of this check.
    """
    if not known or not names or len(known) != len(names) or [*known] == [*names]:
        return
    index = next(i for i, (a, b) in enumerate(zip(known, names, strict=True)) if a != b)
    what = "other classes" if are_others(known, names) else "the same classes in another order"
    raise ValueError(
        f"{path} was trained on {what} than the data has: class {index} was {known[index]!r}, "
        f"now it is {names[index]!r}"
    )
