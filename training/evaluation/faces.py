"""Where the face is in every frame of a video; cutting it out for the networks that want to see only it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memo_core.face import Face, FaceAnalyzer
from memo_core.video import read_video


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
        if not self.found.any() or not self.found[np.abs(self.times - time).argmin()]:
            return None
        box, keypoints = self._between(self.boxes, time), self._between(self.keypoints.reshape(-1, 10), time)
        return Face(tuple(box.tolist()), keypoints.reshape(5, 2).astype(np.float32), 1.0)

    def box_at(self, time: float) -> NDArray[np.float64]:
        """The box [4], also through gaps; there must be a face somewhere."""
        return self._between(self.boxes, time)

    def _between(self, values: NDArray[np.float64], time: float) -> NDArray[np.float64]:
        times, values = self.times[self.found], values[self.found]
        return np.array([np.interp(time, times, column) for column in values.T])


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

    def _look(self, path: Path) -> FaceTrack:
        info, frames = read_video(path)
        times, boxes, keypoints, found = [], [], [], []
        for index, frame in enumerate(frames):
            if index % self._every:
                continue
            faces = self._analyzer.detect(frame)
            times.append(index / info.fps)
            found.append(bool(faces))
            boxes.append(np.array(faces[0].box) if faces else np.zeros(4))
            keypoints.append(faces[0].keypoints if faces else np.zeros((5, 2)))
        return FaceTrack(
            np.array(times, np.float64),
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(keypoints, np.float64).reshape(-1, 5, 2),
            np.array(found, bool),
        )


def cut(
    image: NDArray[np.uint8],
    box: tuple[float, float, float, float],
    size: int,
    fill: int = 0,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> NDArray[np.uint8]:
    """The part of an image [H, W, 3] inside a box that may reach beyond it, where `fill` stands: [size, size, 3].

    Without smoothing when it shrinks, as OpenCV does, which the published networks were fed by.
    """
    extent = Image.fromarray(image).transform(
        (size, size), Image.Transform.EXTENT, box, resample, fillcolor=(fill, fill, fill)
    )
    return np.asarray(extent)
