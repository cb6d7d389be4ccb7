"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
import math


def add_checkpoint(sub: argparse.ArgumentParser) -> None:
    """`--checkpoint`."""
    text = "folder in the released layout, or the name of an embedded checkpoint (default: %(default)s)"
    sub.add_argument("--checkpoint", default="toon", help=text)


def positive_int(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def seconds(text: str) -> float:
    """A number of seconds from 0."""
    return _number(text, 0, 1e6, "a number of seconds from 0")


def duration(text: str) -> float:
    """A number of seconds above 0."""
    return _number(text, 1e-3, 1e6, "a number of seconds above 0")


def gigabytes(text: str) -> float:
    """A number of gigabytes above 0."""
    return _number(text, 0.001, 1e6, "a number of gigabytes above 0")


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}" + (f", at most {high:.0f}" if value > high else ""))
    return value


def size(text: str) -> tuple[int, int]:
    """Height and width from "N" or "WxH"."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        width, height = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor WIDTHxHEIGHT") from None
    return height, width
