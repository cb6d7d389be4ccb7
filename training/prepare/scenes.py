"""Videos -> clips: cut where the scene changes, then into pieces of less than 30 s."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from pathlib import Path

from .. import media
from .rows import Drop, Row
from .settings import Settings

LOOKED_AT = 256  # pixels of the longer side in which cuts are looked for
SLACK_SECONDS, SLACK_SHARE = 2.0, 0.1  # by which a picture may be shorter than the file says


def split(row: Row, settings: Settings) -> list[Row]:  # noqa: C901 -- one case after the other
    """Rows of all clips of the video `row`, those that are too short with a failure.

    Raises:
        Drop: the video cannot be used: unreadable, truncated, without sound, too long, too large, too slow.
    """
    path = Path(settings.raw, row.source)
    claimed = media.header(path, settings.max_pixels)
    limit = settings.max_hours * 3600
    if claimed.seconds is not None and claimed.seconds > limit:
        raise Drop("too long", f"{claimed.seconds / 3600:.2f} h, more than --max-hours {settings.max_hours:g}")
    if claimed.fps is not None and claimed.fps < settings.min_fps:
        raise Drop("frame rate too low", f"{claimed.fps:g} fps, less than --min-fps {settings.min_fps:g}")

    detector = None if "scenes" in settings.skip else _detector(settings.scene_threshold)
    times, cuts = array("d"), []  # 8 bytes a picture: 4 h at 60 fps are 7 MB
    try:
        for time, picture in media.pictures(path, max_pixels=settings.max_pixels, longest_side=LOOKED_AT):
            if time > limit:
                raise Drop("too long", f"it goes on after --max-hours {settings.max_hours:g}, whatever it claims")
            if detector is not None:
                cuts += detector(len(times), picture)
            times.append(time)
    except Drop as drop:
        if drop.cause == "cannot be read" and len(times):
            raise Drop("damaged", f"decoding fails after {times[-1]:.1f} s: {drop.detail}") from drop
        raise
    if len(times) < 2:
        raise Drop("no picture", f"{len(times)} pictures can be decoded")
    fps = (len(times) - 1) / (times[-1] - times[0])
    if fps < settings.min_fps:
        raise Drop("frame rate too low", f"{fps:g} fps, less than --min-fps {settings.min_fps:g}")
    end = times[-1] + 1 / fps
    if claimed.seconds is not None and end < claimed.seconds - max(SLACK_SECONDS, SLACK_SHARE * claimed.seconds):
        raise Drop("truncated", f"{end:.1f} of {claimed.seconds:.1f} s can be decoded")

    edges = [times[0], *(times[cut] for cut in sorted(set(cuts)) if 0 < cut < len(times)), end]
    video = replace(row, width=claimed.width, height=claimed.height, fps=round(fps, 4))
    clips = []
    for first, last in zip(edges, edges[1:]):
        pieces = math.floor((last - first) / settings.max_seconds) + 1
        for piece in range(pieces):
            start, stop = (first + (last - first) * part / pieces for part in (piece, piece + 1))
            clip = replace(
                video, id=f"{row.identity}-{round(1000 * start)}-{round(1000 * stop)}", start=start, end=stop
            )
            if stop - start < settings.min_seconds:
                said = f"{stop - start:.2f} s, less than --min-seconds {settings.min_seconds:g}"
                clip = clip.fail("scenes", "too short", said)
            clips.append(clip)
    return clips


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
