"""Measures of where the parts of the face are: M-LMD, F-LMD, and how much the head moves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memo_core.encoders.face import Box
from memo_core.errors import CheckpointError

from ..syncnet import cut
from .metric import FACE_FILES, LANDMARKS_2D, LANDMARKS_3D, Measure, Metric, Reading, Tools, mean_reading
from .videos import Chunk, Pair

INPUT = 192  # pixels, of both networks
MARGIN = 1.5  # of the face's longer side
SCALE = 256  # distances are told in pixels of a picture so high, the size at which the literature compares
MOUTH = {106: slice(52, 72), 68: slice(48, 68)}
RIGID = slice(27, 48)  # of 68: nose and eyes, which speech does not move


def find_landmarks(session: Any, frame: Tensor, box: Box) -> NDArray[np.float32]:
    """Points of a face in a frame uint8 [3, H, W]: [106, 2] or [68, 3] in pixels, by insightface's networks."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top, 1.0) * MARGIN
    x, y, pixel = (left + right) / 2, (top + bottom) / 2, side / INPUT
    shift = 0.5 - pixel / 2  # pixels count from their centres here, from their corners in `cut`
    region = (x - side / 2 + shift, y - side / 2 + shift, x + side / 2 + shift, y + side / 2 + shift)
    picture = cut(frame.permute(1, 2, 0).contiguous().numpy(), region, INPUT)
    batch = np.ascontiguousarray(picture.astype(np.float32).transpose(2, 0, 1)[None])  # RGB in [0, 255]
    values = session.run(None, {session.get_inputs()[0].name: batch})[0].reshape(-1)
    points = values.reshape(-1, 3)[-68:] if len(values) >= 3000 else values.reshape(-1, 2)
    points = points * (side / 2)  # the networks speak of [-1, 1]
    points[:, :2] += (x, y)
    return points.astype(np.float32)


def landmark_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Mean distance of points [N, 2] after both were centred (LMD of Chen et al. 2018, arXiv 1803.10404)."""
    apart = (a - a.mean(0)) - (b - b.mean(0))
    return float(np.linalg.norm(apart, axis=1).mean())


class LandmarkDistance(Metric):
    measures = tuple(
        Measure(
            name,
            title,
            "lower",
            f"mean distance of the {what}, each frame's points centred, in pixels of a picture {SCALE} high (LMD of "
            f"Chen et al. 2018, {title} of Ji et al. 2022, EAMM)",
        )
        for name, title, what in (("m-lmd", "M-LMD", "mouth's 20 points"), ("f-lmd", "F-LMD", "face's 106 points"))
    )
    files, packages = (*FACE_FILES, LANDMARKS_2D), ("onnxruntime",)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._session = tools.session(LANDMARKS_2D)
        _ = tools.analyzer  # says now what is missing

    def start(self, pair: Pair) -> None:
        self._times: list[float] = []
        self._mouth: list[float] = []
        self._face: list[float] = []
        self._faceless = 0
        self._tracks = self.tools.tracks.of_pair(pair)

    def update(self, chunk: Chunk) -> None:
        for i in chunk.chosen(self.tools.every):
            faces = [track.at(chunk.times[i]) for track in self._tracks]
            if None in faces:
                self._faceless += 1
                continue
            points = []
            for frames, face in zip((chunk.generated, chunk.real), faces, strict=True):
                found = find_landmarks(self._session, frames[i], face.box)[:, :2]
                if len(found) not in MOUTH:
                    raise CheckpointError(f"{LANDMARKS_2D} gives {len(found)} points; 106 or 68 are understood")
                points.append(found * (SCALE / frames.shape[2]))
            mouth = MOUTH[len(points[0])]
            self._times.append(chunk.times[i])
            self._mouth.append(landmark_distance(points[0][mouth], points[1][mouth]))
            self._face.append(landmark_distance(*points))

    def finish(self) -> dict[str, Reading]:
        note = f"no face in {self._faceless} frames, which do not count" if self._faceless else ""
        return {
            "m-lmd": mean_reading(self._times, self._mouth, note),
            "f-lmd": mean_reading(self._times, self._face, note),
        }


def head_angles(points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rotation of a head over time against its first frame, [F, 3] degrees: pitch, yaw, roll.

    Args:
        points: [F, N, 3], rigid points of the head.

    The rotation is that of the best rigid fit (Kabsch 1976), told as angles about x, y and z in this order.
    """
    centred = np.asarray(points, np.float64) - np.mean(points, axis=1, keepdims=True)
    u, _, vt = np.linalg.svd(np.einsum("fni,nj->fij", centred, centred[0]))
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]  # no mirrors
    turn = u @ vt
    pitch = np.arctan2(turn[:, 2, 1], turn[:, 2, 2])
    yaw = np.arctan2(-turn[:, 2, 0], np.hypot(turn[:, 2, 1], turn[:, 2, 2]))
    roll = np.arctan2(turn[:, 1, 0], turn[:, 0, 0])
    return np.degrees(np.stack([pitch, yaw, roll], 1))


class HeadMotion(Metric):
    measures = (
        Measure(
            "diversity",
            "Head motion",
            "",
            "standard deviation over time of pitch, yaw and roll of the head, their mean, in degrees; compare with the "
            "real videos' (after Diversity of Zhang et al. 2023, SadTalker, who take the deviation of Hopenet's "
            "features; here rotations of nose and eyes of 68 3D points)",
        ),
    )
    files, packages = (*FACE_FILES, LANDMARKS_3D), ("onnxruntime",)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._session = tools.session(LANDMARKS_3D)
        _ = tools.analyzer  # says now what is missing

    def start(self, pair: Pair) -> None:
        self._points: list[list[NDArray[np.float32]]] = [[], []]
        self._tracks = self.tools.tracks.of_pair(pair)

    def update(self, chunk: Chunk) -> None:
        for i in chunk.chosen(self.tools.every):
            for side, frames in enumerate((chunk.generated, chunk.real)):
                face = self._tracks[side].at(chunk.times[i])
                if face is not None:
                    points = find_landmarks(self._session, frames[i], face.box)
                    if points.shape != (68, 3):
                        raise CheckpointError(f"{LANDMARKS_3D} gives points {points.shape}; [68, 3] is understood")
                    self._points[side].append(points[RIGID])

    def finish(self) -> dict[str, Reading]:
        spreads = [
            float(head_angles(np.array(points)).std(0).mean()) if len(points) > 1 else None for points in self._points
        ]
        note = "" if None not in spreads else "fewer than 2 frames with a face"
        return {"diversity": Reading(*spreads, note=note)}
