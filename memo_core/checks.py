"""Values from outside, before anything is computed with them. A bool is no number; numpy's numbers are."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
_REPR.maxlevel = 3


def whole(value: Any, low: int = 0, high: int = 2**53) -> int | None:
    """The whole number from `low` to `high` that a value is, or None."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return None
    found = int(value)
    return found if low <= found <= high else None


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> float | None:
    """The finite number from `low` to `high` that a value is, or None."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except (OverflowError, ValueError):
        return None
    return value if low <= value <= high and math.isfinite(value) else None


def shown(value: Any) -> str:
    """A value for a message: its repr, as far as that is short; a stranger's file may hold one of gigabytes."""
    try:
        return _REPR.repr(value)
    except Exception:  # a number of more digits than Python writes; an object whose repr fails
        return f"a value of type {type(value).__name__}"
