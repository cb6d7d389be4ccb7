"""Finds the face in a portrait, describes it, and cuts the portrait to the size the networks work at.

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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .checks import number, shown, whole
from .errors import CheckpointError, PortraitError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

FOLDER = "misc/face_analysis/models"  # inside a checkpoint
DETECTOR, EMBEDDER = "scrfd_10g_bnkps.onnx", "glintr100.onnx"
EMBEDDING_SIZE = 512
DETECTION_SIZE = 640
SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.4
STRIDES, ANCHORS = (8, 16, 32), 2
ALIGNED_SIZE = 112
# Where ArcFace expects the eyes (image left first), the tip of the nose and the corners of the mouth: x, y of 112x112.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
SIZE_MULTIPLE = 64  # VAE 8, then three halvings in the networks
MAX_SIDE = 4096  # pixels of a video: the memory's sums alone would take half a terabyte there

Box = tuple[float, float, float, float]
PortraitImage = Image.Image | NDArray[Any] | Tensor


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
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Portrait:
    """A portrait ready for the networks.

    pixels: float32 [3, H, W] in [-1, 1].
    face_embedding: float32 [1, 512] as ArcFace gives it, not scaled to unit length (the released code does not either);
        zero where no face could be described.
    box: the face, left, top, right, bottom in pixels of the upright image; None without a face.
    crop: the part that was cut out, likewise; it may reach beyond the image, which is continued there by its edge.
    faces_found: how many faces the detector saw.
    """

    pixels: Tensor
    face_embedding: Tensor
    box: Box | None
    crop: tuple[int, int, int, int]
    faces_found: int


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
    def from_folder(cls, folder: str | os.PathLike[str]) -> FaceAnalyzer | None:
        """Reads both networks from a checkpoint's folder, or from the folder that holds the ONNX files themselves.

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
        sessions = []
        for name in (DETECTOR, EMBEDDER):
            try:
                sessions.append(
                    onnxruntime.InferenceSession(str(models / name), options, providers=["CPUExecutionProvider"])
                )
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


def prepare_portrait(
    image: PortraitImage,
    size: int | tuple[int, int] = 512,
    crop: Literal["face", "none"] = "face",
    margin: float = 0.35,
    face_index: int | None = None,
    analyzer: FaceAnalyzer | None = None,
    no_face: Literal["warn", "error"] = "warn",
    face_box: Any = None,
) -> Portrait:
    """Cuts a portrait to size and describes its face.

    With a square picture and crop="none" pixels and embedding equal the released code's. The face is looked for in the
    whole picture, before it is cut.

    Args:
        image: a PIL image (its EXIF orientation is applied), uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a
            float tensor [3, H, W] in [-1, 1]. Transparent parts become white.
        size: of the result, height and width or one number for both, multiples of 64.
        crop: "face" cuts around the face, or around the centre where none is known; "none" around the centre, as large
            as the picture and the wanted aspect allow.
        margin: room left at each side of the face, in parts of the face's own width and height. Less is left where the
            picture ends; a picture too small for the face's box at the wanted aspect is continued by its edge.
        face_index: which of several faces, 0 is the largest; None takes the largest.
        analyzer: finds and describes faces; None: a zero embedding.
        no_face: what happens when no face is found: a logged warning and a zero embedding, or PortraitError.
        face_box: where the face is, if the caller knows: left, top, right, bottom in pixels of the upright picture, or
            a mask [H, W] or [1, H, W] that is above 0.5 there. The face described is the one that shares most of it.

    Raises:
        PortraitError: an image, size, box or choice that cannot be used, or no face where `no_face="error"`.
    """
    height, width = check_size(size)
    if crop not in ("face", "none") or no_face not in ("warn", "error"):
        raise PortraitError(f"crop is {crop!r}, no_face {no_face!r}; allowed are 'face', 'none' and 'warn', 'error'")
    if number(margin, 0, 10) is None:
        raise PortraitError(f"margin is {shown(margin)}; allowed is 0 to 10 times the face's size")
    if face_index is not None and whole(face_index) is None:
        raise PortraitError(f"face_index is {shown(face_index)}; allowed is 0 (the largest face) and up, or None")
    pixels = _to_rgb(image)
    given = None if face_box is None else read_box(face_box, *pixels.shape[:2])

    faces = analyzer.detect(pixels) if analyzer is not None else []
    face = _choose(faces, face_index, given)
    if face is None:
        if analyzer is None:
            reason = f"there are no face models ({FOLDER}), so no face can be found"
        elif faces:
            reason = f"none of the {len(faces)} faces found is inside the given box"
        else:
            reason = "no face was found in the portrait"
        if no_face == "error":
            what = (
                "`memo download` fetches them" if analyzer is None else "use a picture that shows a face from the front"
            )
            raise PortraitError(f"{reason}: {what}, or do not ask for a face")
        if analyzer is not None:  # without one, from_folder has said so
            logger.warning("%s: the face embedding is zero, so the likeness may be weaker", reason)
    if face is not None and analyzer is not None:
        embedding = torch.from_numpy(analyzer.embed(pixels, face))[None]
    else:
        embedding = torch.zeros(1, EMBEDDING_SIZE)

    box = given if given is not None else face.box if face is not None else None
    target = box if crop == "face" else None
    region = crop_region(pixels.shape[0], pixels.shape[1], height, width, target, margin)
    uncut = region == (0, 0, pixels.shape[1], pixels.shape[0]) and pixels.shape[:2] == (height, width)
    if uncut and isinstance(image, Tensor) and image.is_floating_point():
        result = image.detach().to("cpu", torch.float32, copy=True)  # nothing to do: not even rounded to 8 bits
    else:
        result = _cut(pixels, region, height, width)
    return Portrait(result, embedding, box, region, len(faces))


