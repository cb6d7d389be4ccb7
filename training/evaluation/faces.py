"""Where the face is in every frame of a video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memo_core.encoders.face import Face, FaceAnalyzer

from .. import media
from .crop import Crop
from .videos import MAX_PIXELS, Pair, video_errors


@dataclass(frozen=True, eq=False)
class FaceTrack:
    """The largest face over time.

    times: seconds [K], rising. boxes: [K, 4] left, top, right, bottom in pixels. keypoints: [K, 5, 2]. found: bool [K];
    where it is False the others are zero.
    """

    times: NDArray[np.float64]
    boxes: NDArray[np.float64]
    keypoints: NDArray[np.float64]
    found: NDArray[np.bool_]

    def at(self, time: float) -> Face | None:
        """The face at a time, linear between frames that were looked at; None where the nearest shows none."""
        after = int(np.searchsorted(self.times, time))
        near = [i for i in (after - 1, after) if 0 <= i < len(self.times)]
        if not near or not self.found[min(near, key=lambda i: abs(self.times[i] - time))]:
            return None
        times, values = self._seen
        right = min(int(np.searchsorted(times, time)), len(times) - 1)
        left = max(right - 1, 0)
        share = np.clip((time - times[left]) / (times[right] - times[left]), 0, 1) if right > left else 0.0
        point = values[left] + share * (values[right] - values[left])
        return Face(tuple(point[:4].tolist()), point[4:].reshape(5, 2).astype(np.float32), 1.0)

    def inside(self, crop: Crop) -> FaceTrack:
        """The same face in pixels of a part of the pictures."""
        boxes = crop.points(self.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        return FaceTrack(self.times, boxes, crop.points(self.keypoints), self.found)

    @cached_property
    def _seen(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Times [N] and boxes with keypoints [N, 14] where there is a face."""
        return self.times[self.found], np.hstack([self.boxes, self.keypoints.reshape(-1, 10)])[self.found]

    @property
    def looks(self) -> NDArray[np.float64]:
        """[N, 5], the times and boxes where there is a face."""
        times, values = self._seen
        return np.column_stack([times, values[:, :4]])


class FaceTracks:
    """Looks for the face in videos, once in each; remembers the last two."""

    def __init__(self, analyzer: FaceAnalyzer, every: int = 1) -> None:
        self._analyzer, self._every = analyzer, every
        self._known: dict[Path, FaceTrack] = {}

    def of(self, path: Path) -> FaceTrack:
        """Raises VideoError if the video cannot be read."""
        if path not in self._known:
            while len(self._known) >= 2:
                del self._known[next(iter(self._known))]
            self._known[path] = self._look(path)
        return self._known[path]

    def of_pair(self, pair: Pair) -> tuple[FaceTrack, FaceTrack]:
        """Of the generated and of the real video, in pixels of what is compared. Raises VideoError."""
        generated, real = self.of(pair.generated), self.of(pair.real)
        return generated, real if pair.crop is None else real.inside(pair.crop)

    def _look(self, path: Path) -> FaceTrack:
        times, boxes, keypoints, found = [], [], [], []
        with video_errors(path):
            for index, (time, frame) in enumerate(media.pictures(path, max_pixels=MAX_PIXELS)):
                if index % self._every:
                    continue
                faces = self._analyzer.detect(frame)
                times.append(time)
                found.append(bool(faces))
                boxes.append(np.array(faces[0].box) if faces else np.zeros(4))
                keypoints.append(faces[0].keypoints if faces else np.zeros((5, 2)))
        return FaceTrack(
            np.array(times, np.float64),
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(keypoints, np.float64).reshape(-1, 5, 2),
            np.array(found, bool),
        )
