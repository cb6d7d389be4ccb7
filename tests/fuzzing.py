"""Seeded damage, as files from strangers carry it, and the law that readers keep: their own typed errors, and soon.

Everything is a function of the `random.Random` given, so that a seed names a failure.
"""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DEPTH = 100_000
_DEEP, _HUGE = "@deep@", "@huge@"  # become what `json_text` writes for them: json.dumps could not
_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**9, -(10**30), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), _HUGE)
_OTHERS = (None, True, False, "", "x", "1", "../x", "/etc/passwd", "\0", "\udcff", "9" * 5000, _DEEP)


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for a fault of its file."""


def odd(rng: random.Random) -> Any:
    """A value that nobody expects: a number, a text, a container of any kind."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(_NUMBERS)
    if kind == 1:
        return rng.choice(_OTHERS)
    return [odd(rng) for _ in range(rng.randrange(3))] if kind == 2 else {"x": odd(rng), "": None}


def altered(value: Any, rng: random.Random, times: int | None = None) -> Any:
    """A copy of a value of dictionaries, lists, texts and numbers, with one to three places of it changed."""
    for _ in range(rng.choice((1, 1, 2, 3)) if times is None else times):
        places = list(_places(value))
        value = _with(value, rng.choice(places), rng)
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them flipped, cut off, taken out, repeated, or replaced by other values."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        first = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 256) + 1)
        end = min(len(data), first + rng.choice((1, 1, 4, 8, 64, 4096)))
        kind = rng.randrange(5)
        if kind == 0 and first < len(data):
            data[first] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[first:]
        elif kind == 2:
            del data[first:end]
        elif kind == 3:
            data[first:first] = data[first:end]
        else:
            data[first:end] = rng.choice((b"\0", b"\xff", b"[", b"9", rng.randbytes(1))) * (end - first)
    return bytes(data)


def json_text(value: Any) -> str:
    """JSON as Python writes it, where the odd values of this module are nested DEPTH deep, or 1e400."""
    text = json.dumps(value)
    return text.replace(json.dumps(_DEEP), "[" * DEPTH + "]" * DEPTH).replace(json.dumps(_HUGE), "1e400")


def assert_no_foreign(call: Callable[[], Any], allowed: type | tuple[type, ...], seconds: float = 5.0) -> bool:
    """Asserts that a call returns or raises one of the `allowed` errors, within `seconds`; whether it returned."""
    try:
        with _at_most(seconds):
            call()
    except allowed:
        return False
    except TooSlow:
        raise AssertionError(f"it took more than {seconds} s") from None
    except Exception as error:
        raise AssertionError(f"a foreign error: {type(error).__name__}: {str(error)[:500]}") from error
    return True


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the block after some seconds; where there are no such signals it waits."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _with(value: Any, path: tuple, rng: random.Random) -> Any:
    if path:
        copy = dict(value) if isinstance(value, dict) else list(value)
        if len(path) == 1 and rng.random() < 0.15:
            del copy[path[0]]
        else:
            copy[path[0]] = _with(value[path[0]], path[1:], rng)
        return copy
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 1000, value * 1.0 if abs(value) < 1e9 else 0.5, str(value)))
    if isinstance(value, dict) and rng.random() < 0.5:
        return value | {rng.choice(("x", *value)): odd(rng)}
    if isinstance(value, list) and rng.random() < 0.5:
        return rng.choice((value * 2, value[1:], [*value, odd(rng)]))
    return odd(rng)
