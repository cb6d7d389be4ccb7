"""Parts of real pictures that show the face as large, and in the same place, as the generated ones do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memo_core.encoders.face import Face, FaceAnalyzer
from memo_core.errors import VideoError
from memo_core.inputs.portrait import crop_region
from memo_core.release import CROP_MARGIN

from .. import media

LOOKS = 25  # pictures at the beginning of a video in which the face is looked for
CropRule = Literal["portrait", "match"]


@dataclass(frozen=True)
class Crop:
    """A part of a video's pictures, and the size that it is brought to.

    left, top, right, bottom: pixels; it may reach beyond the picture, whose edge is repeated there. width, height: what
    becomes of it, in pixels.
    """

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    def cut(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] -> [height, width, 3]."""
        return media.cut(picture, self.box, (self.width, self.height))

    def points(self, points: NDArray[np.floating]) -> NDArray[np.floating]:
        """Points [..., 2] of the whole picture, in pixels of the part."""
        scale = self.width / (self.right - self.left), self.height / (self.bottom - self.top)
        return (points - (self.left, self.top)) * scale

    def __str__(self) -> str:
        left, top, right, bottom = (f"{side:.4g}" for side in self.box)
        return f"{left}, {top} to {right}, {bottom}"


def portrait_crop(
    picture: NDArray[np.uint8], face: Face | None, width: int, height: int, margin: float = CROP_MARGIN
) -> Crop:
    """What `memo generate --crop face` cuts out of a picture with this face; without one the middle.

    Args:
        margin: room around the face, in parts of its size: a checkpoint's `crop_margin`.
    """
    box = None if face is None else face.box
    return Crop(*crop_region(*picture.shape[:2], height, width, box, margin), width, height)


def matching_crop(generated: Face, real: Face, width: int, height: int) -> Crop:
    """The part of the real picture in which its face lies as the other does in a generated one of this size.

    Scale and place bring the five points of the generated face closest to the real ones, by least squares.

    Raises:
        VideoError: points that coincide.
    """
    ours, theirs = (np.asarray(face.keypoints, np.float64) for face in (generated, real))
    middle, other = ours.mean(0), theirs.mean(0)
    size = float(((ours - middle) ** 2).sum())
    scale = float(((ours - middle) * (theirs - other)).sum()) / size if size else 0.0
    if not scale > 0:
        raise VideoError("the faces' points do not lie alike, so that no part of the real picture matches")
    left, top = other - scale * middle
    return Crop(float(left), float(top), float(left + scale * width), float(top + scale * height), width, height)


def find_crop(
    rule: CropRule,
    analyzer: FaceAnalyzer,
    generated: Path,
    real: Path,
    size: tuple[int, int],
    max_pixels: float,
    margin: float = CROP_MARGIN,
) -> Crop:
    """The part of a real video that matches a generated one.

    Args:
        rule: "portrait", what `memo generate --crop face` cuts out where the real video's first picture is the
            portrait; "match", so that the first face found in the one lies as the first found in the other.
        size: width and height of the generated pictures.
        margin: of "portrait", see `portrait_crop`.

    Raises:
        VideoError: no face within the first LOOKS pictures. Drop (of `media`): a damaged file.
    """
    theirs, first = _first_face(analyzer, real, max_pixels, 1 if rule == "portrait" else LOOKS)
    if rule == "portrait":
        return portrait_crop(first, theirs, *size, margin)
    ours, _ = _first_face(analyzer, generated, max_pixels, LOOKS)
    return matching_crop(ours, theirs, *size)


def _first_face(analyzer: FaceAnalyzer, path: Path, max_pixels: float, looks: int) -> tuple[Face, NDArray[np.uint8]]:
    for _, picture in islice(media.pictures(path, max_pixels=max_pixels), looks):
        faces = analyzer.detect(picture)
        if faces:
            return faces[0], picture
    where = "first picture" if looks == 1 else f"first {looks} pictures"
    raise VideoError(f"no face was found in the {where} of {path.name}, by which the real video is to be cropped")
