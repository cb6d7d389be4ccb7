"""Clips -> clips with one whole face, and the square around it that is cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import media
from .rows import Drop, Row
from .settings import Settings

if TYPE_CHECKING:
    from memo_core.encoders.face import Face, FaceAnalyzer

BORDER = 1.0  # pixels from the picture's edge at which a face counts as cut off
SOUND_SHARE, SOUND_RATE = 0.9, 16000  # of a clip that has to have sound; in Hz, at which it is looked for


@dataclass(frozen=True)
class Look:
    """The one face that was seen whole at a time in seconds, or a cause and the detail why there was none."""

    time: float
    face: Face | None = None
    cause: str = ""
    detail: str = ""


class Looking:
    """Looks for faces `rate` times a second from `start` on, among pictures that are pushed in order."""

    def __init__(self, analyzer: FaceAnalyzer, rate: float, start: float = 0.0) -> None:
        self.analyzer, self.rate, self._next = analyzer, rate, start

    def push(self, time: float, convert: media.Convert) -> list[Look]:
        """The look at a picture, or nothing where none is due."""
        if time < self._next - media.INSTANT:
            return []
        self._next = max(self._next + 1 / self.rate, time)
        picture = convert()
        found = self.analyzer.detect(picture)
        if len(found) != 1:
            cause = "several faces" if found else "no face"
            return [Look(time, None, cause, f"{len(found)} faces at {time:.2f} s")]
        height, width = picture.shape[:2]
        left, top, right, bottom = found[0].box
        if min(left, top, width - right, height - bottom) < BORDER:
            return [Look(time, None, "partial face", f"it touches the picture's edge at {time:.2f} s")]
        return [Look(time, found[0])]


def crop(row: Row, settings: Settings, analyzer: FaceAnalyzer | None = None) -> list[Row]:
    """Reads a clip's pictures and looks for faces `detect_fps` times a second; then as `crop_looked_at`."""
    looks: list[Look] = []
    if "faces" not in settings.skip:
        looking = Looking(analyzer or face_analyzer(settings.models, settings.device), settings.detect_fps, row.start)
        for time, convert in media.frames(Path(settings.raw, row.source), row.start, row.end, settings.max_pixels):
            looks += looking.push(time, convert)
    return crop_looked_at(row, settings, looks)


def crop_looked_at(clip: Row, settings: Settings, looks: list[Look]) -> list[Row]:
    """The clip with its boxes. Where a look found no face, several, or one that is cut off, it is divided: the parts
    before and after it that last `min_seconds` are clips, what lies between is a row that says why.

    The square is one for the whole clip: around the face in all pictures, its longer side times a scale, moved or
    shrunk where the picture ends. With --skip faces it is the largest in the middle, for videos that were cropped
    before.

    Args:
        looks: of this clip, or of a video that it is part of.
    """
    if "faces" in settings.skip:
        return [_attempt(clip, lambda: _middle(clip, settings))]
    looks = [look for look in looks if clip.start - media.INSTANT <= look.time < clip.end - media.INSTANT]
    if not looks:
        return [clip.fail("faces", "no picture", f"none from {clip.start:.2f} to {clip.end:.2f} s")]
    rows = []
    for start, stop, bad in _divide(clip, looks, settings.min_seconds):
        row = clip if (start, stop) == (clip.start, clip.end) else replace(part(clip, start, stop), verdict="")
        if bad is not None:
            rows.append(replace(row, looks=[]).fail("faces", bad.cause, bad.detail))
        else:
            seen = [(look.time, look.face) for look in looks if start <= look.time <= stop and look.face is not None]
            rows.append(_attempt(row, lambda row=row, seen=seen: _around(row, settings, seen)))
    return rows


def part(row: Row, start: float, stop: float) -> Row:
    """The part of a video or clip from `start` to `stop` seconds."""
    return replace(row, id=f"{row.identity}-{round(1000 * start)}-{round(1000 * stop)}", start=start, end=stop)


