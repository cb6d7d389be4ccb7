"""Edits of an emotion track, written as lines of text: `0-1.6 surprised`."""

from __future__ import annotations

import math
import re

from ..checks import shown
from ..errors import EmotionError
from ..release import EMOTIONS

# A time is seconds or m:ss, either with decimals.
_TIME = r"(?:[0-9]{1,6}:[0-5][0-9]|[0-9]{1,8})(?:\.[0-9]*)?|\.[0-9]+"
_LINE = re.compile(rf"({_TIME})\s*[-\u2013\u2014]\s*({_TIME}|end)\s+(\S+)(?:\s+(\S+))?", re.IGNORECASE)


def parse_emotion_lines(text: str) -> list[tuple[float, float, str, float]]:
    """Reads edits of a track, one per line: `0.0-2.5 happy`, `2.5-4 angry 0.7`, `1:04.5-end sad`.

    A time is in seconds or m:ss; "-" may be a dash and have spaces around it; an emotion is one of EMOTIONS in any
    case; a strength goes from 0 to 1 and is 1 where it is left out. Blank lines and what follows "#" are ignored.

    Returns:
        (start, end, emotion, strength) per edit, times in seconds; "end" is infinity.

    Raises:
        EmotionError: a line that cannot be read, with its number (from 1), its text and the allowed emotions.
    """
    return [edit[2:] for edit in read_edits(text)]


def read_edits(text: str) -> list[tuple[int, str, float, float, str, float]]:
    """As `parse_emotion_lines`, with each line's number and text in front."""
    if not isinstance(text, str):
        raise EmotionError(f"edits of emotions are lines of text, received {shown(text)}")
    edits = []
    for count, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise bad_line(count, line, "it does not read START-END EMOTION [STRENGTH], like 2.5-4 angry 0.7")
        start, end, label, strength = match.groups()
        if label.lower() not in EMOTIONS:
            raise bad_line(count, line, f"{label!r} is not an emotion")
        start, end = _seconds(start), _seconds(end)
        if not start < end:
            raise bad_line(count, line, "it does not end after it starts")
        try:
            share = 1.0 if strength is None else float(strength)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise bad_line(count, line, f"the strength {strength!r} is not a number from 0 to 1")
        edits.append((count, line, start, end, label.lower(), share))
    return edits


def bad_line(number: int, line: str, problem: str) -> EmotionError:
    """What is said of a line that cannot be used."""
    return EmotionError(f'line {number}, "{line}": {problem}. Emotions are {", ".join(EMOTIONS)}')


def _seconds(time: str) -> float:
    """A time of `_LINE` in seconds."""
    if time.lower() == "end":
        return math.inf
    minutes, _, seconds = time.rpartition(":")
    return 60 * int(minutes or 0) + float(seconds)


def frame_at(time: float, fps: float) -> int:
    """The first frame whose middle does not lie before `time`."""
    return math.ceil(time * fps - 0.5)


def time_of(frame: int, fps: float) -> str:
    """The shortest decimal number of seconds that `frame_at` takes for `frame`."""
    for digits in range(1, 12):
        text = f"{frame / fps:.{digits}f}"
        if frame_at(float(text), fps) == frame:
            break
    return text
