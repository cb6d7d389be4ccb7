"""Clips -> clips with one whole face, and the square around it that is cut out."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .. import media
from .rows import Drop, Row
from .settings import Settings

if TYPE_CHECKING:
    from memo_core.encoders.face import Face, FaceAnalyzer

BORDER = 1.0  # pixels from the picture's edge at which a face counts as cut off
PREVIEW_SIZE, THUMBNAILS = 256, 4
SOUND_SHARE = 0.9  # of a clip that has to have sound
PREVIEW_RATE = 48000


def crop(row: Row, settings: Settings, analyzer: FaceAnalyzer | None = None) -> list[Row]:
    """The clip with its boxes; writes a preview, clips/<id>.mp4 with sound, and review/<id>.jpg.

    Faces are looked for `detect_fps` times a second. The square is one for the whole clip: around the face in all
    pictures, its longer side times `scale`, moved or shrunk where the picture ends.

    With --skip faces the largest square in the middle is cut out, for videos that were cropped before.

    Raises:
        Drop: a picture without a face, with several, or with one that is cut off; no sound.
    """
    path = Path(settings.raw, row.source)
    waveform, heard = media.sound(path, row.start, row.end, PREVIEW_RATE)
    if heard < SOUND_SHARE * row.seconds:
        raise Drop("no sound", f"{heard:.1f} of {row.seconds:.1f} s have sound")
    if "faces" in settings.skip:
        side = min(row.width, row.height)
        left, top = (row.width - side) / 2, (row.height - side) / 2
        row = replace(row, box=[left, top, left + side, top + side])
    else:
        row = _find(row, settings, path, analyzer or face_analyzer(settings.models))
    _preview(row, settings, path, waveform)
    return [row]


def _find(row: Row, settings: Settings, path: Path, analyzer: FaceAnalyzer) -> Row:
    faces: list[tuple[float, Face]] = []
    next_look = row.start
    for time, picture in media.pictures(path, row.start, row.end, settings.max_pixels):
        if time < next_look - 1e-6:
            continue
        next_look = max(next_look + 1 / settings.detect_fps, time)
        found = analyzer.detect(picture)
        if len(found) != 1:
            cause = "several faces" if found else "no face"
            raise Drop(cause, f"{len(found)} faces at {time:.2f} s")
        height, width = picture.shape[:2]
        left, top, right, bottom = found[0].box
        if min(left, top, width - right, height - bottom) < BORDER:
            raise Drop("partial face", f"it touches the picture's edge at {time:.2f} s")
        faces.append((time, found[0]))
    if not faces:
        raise Drop("no picture", f"none from {row.start:.2f} to {row.end:.2f} s")

    boxes = np.array([face.box for _, face in faces])
    around = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
    box = square(around, settings.scale, width, height)
    points = (np.stack([face.keypoints for _, face in faces]) - box[:2]) / (box[2] - box[0])  # [N, 5, 2]
    between_eyes = float(np.linalg.norm(points[:, 1] - points[:, 0], axis=-1).mean())
    time, surest = max(faces, key=lambda found: found[1].score)
    return replace(
        row,
        face_box=_rounded(around),
        box=_rounded(box),
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


def _preview(row: Row, settings: Settings, path: Path, waveform: np.ndarray) -> None:
    from memo_core.video.write import VideoWriter

    for name in ("clips", "review"):
        Path(settings.out, name).mkdir(parents=True, exist_ok=True)
    fps = min(row.fps, 30.0)
    count = round(row.seconds * fps)
    shown = {round(i * (count - 1) / (THUMBNAILS - 1)) for i in range(THUMBNAILS)}
    strip = []
    with VideoWriter(
        Path(settings.out, "clips", f"{row.id}.mp4"), PREVIEW_SIZE, PREVIEW_SIZE, fps, PREVIEW_RATE, {"title": row.id}
    ) as writer:
        writer.write_audio(waveform)
        for number, picture in enumerate(media.at_rate(path, row.start, row.end, fps, settings.max_pixels)):
            small = media.cut(picture, row.box, PREVIEW_SIZE)
            writer.write_frames(small)
            if number in shown:
                strip.append(small)
    Image.fromarray(np.concatenate(strip, axis=1)).save(Path(settings.out, "review", f"{row.id}.jpg"), quality=80)


@lru_cache(maxsize=1)
def face_analyzer(models: str) -> FaceAnalyzer:
    from memo_core.encoders.face import FaceAnalyzer

    analyzer = FaceAnalyzer.from_folder(models)
    if analyzer is None:
        raise FileNotFoundError(f"no face models in {models}")
    return analyzer