def _divide(clip: Row, looks: list[Look], min_seconds: float) -> Iterator[tuple[float, float, Look | None]]:
    """Spans of a clip in order: (start, stop, None) where each look found its face, else with the first that did not.

    Of the time between a look that found its face and one that did not, nothing is known: it belongs to the latter.
    """

    def gap(start: float, stop: float) -> tuple[float, float, Look]:
        return start, stop, next(look for look in looks if look.face is None and look.time >= start - media.INSTANT)

    at = clip.start
    for good, group in groupby(looks, lambda look: look.face is not None):
        run = list(group)
        start = clip.start if run[0] is looks[0] else run[0].time
        stop = clip.end if run[-1] is looks[-1] else run[-1].time
        if good and (len(run) == len(looks) or stop - start >= min_seconds - media.INSTANT):
            if start > at:
                yield gap(at, start)
            yield start, stop, None
            at = stop
    if at < clip.end:
        yield gap(at, clip.end)


def _attempt(row: Row, make: Callable[[], Row]) -> Row:
    try:
        return make()
    except Drop as drop:
        return replace(row, looks=[]).fail("faces", drop.cause, drop.detail)


def _check_sound(row: Row, settings: Settings) -> None:
    _, heard = media.sound(Path(settings.raw, row.source), row.start, row.end, SOUND_RATE)
    if heard < SOUND_SHARE * row.seconds:
        raise Drop("no sound", f"{heard:.1f} of {row.seconds:.1f} s have sound")


def _middle(row: Row, settings: Settings) -> Row:
    _check_sound(row, settings)
    side = min(row.width, row.height)
    left, top = (row.width - side) / 2, (row.height - side) / 2
    return replace(row, box=[left, top, left + side, top + side])


def _around(row: Row, settings: Settings, faces: list[tuple[float, Face]]) -> Row:
    _check_sound(row, settings)
    boxes = np.array([face.box for _, face in faces])
    around = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
    scale = settings.scale_of(row.id)
    box = square(around, scale, row.width, row.height)
    points = (np.stack([face.keypoints for _, face in faces]) - box[:2]) / (box[2] - box[0])  # [N, 5, 2]
    between_eyes = float(np.linalg.norm(points[:, 1] - points[:, 0], axis=-1).mean())
    time, surest = max(faces, key=lambda found: found[1].score)
    return replace(
        row,
        face_box=_rounded(around),
        box=_rounded(box),
        scale=scale,
        looks=[[round(time, 3), *(round(side, 1) for side in face.box)] for time, face in faces],
        face_time=time,
        keypoints=_rounded(surest.keypoints.ravel()),
        eyes_box=_rounded(_region(points[:, :2], 0.45 * between_eyes, 0.45 * between_eyes)),
        mouth_box=_rounded(_region(points[:, 3:], 0.3 * between_eyes, 0.5 * between_eyes)),
    )


def square(box: list[float], scale: float, width: int, height: int) -> list[float]:
    """The square around a box (left, top, right, bottom), `scale` times its longer side, inside a picture.

    Raises Drop if the picture's shorter side is less than the box.
    """
    left, top, right, bottom = (float(value) for value in box)
    longer = max(right - left, bottom - top)
    side = min(scale * longer, width, height)
    if side < longer:
        raise Drop("partial face", f"it moves over {longer:.0f} pixels of a picture of {width}x{height}")
    x = min(max((left + right - side) / 2, 0.0), width - side)
    y = min(max((top + bottom - side) / 2, 0.0), height - side)
    return [x, y, x + side, y + side]


def _region(points: np.ndarray, aside: float, above: float) -> list[float]:
    low, high = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    region = [low[0] - aside, low[1] - above, high[0] + aside, high[1] + above]
    return [min(max(float(value), 0.0), 1.0) for value in region]


def _rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]


@lru_cache(maxsize=1)
def face_analyzer(models: str, device: str) -> FaceAnalyzer:
    """This process's."""
    from memo_core.encoders.face import FaceAnalyzer

    analyzer = FaceAnalyzer.from_folder(models, device)
    if analyzer is None:
        raise FileNotFoundError(f"no face models in {models}")
    return analyzer
