"""What the value of a flag may be, in words and as a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Range(NamedTuple):
    """words: what a value must be, to follow "must be"."""

    words: str
    holds: Callable[[Any], bool]


ABOVE_0 = Range("above 0", lambda x: 0 < x < math.inf)
FROM_0 = Range("from 0 up", lambda x: 0 <= x < math.inf)
STD = Range("from 0.001 to 1", lambda x: 1e-3 <= x <= 1)  # of pixels in [0, 1]
SHARE = Range("in [0, 1]", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = Range("in (0, 1]", lambda x: 0 < x <= 1)
SHARE_BELOW_1 = Range("in [0, 1)", lambda x: 0 <= x < 1)
FOLDER_NAME = Range("the name of a folder, without a path", lambda name: Path(name).name == name not in ("", ".", ".."))