def _choose(faces: list[Face], index: int | None, given: Box | None) -> Face | None:
    if not faces:
        return None
    if index is not None:
        if index >= len(faces):
            raise PortraitError(
                f"face_index is {index}, but {len(faces)} faces were found; use 0 (the largest) to {len(faces) - 1}"
            )
        return faces[index]
    if given is None:
        return faces[0]

    def shared(face: Face) -> float:
        sides = [min(face.box[axis + 2], given[axis + 2]) - max(face.box[axis], given[axis]) for axis in (0, 1)]
        return max(0.0, sides[0]) * max(0.0, sides[1])

    best = max(faces, key=shared)
    return best if shared(best) > 0 else None


def crop_region(
    image_height: int, image_width: int, height: int, width: int, box: Box | None, margin: float
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part with the aspect height:width to cut out; may reach beyond the image."""
    scale = min(image_height / height, image_width / width)  # as large as the image allows
    centre_x, centre_y = image_width / 2, image_height / 2
    if box is not None:
        left, right = (min(max(value, 0.0), image_width) for value in box[::2])  # a detected face may reach outside
        top, bottom = (min(max(value, 0.0), image_height) for value in box[1::2])
        smallest = max((right - left) / width, (bottom - top) / height, 1 / min(width, height))  # just the face
        scale = max(smallest, min(smallest * (1 + 2 * margin), scale))
        centre_x, centre_y = (left + right) / 2, (top + bottom) / 2

    def place(centre: float, extent: float, limit: int) -> tuple[int, int]:
        length = max(1, round(extent))
        start = round(centre - length / 2)
        start = min(max(start, 0), limit - length) if length <= limit else (limit - length) // 2
        return start, start + length

    columns, rows = place(centre_x, width * scale, image_width), place(centre_y, height * scale, image_height)
    return columns[0], rows[0], columns[1], rows[1]


def _cut(pixels: NDArray[np.uint8], region: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    left, top, right, bottom = region
    if min(left, top) >= 0 and bottom <= pixels.shape[0] and right <= pixels.shape[1]:
        part = pixels[top:bottom, left:right]
    else:  # beyond the image its edge repeats
        rows = np.arange(top, bottom).clip(0, pixels.shape[0] - 1)
        columns = np.arange(left, right).clip(0, pixels.shape[1] - 1)
        part = pixels[rows[:, None], columns]
    # The filter and the arithmetic of torchvision's Resize, ToTensor and Normalize in the released code.
    resized = Image.fromarray(np.ascontiguousarray(part)).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5).contiguous()


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a video; PortraitError, with the nearest allowed ones, unless both are multiples of 64 up to
    MAX_SIDE."""
    sides = [whole(side, -(2**53)) for side in (size if isinstance(size, (tuple, list)) else (size, size))]
    if len(sides) != 2 or None in sides:
        raise PortraitError(f"size is {shown(size)}; it is a whole number, or two: height and width")
    height, width = sides
    if max(height, width) > MAX_SIDE:
        raise PortraitError(f"size is {height}x{width} (height x width); up to {MAX_SIDE} pixels a side are made")
    near = []
    for value in (height, width):
        below = value // SIZE_MULTIPLE * SIZE_MULTIPLE
        near.append(sorted({max(below, SIZE_MULTIPLE), max(below + (value != below) * SIZE_MULTIPLE, SIZE_MULTIPLE)}))
    if [height] != near[0] or [width] != near[1]:
        allowed = " or ".join(f"{h}x{w}" for h in near[0] for w in near[1])
        raise PortraitError(
            f"size is {height}x{width} (height x width); allowed are multiples of {SIZE_MULTIPLE}, nearest {allowed}"
        )
    return height, width


def read_box(face_box: Any, height: int, width: int) -> Box:
    """Left, top, right, bottom from four numbers, clipped to the picture, or from a mask [H, W] or [1, H, W] that is
    above 0.5 on the face; PortraitError where that is no part of the picture."""
    try:
        given = np.asarray(face_box.detach().cpu() if isinstance(face_box, Tensor) else face_box, np.float64)
    except (TypeError, ValueError) as error:
        raise PortraitError(f"face_box is {shown(face_box)}; allowed are four numbers or a mask") from error
    if given.shape == (4,):
        left, top, right, bottom = (float(value) for value in given)
        clipped = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):  # also refuses NaN
            raise PortraitError(
                f"face_box is {[left, top, right, bottom]} (left, top, right, bottom); it must enclose pixels of the "
                f"{width}x{height} picture"
            )
        return clipped
    if given.shape not in ((height, width), (1, height, width)):
        raise PortraitError(
            f"face_box has the shape {list(given.shape)}; allowed are four numbers or a mask of the picture's size, "
            f"[{height}, {width}]"
        )
    rows, columns = np.nonzero(given.reshape(height, width) > 0.5)
    if not len(rows):
        raise PortraitError("face_box is a mask without any pixel above 0.5; paint the face, or leave face_box out")
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def _to_rgb(image: PortraitImage) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright and opaque."""
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise PortraitError(f"the portrait is a tensor {list(image.shape)}; allowed is [3, H, W] in [-1, 1]")
        low, high = (float(value) for value in image.detach().float().aminmax())
        if not -1.001 <= low <= high <= 1.001:  # also refuses NaN
            raise PortraitError(f"the portrait's values reach from {low:g} to {high:g}; allowed is [-1, 1]")
        levels_8bit = image.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255)
        return levels_8bit.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    if isinstance(image, Image.Image):
        picture = image
    else:
        try:
            array = np.asarray(image)
        except Exception as error:  # whatever an object's own conversion raises
            raise PortraitError(f"the portrait is a {type(image).__name__} and no picture ({error})") from error
        channels = array.shape[2] if array.ndim == 3 else 1
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
            raise PortraitError(
                f"the portrait is {array.dtype} {list(array.shape)}; allowed are a PIL image, uint8 [H, W, 3], "
                "[H, W, 4] or [H, W], or a float tensor [3, H, W] in [-1, 1]"
            )
        picture = Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)
    if 0 in picture.size:
        raise PortraitError(f"the portrait is {picture.width}x{picture.height} pixels; allowed is 1x1 and up")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I") and (levels := np.asarray(picture)).max() > 255:  # convert() would clip 16 bits
            picture = Image.fromarray((levels / 257).clip(0, 255).round().astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            opaque = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # pictures are decoded here at the latest, and of damaged ones decoders raise what comes
        raise PortraitError(f"the portrait cannot be read: {type(error).__name__}: {error}") from error


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
