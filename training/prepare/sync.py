"""Lips and sound: SyncNet (Chung and Zisserman 2016) says how well they agree, and how many frames they lie apart."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import media
from .clip import alone
from .rows import Row
from .settings import Settings, find_model

if TYPE_CHECKING:
    from ..syncnet import SyncNet


def measure(row: Row, settings: Settings, net: SyncNet | None = None) -> list[Row]:
    """The clip with SyncNet's confidence, distance and offset, from the source at 25 fps and SyncNet's own crop, which
    shows more than the clip's and follows the face.
    """
    return alone(row, settings, Lips(row, settings, net))


class Lips:
    """What `measure` reads; a `clip.Reader`."""

    def __init__(self, row: Row, settings: Settings, net: SyncNet | None = None) -> None:
        from ..syncnet import FPS, FaceStream, face_regions

        regions = face_regions(row.looks, row.start, row.end) if row.looks else [row.box]
        self._faces = FaceStream(net or _net(settings.models, settings.device), regions)
        self._rate, self._source = media.EvenRate(row.start, row.end, FPS), Path(settings.raw, row.source)

    def push(self, time: float, picture: NDArray[np.uint8]) -> None:
        for chosen in self._rate.push(time, picture):
            self._faces.push(chosen)

    def end(self) -> None:
        for chosen in self._rate.finish():
            self._faces.push(chosen)

    def finish(self, row: Row) -> Row:
        from ..syncnet import FPS, RATE

        score = self._faces.score(*media.sound(self._source, row.start, row.start + self._faces.frames / FPS, RATE))
        return replace(
            row,
            sync_confidence=round(float(score.confidence), 4),
            sync_distance=round(float(score.distance), 4),
            sync_offset=int(score.offset),
        )


@lru_cache(maxsize=1)
def _net(models: str, device: str) -> SyncNet:
    from ..syncnet import FILE, SyncNet

    return SyncNet.load(find_model(Path(models), FILE)).to(device)
