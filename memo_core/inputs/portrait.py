"""Cuts the portrait to the size the networks work at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..checks import number, shown, whole
from ..encoders.face import EMBEDDING_SIZE, FOLDER, Box, Face, FaceAnalyzer, logger
from ..errors import PortraitError
from ..release import CROP_MARGIN

SIZE_MULTIPLE = 64  # VAE 8, then three halvings in the networks
MAX_SIDE = 4096  # pixels of a video: the memory's sums alone would take half a terabyte there
PortraitImage = Image.Image | NDArray[Any] | Tensor


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


def prepare_portrait(
    image: PortraitImage,
    size: int | tuple[int, int] = 512,
    crop: Literal["face", "none"] = "face",
    margin: float = CROP_MARGIN,
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
    MAX_SIDE.
    """
    given = size if isinstance(size, (tuple, list)) else (size, size)
    sides = [side for side in (whole(value, -(2**53)) for value in given) if side is not None]
    if not len(given) == len(sides) == 2:
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
    above 0.5 on the face; PortraitError where that is no part of the picture.
    """
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
