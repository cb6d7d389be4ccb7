"""Lips and sound: SyncNet (Chung and Zisserman 2016) says how well they agree, and how many frames they lie apart."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .rows import Row
from .settings import Settings, find_model

if TYPE_CHECKING:
    from ..syncnet import SyncNet


def measure(row: Row, settings: Settings, net: SyncNet | None = None) -> list[Row]:
    """The clip with SyncNet's confidence, distance and offset, from the source at 25 fps and SyncNet's own crop, which
    shows more than the clip's and follows the face.
    """
    from ..syncnet import face_regions, score_clip

    net = net or _net(settings.models, settings.device)
    path = Path(settings.raw, row.source)
    regions = face_regions(row.looks, row.start, row.end) if row.looks else [row.box]
    score = score_clip(net, path, regions, row.start, row.end, settings.max_pixels)
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
