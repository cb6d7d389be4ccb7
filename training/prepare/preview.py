"""A small video of a clip, with its sound, and a strip of its pictures: what the review page shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import media
from .rows import Row
from .settings import Settings

SIZE, THUMBNAILS = 256, 4
RATE = 48000  # Hz, of its sound
FOLDERS = {"clips": "mp4", "review": "jpg"}


def files(out: Path, id: str) -> list[Path]:
    """The two files of a clip."""
    return [Path(out, folder, f"{id}.{suffix}") for folder, suffix in FOLDERS.items()]


class Preview:
    """Writes both while a clip is read; a `clip.Reader`. Use as a context manager: an error leaves no file."""

    def __init__(self, row: Row, settings: Settings) -> None:
        from memo_core.video.write import VideoWriter

        self._source = Path(settings.raw, row.source)
        self._video, self._strip = files(Path(settings.out), row.id)
        for path in (self._video, self._strip):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._row = row
        self._rate = media.EvenRate(row.start, row.end, min(row.fps, 30.0))
        self._shown = {round(i * (self._rate.count - 1) / (THUMBNAILS - 1)) for i in range(THUMBNAILS)}
        self._pictures: list[NDArray[np.uint8]] = []
        about = {"title": row.id}
        self._writer = VideoWriter(self._video, SIZE, SIZE, self._rate.fps, RATE, about, made_by_ai=False)

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()  # nothing once it is finished

    def push(self, time: float, picture: NDArray[np.uint8]) -> None:
        for chosen in self._rate.push(time, picture):
            self._write(chosen)

    def end(self) -> None:
        for chosen in self._rate.finish():
            self._write(chosen)

    def _write(self, picture: NDArray[np.uint8]) -> None:
        small = media.cut(picture, self._row.box, SIZE)
        if self._writer.frames_written in self._shown:
            self._pictures.append(small)
        self._writer.write_frames(small)

    def finish(self, row: Row) -> Row:
        """Adds the sound, moved to where the picture is."""
        waveform, _ = media.sound(self._source, row.start - row.delay, row.end - row.delay, RATE)
        self._writer.write_audio(waveform)
        self._writer.finish()
        Image.fromarray(np.concatenate(self._pictures, axis=1)).save(self._strip, quality=80)
        return row
