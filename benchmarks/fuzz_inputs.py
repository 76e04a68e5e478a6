"""Inputs for the fuzzers, as hypothesis strategies: a valid value, or bytes, with something odd inside."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

WORDS = st.sampled_from(
    [
        "",
        "x",
        "nan",
        "inf",
        "-1",
        "0",
        "1",
        "1e999",
        "9" * 30,
        "9" * 5000,
        "True",
        "{",
        '{"G":1}',
        "\0",
        "a=b",
        "=",
        "4.2G",
        "K",
        "heads",
        "é",
        "--",
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([0, -1, 1, 10**6, 10**9, 10**30, 2**63, -(2**63), math.nan, math.inf, 1e308, "", "EMB_8", [], {}]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def odd(draw: Any, value: Any) -> Any:
    """The value with one place replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        value = dict(value)
        key = draw(st.sampled_from(sorted(value, key=str)))
        how = draw(st.sampled_from(("inside", "inside", "inside", "drop", "rename", "add")))
        if how == "inside":
            value[key] = draw(odd(value[key]))
        elif how == "add":
            value[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            taken = value.pop(key)
            if how == "rename":
                value[draw(st.text(max_size=8)) if draw(st.booleans()) else f"{key}0"] = taken
        return value
    if isinstance(value, list | tuple) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(odd(value[place])), *value[place + draw(st.integers(0, 1)) :]]
    return draw(VALUES)


@st.composite
def torn(draw: Any, data: bytes) -> bytes:
    """The bytes with some flipped, cut out or put in."""
    torn_data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, max(0, len(torn_data) - 1)))
        how = draw(st.sampled_from(("flip", "flip", "cut", "put", "end")))
        if how == "flip" and torn_data:
            torn_data[where] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del torn_data[where : where + draw(st.integers(1, 64))]
        elif how == "put":
            torn_data[where:where] = draw(st.binary(max_size=16))
        else:
            del torn_data[where:]
    return bytes(torn_data)


@st.composite
def texts(draw: Any, valid: list[Any]) -> bytes:
    """JSON that is nearly one of the valid values, or anything."""
    value = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 3))):
        value = draw(odd(value))
    text = json.dumps(value).encode()
    return draw(st.one_of(st.just(text), torn(text), st.just(text), st.binary(max_size=40)))
