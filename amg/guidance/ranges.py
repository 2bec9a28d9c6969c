"""Which values an option may have: each function returns the value as it is kept, or names field, constraint
and value in a ValueError."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from amg.guidance.prompts import Prompts, read_prompts

LARGEST_COSINE = 0.99
"""The largest cosine that can be promised: an exact copy scores at least 0.9995 against its row in float16
(half a unit in the last place of every value), and the rest is left to an embedder in half precision."""
LARGEST_NL2 = 2.0
"""nL2 = l2 / (0.5·mean of the k nearest l2), and the nearest is no further than their mean."""
PROMISES = ("threshold", "rewind_threshold")
GATES = ("lambda_min", "lambda_max")


def number(name: str, value: Any) -> float:
    """A finite float, from any real number (NumPy's too) but no bool and no text."""
    if not _is_real(value):
        raise ValueError(f"`{name}` must be a number, got {value!r}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return found


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def at_least_0(name: str, value: Any) -> float:
    """A finite float >= 0."""
    found = number(name, value)
    if found < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value}")
    return found


def count(name: str, value: Any) -> int:
    """An int >= 0, from any whole number (NumPy's too) but no bool, no float and no text."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"`{name}` must be an integer >= 0, got {value!r}")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """True or False (NumPy's too); "false" and 0 are refused, as a text would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {value!r}")
    return bool(value)


def guard(name: str, value: Any) -> float:
    """A cosine of sketches in (0, LARGEST_COSINE], so that an exact copy is always over it."""
    found = number(name, value)
    if not 0 < found <= LARGEST_COSINE:
        raise ValueError(f"`{name}` must be in (0, {LARGEST_COSINE:g}] or None, got {value}")
    return found


def rate(name: str, value: Any) -> float:
    """A share in (0, 1)."""
    found = number(name, value)
    if not 0 < found < 1:
        raise ValueError(f"`{name}` must lie in (0, 1) or be None, got {value}")
    return found


def ceiling(name: str, value: Any) -> float:
    """A multiple >= 1 of what plain sampling costs."""
    found = number(name, value)
    if found < 1:
        raise ValueError(f"`{name}` must be >= 1 (1: what plain sampling costs) or None, got {value}")
    return found


def file(name: str, value: Any) -> Any:
    """A path, not opened here."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"`{name}` must be the path of a file, got {value!r}")
    return value


def prompts(name: str, value: Any) -> Prompts:
    """Texts with a word in them, of a list, or of a file that is read here: one a line."""
    if isinstance(value, (str, os.PathLike)):
        return Prompts(read_prompts(Path(value), name))
    texts = [*value] if isinstance(value, (list, tuple)) else []
    bad = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if not texts or bad:
        got = f"{bad[0]!r} in it" if bad else repr(value)
        raise ValueError(f"`{name}` must be a list of texts, or a file of one a line, got {got}")
    return value if isinstance(value, Prompts) else Prompts(texts)


def fraction(name: str, value: Any) -> float:
    """A float in [0, 1]."""
    if not _is_real(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number in [0, 1], got {value!r}")
    return float(value)


def fractions(name: str, values: Any) -> tuple[float, ...]:
    """A tuple of floats in [0, 1], from a tuple, a list or a NumPy array of one dimension."""
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(listed, (tuple, list)):
        raise ValueError(f"`{name}` must be a tuple of fractions, such as (0.2, 0.6), got {values!r}")
    return tuple(fraction(name, value) for value in listed)


def interval(name: str, values: Any) -> tuple[float, float]:
    """Two floats in [0, 1], the first not above the second."""
    found = fractions(name, values)
    if len(found) != 2 or found[0] > found[1]:
        raise ValueError(f"`{name}` must be two fractions (from, to) with from <= to, got {values!r}")
    return found[0], found[1]


def similarity(name: str, value: float, metric: str) -> float:
    """A threshold of the similarity sigma under a metric; of nL2 as people write it (1.4) or as sigma (-1.4).

    Cosine: `PROMISES` in [-1, LARGEST_COSINE], so that an exact copy is always over them; `GATES` in
    [-1, 1], where 1 never opens. nL2: `PROMISES` are not 0, which nothing exceeds, and the promise itself is
    at most LARGEST_NL2, which everything does; `GATES` may be 0, which never opens.
    """
    if metric == "nl2":
        return _distance(name, value)
    most = LARGEST_COSINE if name in PROMISES else 1.0
    if not -1 <= value <= most:
        raise ValueError(
            f"`{name}` must be in [-1, {most:g}] under an index that measures cosine, got {value:g}"
        )
    return value


def _distance(name: str, value: float) -> float:
    if value == 0 and name in PROMISES:
        raise ValueError(f"`{name}` must not be 0 under an index that measures nL2, got {value:g}")
    if abs(value) > LARGEST_NL2 and name == "threshold":
        raise ValueError(
            f"`{name}` must be an nL2 in (0, {LARGEST_NL2:g}] under an index that measures nL2 (or -nL2), "
            f"got {value:g}"
        )
    return -abs(value) or 0.0
