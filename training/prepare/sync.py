"""Lips and sound: SyncNet (Chung and Zisserman 2016) says how well they agree, and how many frames they lie apart."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import media
from .rows import Row
from .settings import Settings, find_model

if TYPE_CHECKING:
    from ..syncnet import SyncNet

GRAY = 110  # what SyncNet's authors put beyond the picture


def measure(row: Row, settings: Settings, net: SyncNet | None = None) -> list[Row]:
    """The clip with SyncNet's confidence, distance and offset, from the source at 25 fps and SyncNet's own crop, which
    shows more than the clip's and stays where it is, too."""
    import torch

    from ..syncnet import FPS, RATE, SIZE, face_region

    net = net or _net(settings.models, settings.device)
    path = Path(settings.raw, row.source)
    box = row.box if row.face_box is None else face_region(row.face_box)
    faces = np.empty((round(row.seconds * FPS), 3, SIZE, SIZE), np.uint8)
    for i, picture in enumerate(media.at_rate(path, row.start, row.end, FPS, settings.max_pixels)):
        faces[i] = media.cut(picture, box, SIZE, GRAY).transpose(2, 0, 1)
    waveform, _ = media.sound(path, row.start, row.end, RATE)
    score = net.score(torch.from_numpy(faces), torch.from_numpy(waveform))
    return [
        replace(
            row,
            sync_confidence=round(float(score.confidence), 4),
            sync_distance=round(float(score.distance), 4),
            sync_offset=int(score.offset),
        )
    ]


@lru_cache(maxsize=1)
def _net(models: str, device: str) -> SyncNet:
    from ..syncnet import FILE, SyncNet

    return SyncNet.load(find_model(Path(models), FILE)).to(device)
