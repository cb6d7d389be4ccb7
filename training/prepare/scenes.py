"""Videos -> clips: cut where the scene changes, then into pieces of less than 30 s; faces are looked for on the way."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import media
from . import faces
from .rows import TOO_SLOW, Drop, Row, too_slow
from .settings import Settings

if TYPE_CHECKING:
    from memo_core.encoders.face import FaceAnalyzer

LOOKED_AT = 256  # pixels of the longer side in which cuts are looked for
SLACK_SECONDS, SLACK_SHARE = 2.0, 0.1  # by which a picture may be shorter than the file says
SIGN = 600.0  # seconds of a video after each of which its time limit begins anew
SAME = 0.1  # of the mean change between pictures: what changes less repeats the one before


class Film:
    """What one pass over a video's pictures finds.

    Attributes:
        times: of every picture, seconds. changes: how much each differs from the one before, levels of 0 to 255.
        cuts: numbers of pictures that begin a scene. looks: the faces in some of them.
    """

    def __init__(self) -> None:
        self.times, self.changes = array("d"), array("f")  # 12 bytes a picture: 4 h at 60 fps are 10 MB
        self.cuts: list[int] = []
        self.looks: list[faces.Look] = []

    def watch(
        self, path: Path, settings: Settings, analyzer: FaceAnalyzer | None, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Reads a video, once, and calls `alive` every SIGN seconds of it.

        Raises Drop where it is longer than `max_hours` or cannot be read.
        """
        limit = settings.max_hours * 3600
        detector = None if "scenes" in settings.skip else _detector(settings.scene_threshold)
        looking = None if analyzer is None else faces.Looking(analyzer, settings.detect_fps)
        before, sign = None, SIGN
        for time, convert in media.frames(path, max_pixels=settings.max_pixels):
            if time > limit:
                raise Drop("too long", f"it goes on after --max-hours {settings.max_hours:g}, whatever it claims")
            if time > sign:
                alive()
                sign = time + SIGN
            picture = convert(LOOKED_AT)
            if detector is not None:
                self.cuts += detector(len(self.times), picture)
            if looking is not None:
                self.looks += looking.push(time, convert)
            small = picture[::2, ::2].astype(np.int16)
            self.changes.append(math.inf if before is None else float(np.abs(small - before).mean()))
            self.times.append(time)
            before = small

    def repeated(self, start: float, end: float) -> float:
        """Share of the pictures from `start` to `end` seconds that show the same as the one before."""
        times, changes = np.frombuffer(self.times), np.frombuffer(self.changes, np.float32)
        first, last = np.searchsorted(times, (start - media.INSTANT, end - media.INSTANT))
        within = changes[first + 1 : last]  # the first follows another scene
        return round(float((within <= SAME * within.mean()).mean()), 4) if len(within) else 0.0


def split(
    row: Row, settings: Settings, analyzer: FaceAnalyzer | None = None, alive: Callable[[], None] = lambda: None
) -> list[Row]:
    """Rows of all clips of the video `row`, those that are too short with a failure, and what `faces.crop` makes of the
    others. The video is read once.

    Raises:
        Drop: the video cannot be used: unreadable, truncated, without sound, too long, too large.
    """
    path = Path(settings.raw, row.source)
    claimed = media.header(path, settings.max_pixels)
    if claimed.seconds is not None and claimed.seconds > settings.max_hours * 3600:
        raise Drop("too long", f"{claimed.seconds / 3600:.2f} h, more than --max-hours {settings.max_hours:g}")
    if claimed.fps is not None and claimed.fps < settings.min_fps:  # not read only to be dropped
        slow = replace(row, fps=round(claimed.fps, 4), start=0.0, end=claimed.seconds or 0.0)
        return [slow.fail("scenes", TOO_SLOW, too_slow(claimed.fps, settings))]
    film = Film()
    if "faces" not in settings.skip:
        analyzer = analyzer or faces.face_analyzer(settings.models, settings.device)
    try:
        film.watch(path, settings, analyzer, alive)
    except Drop as drop:
        if drop.cause == "cannot be read" and len(film.times):
            raise Drop("damaged", f"decoding fails after {film.times[-1]:.1f} s: {drop.detail}") from drop
        raise
    return _clips(replace(row, width=claimed.width, height=claimed.height), claimed, film, settings)


def _clips(video: Row, claimed: media.Header, film: Film, settings: Settings) -> list[Row]:
    times = film.times
    if len(times) < 2:
        raise Drop("no picture", f"{len(times)} pictures can be decoded")
    fps = (len(times) - 1) / (times[-1] - times[0])
    end = times[-1] + 1 / fps
    if claimed.seconds is not None and end < claimed.seconds - max(SLACK_SECONDS, SLACK_SHARE * claimed.seconds):
        raise Drop("truncated", f"{end:.1f} of {claimed.seconds:.1f} s can be decoded")
    video = replace(video, fps=round(fps, 4))
    edges = [times[0], *(times[cut] for cut in sorted(set(film.cuts)) if 0 < cut < len(times)), end]
    clips = []
    for first, last in zip(edges, edges[1:]):
        pieces = math.floor((last - first) / settings.max_seconds) + 1
        for piece in range(pieces):
            start, stop = (first + (last - first) * part / pieces for part in (piece, piece + 1))
            clip = faces.part(video, start, stop)
            if stop - start < settings.min_seconds:
                said = f"{stop - start:.2f} s, less than --min-seconds {settings.min_seconds:g}"
                clips.append(clip.fail("scenes", "too short", said))
            else:
                clips += faces.crop_looked_at(clip, settings, film.looks)
    return [replace(clip, repeated=film.repeated(clip.start, clip.end)) for clip in clips]


def _detector(threshold: float):
    """A function (number of the picture, uint8 [H, W, 3] RGB) -> numbers of the pictures that begin a scene."""
    from scenedetect import AdaptiveDetector, FrameTimecode

    # Adaptive: a change counts relative to those around it, so that a moving camera is no cut, and a cut between two
    # similar rooms is one.
    detector = AdaptiveDetector(adaptive_threshold=threshold)
    return lambda number, picture: [
        # Counted in pictures, at a rate of 1: their times, which may be uneven, are known here.
        cut.frame_num
        for cut in detector.process_frame(FrameTimecode(number, 1.0), picture[..., ::-1].copy())
    ]
