"""Finds faces in a picture and describes them.

The released code asks the insightface package for this. Here the same two ONNX files, SCRFD (Guo et al. 2021, arXiv
2105.04714) and ArcFace (Deng et al. 2019, arXiv 1801.07698), run through onnxruntime in own code with the same numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


logger = logging.getLogger(__name__)

FOLDER = "misc/face_analysis/models"  # inside a checkpoint
DETECTOR, EMBEDDER = "scrfd_10g_bnkps.onnx", "glintr100.onnx"
CUDA_PROVIDER = "CUDAExecutionProvider"
EMBEDDING_SIZE = 512
DETECTION_SIZE = 640
SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.4
STRIDES, ANCHORS = (8, 16, 32), 2
ALIGNED_SIZE = 112
# Where ArcFace expects the eyes (image left first), the tip of the nose and the corners of the mouth: x, y of 112x112.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Face:
    """A face in an image.

    box: left, top, right, bottom in pixels. keypoints: float32 [5, 2], x and y of both eyes (image left first), the tip
    of the nose and both mouth corners. score: confidence in [0, 1].
    """

    box: Box
    keypoints: NDArray[np.float32]
    score: float

    @property
    def area(self) -> float:
        """Of its box, in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


class FaceAnalyzer:
    """SCRFD face detector and ArcFace face embedder."""

    def __init__(self, detector: InferenceSession, embedder: InferenceSession) -> None:
        self._detector, self._embedder = detector, embedder
        outputs = len(detector.get_outputs())
        if outputs != 3 * len(STRIDES):
            raise CheckpointError(f"the face detector has {outputs} outputs; SCRFD with keypoints has 9")
        shape = embedder.get_inputs()[0].shape
        if list(shape[1:]) != [3, ALIGNED_SIZE, ALIGNED_SIZE]:
            raise CheckpointError(f"the face embedder takes {shape}; ArcFace takes [1, 3, 112, 112]")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], device: str = "cpu") -> FaceAnalyzer | None:
        """Reads both networks from a checkpoint's folder, or from the folder that holds the ONNX files themselves.

        Args:
            device: with "cuda" or "cuda:1" they run on that GPU where onnxruntime has its CUDA provider
                (`pip install onnxruntime-gpu`), else on the CPU.

        Returns None, and logs once why, where the files or the onnxruntime package are absent: everything works then,
        with a zero face embedding and a crop around the centre. Raises CheckpointError for files that are damaged.
        """
        folder = Path(folder)
        models = folder if (folder / DETECTOR).is_file() else folder / FOLDER
        absent = [name for name in (DETECTOR, EMBEDDER) if not (models / name).is_file()]
        without = "portraits are cropped around the centre and get no face embedding, so the likeness may be weaker"
        if absent:
            _warn_once(f"no face models ({', '.join(absent)}) in {models}: {without}. `memo download` fetches them")
            return None
        try:
            import onnxruntime
        except ImportError:
            _warn_once(f"the onnxruntime package is not installed: {without}. `pip install onnxruntime` adds it")
            return None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        providers = _providers(onnxruntime.get_available_providers(), device)
        sessions = []
        for name in (DETECTOR, EMBEDDER):
            try:
                sessions.append(onnxruntime.InferenceSession(str(models / name), options, providers=providers))
            except Exception as error:  # onnxruntime's exceptions have no common base
                raise CheckpointError(f"cannot load {models / name}: {error}. Delete and download it again") from error
        return cls(*sessions)

    def detect(self, image: NDArray[np.uint8]) -> list[Face]:
        """Faces in an RGB image, uint8 [H, W, 3], the largest first."""
        height, width = image.shape[:2]
        ratio = height / width
        # The longer side becomes 640 pixels; the other is cut down to whole pixels, not rounded, as was released.
        if ratio > 1:
            inner_height, inner_width = DETECTION_SIZE, max(1, int(DETECTION_SIZE / ratio))
        else:
            inner_height, inner_width = max(1, int(DETECTION_SIZE * ratio)), DETECTION_SIZE
        scale = inner_height / height
        canvas = np.zeros((DETECTION_SIZE, DETECTION_SIZE, 3), np.uint8)
        canvas[:inner_height, :inner_width] = _resize(image, inner_height, inner_width)
        outputs = self._detector.run(None, {self._detector.get_inputs()[0].name: _network_input(canvas, 128.0)})
        scores, boxes, keypoints = decode_scrfd(outputs)
        chosen = suppress_overlaps(boxes, scores)
        faces = [
            Face(tuple((boxes[i] / scale).tolist()), (keypoints[i] / scale).astype(np.float32), float(scores[i]))
            for i in chosen
        ]
        return sorted(faces, key=lambda face: face.area, reverse=True)

    def embed(self, image: NDArray[np.uint8], face: Face) -> NDArray[np.float32]:
        """ArcFace embedding, float32 [512], of a face that `detect` found in the RGB image, uint8 [H, W, 3]."""
        aligned = align(image, face.keypoints)
        name = self._embedder.get_inputs()[0].name
        return self._embedder.run(None, {name: _network_input(aligned, 127.5)})[0].reshape(-1).astype(np.float32)


