"""JSON that others may have written: read whole, and only where its values are of the kinds expected."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memo_core.checks import number, shown, whole
from memo_core.files import open_regular


def read_json(path: Path, error: Callable[[str], Exception], kind: type = dict, max_bytes: int = 2**30) -> Any:
    """The dictionary, or whatever `kind` says, in a JSON file; raises `error(text)` for anything else."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise ValueError(f"it has more than {max_bytes} bytes")
            return parse_json(file.read(), kind)
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """What JSON says; ValueError where it is none, is nested too deep, or is no `kind`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, kind):
        raise ValueError(f"it holds {shown(value)}, not a {kind.__name__}")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the type that a dataclass gives a field, such as list[float] | None.

    A whole number does for a float, a list for a tuple; NaN is no number, infinity is one.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and Ellipsis not in parts:
            return len(value) == len(parts) and all(map(fits, value, parts))
        return all(fits(item, parts[0]) for item in value)
    if hint is int:
        return whole(value, -(2**63), 2**63) is not None
    if hint is float:
        return number(value) is not None or value in (math.inf, -math.inf)
    return value is None if hint is type(None) else isinstance(value, hint)