def _providers(available: Sequence[str], device: str) -> list[Any]:
    """What onnxruntime is to run a network on, in order of preference."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or CUDA_PROVIDER not in available:
        return ["CPUExecutionProvider"]
    return [(CUDA_PROVIDER, {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def decode_scrfd(
    outputs: Sequence[NDArray[np.float32]], size: int = DETECTION_SIZE, threshold: float = SCORE_THRESHOLD
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Candidates of at least `threshold` among SCRFD's nine outputs for a square input of `size` pixels.

    Args:
        outputs: scores [K, 1], distances of the box's sides [K, 4], offsets of the keypoints [K, 10], each for strides
            8, 16 and 32, in units of the stride; K = 2 anchors at (size / stride)^2 cells, perhaps a batch axis too.

    Returns:
        scores [N], boxes [N, 4] (left, top, right, bottom) and keypoints [N, 5, 2], in pixels of the input.
    """
    scores, boxes, keypoints = [], [], []
    for level, stride in enumerate(STRIDES):
        cells = size // stride
        score = outputs[level].reshape(-1)
        if len(score) != cells * cells * ANCHORS:
            raise CheckpointError(f"the face detector gives {len(score)} scores at stride {stride}, not {2 * cells**2}")
        keep = np.flatnonzero(score >= threshold)
        cell = keep // ANCHORS
        centre = np.stack([cell % cells, cell // cells], -1).astype(np.float32) * stride
        sides = outputs[len(STRIDES) + level].reshape(-1, 4)[keep] * stride
        offsets = outputs[2 * len(STRIDES) + level].reshape(-1, 5, 2)[keep] * stride
        scores.append(score[keep])
        boxes.append(np.concatenate([centre - sides[:, :2], centre + sides[:, 2:]], 1))
        keypoints.append(centre[:, None] + offsets)
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(keypoints)


def suppress_overlaps(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], threshold: float = OVERLAP_THRESHOLD
) -> list[int]:
    """Indices of the boxes [N, 4] that remain, best score first, when each removes those it overlaps too much.

    That is by more than `threshold`, intersection over union; a box from 10 to 19 counts as 10 pixels wide, as in the
    released code.
    """
    order = np.argsort(-scores, kind="stable")
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        corner = np.maximum(boxes[best, :2], boxes[rest, :2])
        extent = np.maximum(0, np.minimum(boxes[best, 2:], boxes[rest, 2:]) - corner + 1)
        shared = extent.prod(1)
        order = rest[shared / (areas[best] + areas[rest] - shared) <= threshold]
    return kept


def similarity_transform(source: NDArray[Any], target: NDArray[Any]) -> NDArray[np.float64]:
    """Rotation, uniform scale and shift, [2, 3], that bring the points `source` [N, 2] closest to `target` [N, 2].

    Closest by least squares, without mirroring (Umeyama 1991, equations 40 to 42).
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    source_mean, target_mean = source.mean(0), target.mean(0)
    source, target = source - source_mean, target - target_mean
    u, d, vt = np.linalg.svd(target.T @ source / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u * signs @ vt
    scale = (d * signs).sum() / max(source.var(0).sum(), 1e-12)
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def align(image: NDArray[np.uint8], keypoints: NDArray[Any]) -> NDArray[np.uint8]:
    """The face with these keypoints [5, 2] moved onto ArcFace's template: uint8 [112, 112, 3], black outside."""
    matrix = similarity_transform(keypoints, TEMPLATE)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    y, x = np.mgrid[:ALIGNED_SIZE, :ALIGNED_SIZE].reshape(2, -1)
    source_x, source_y, _ = inverse @ np.stack([x, y, np.ones_like(x)])
    return _sample(image, source_x, source_y).reshape(ALIGNED_SIZE, ALIGNED_SIZE, 3)


def _network_input(image: NDArray[np.uint8], scale: float) -> NDArray[np.float32]:
    """RGB uint8 [H, W, 3] to float32 [1, 3, H, W]."""
    return np.ascontiguousarray(((image.astype(np.float32) - 127.5) / scale).transpose(2, 0, 1)[None])


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear without smoothing, as OpenCV's default, which the released code uses: within one level of it.

    Reads four pixels for each that it makes, so that huge pictures cost nothing.
    """
    y = ((np.arange(height) + 0.5) * (image.shape[0] / height) - 0.5).clip(0, image.shape[0] - 1)
    x = ((np.arange(width) + 0.5) * (image.shape[1] / width) - 0.5).clip(0, image.shape[1] - 1)
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return _sample(image, grid_x.ravel(), grid_y.ravel()).reshape(height, width, 3)


def _sample(image: NDArray[np.uint8], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Bilinear values [N, 3] of an image [H, W, 3] at the points x [N], y [N]; 0 is the first pixel's centre."""
    height, width = image.shape[:2]
    left, top = np.floor(x), np.floor(y)
    result = np.zeros((len(x), 3))
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = left + dx, top + dy
            weight = (1 - np.abs(x - column)) * (1 - np.abs(y - row))
            weight[(column < 0) | (column >= width) | (row < 0) | (row >= height)] = 0
            values = image[row.clip(0, height - 1).astype(int), column.clip(0, width - 1).astype(int)]
            result += weight[:, None] * values
    return (result + 0.5).astype(np.uint8)


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)
