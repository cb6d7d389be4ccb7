"""Squares cut out of pictures and laid back into them, frames resized, clips joined.

A frame is [H, W, 3], a tensor or an array, float in [0, 1] or uint8. Everything that can be long is a generator that
holds one frame, or as many as a cross fade is long.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ComposeError
from ..inputs.portrait import crop_region, read_box
from ..release import CROP_MARGIN

Frame = Tensor | NDArray[Any]
LARGEST = 4  # a box's side, in longer sides of its picture
CHUNK = 16  # frames resized at once


@dataclass(frozen=True)
class Box:
    """A square of a picture.

    left, top, right, bottom: whole pixels of the picture, right and bottom exclusive; the square may reach beyond the
        picture but shares at least one pixel with it.
    width, height: of the picture it belongs to.

    Raises:
        ComposeError: numbers that are not whole, not a square, outside the picture, or larger than four pictures.
    """

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int

    def __post_init__(self) -> None:
        numbers = (self.left, self.top, self.right, self.bottom, self.width, self.height)
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise ComposeError(f"a box is made of whole numbers of pixels; received {numbers}")
        if self.width < 1 or self.height < 1:
            raise ComposeError(f"a box belongs to a picture of 1x1 pixels and up; received {self.width}x{self.height}")
        across, down = self.right - self.left, self.bottom - self.top
        where = f"{numbers[:4]} (left, top, right, bottom) of a {self.width}x{self.height} picture"
        if across != down or across < 1:
            raise ComposeError(f"a box is a square of 1 pixel and up; received {across}x{down} pixels, {where}")
        if self.right <= 0 or self.bottom <= 0 or self.left >= self.width or self.top >= self.height:
            raise ComposeError(f"a box shares pixels with its picture; received {where}")
        if across > LARGEST * max(self.width, self.height):
            raise ComposeError(f"a box is at most {LARGEST} times as large as its picture; received {where}")

    @property
    def side(self) -> int:
        """Pixels along an edge."""
        return self.right - self.left


def face_square(image_size: tuple[int, int], face_box: Any, margin: float = CROP_MARGIN) -> Box:
    """The square around a face, the same that `inputs.portrait.prepare_portrait` cuts.

    Args:
        image_size: height and width of the picture.
        face_box: left, top, right, bottom in pixels, or a mask [H, W] that is above 0.5 on the face.
        margin: room at each side of the face, in parts of its longer side, 0 to 10. Less is left where the picture
            ends; only a face longer than the picture's shorter side makes the square reach beyond the picture.

    Raises:
        ComposeError: a size or margin out of range. PortraitError: a box or mask that shows no face.
    """
    height, width = _size(image_size)
    if not (math.isfinite(margin) and 0 <= margin <= 10):
        raise ComposeError(f"margin is {margin}; allowed is 0 to 10 times the face's size")
    return Box(*crop_region(height, width, 1, 1, read_box(face_box, height, width), margin), width, height)


def centre_square(image_size: tuple[int, int], center_x: float = 0.5, center_y: float = 0.5, scale: float = 1.0) -> Box:
    """A square around a point, moved inwards where it would leave the picture.

    Args:
        image_size: height and width of the picture.
        center_x, center_y: in parts of the picture's width and height, 0 to 1.
        scale: the square's side in parts of the picture's shorter side, 0.05 to 1.

    Raises:
        ComposeError: a value out of range.
    """
    height, width = _size(image_size)
    for name, value, low in (("center_x", center_x, 0), ("center_y", center_y, 0), ("scale", scale, 0.05)):
        if not low <= value <= 1:  # also refuses NaN
            raise ComposeError(f"{name} is {value}; allowed is {low} to 1")
    side = max(1, round(scale * min(height, width)))
    left = min(max(round(center_x * width - side / 2), 0), width - side)
    top = min(max(round(center_y * height - side / 2), 0), height - side)
    return Box(left, top, left + side, top + side, width, height)


def crop_square(image: Tensor, box: Box) -> Tensor:
    """Cuts the box out of a picture [H, W, 3] or frames [F, H, W, 3]; beyond the picture its edge repeats.

    Returns [side, side, 3] or [F, side, side, 3] in the image's type, sharing no memory with it.

    Raises:
        ComposeError: an image of another shape, or not of the size that the box belongs to.
    """
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or image.shape[-3:-1] != (box.height, box.width):
        raise ComposeError(
            f"the box belongs to a {box.width}x{box.height} picture, [{box.height}, {box.width}, 3] or "
            f"[F, {box.height}, {box.width}, 3]; received {list(image.shape)}. Use the picture that the box came from"
        )
    rows = torch.arange(box.top, box.bottom, device=image.device).clamp(0, box.height - 1)
    columns = torch.arange(box.left, box.right, device=image.device).clamp(0, box.width - 1)
    return image.index_select(-3, rows).index_select(-2, columns)


def resize_frames(frames: Frame, height: int, width: int) -> Tensor:
    """Resizes a frame [H, W, 3] or frames [F, H, W, 3] to height x width: bicubic, smoothed when made smaller.

    Returns the same type, uint8 or float in [0, 1]; frames of that size already are returned as they are.

    Raises:
        ComposeError: another shape, or a size below 1.
    """
    frames = torch.as_tensor(frames)
    _size((height, width))
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise ComposeError(f"frames are [H, W, 3] or [F, H, W, 3]; received {list(frames.shape)}")
    if frames.shape[-3:-1] == (height, width):
        return frames
    batch = frames.reshape(-1, *frames.shape[-3:])
    result = batch.new_empty(len(batch), height, width, 3)
    for start in range(0, len(batch), CHUNK):
        part = to_float(batch[start : start + CHUNK]).permute(0, 3, 1, 2)
        part = F.interpolate(part, (height, width), mode="bicubic", antialias=True).clamp(0, 1).permute(0, 2, 3, 1)
        result[start : start + CHUNK] = _as_type(part, batch.dtype)
    return result.reshape(*frames.shape[:-3], height, width, 3)


def paste_back(
    frames: Iterable[Frame] | Tensor, picture: Iterable[Frame] | Tensor, box: Box, feather: float = 0.1
) -> Iterator[Tensor]:
    """Lays the frames of a clip into the box of the picture that they were cut from, one frame at a time.

    Outside the box every value stays what it was. Frames and picture may differ in length: the shorter one holds its
    last frame, so a still picture lasts as long as the clip and a listener, whose clip has ended, keeps still.

    Args:
        frames: frames of any one size, [h, w, 3], or [h, w, 4]: where those are transparent the picture shows.
        picture: one frame [H, W, 3], or a sequence of them.
        feather: width of the soft edge inside the box, in parts of its side, 0 (a hard edge) to 0.5. Sides where the
            box touches or leaves the picture have none: there is nothing to blend into.

    Yields:
        [H, W, 3] in [0, 1], a new tensor of the picture's type (uint8 becomes float32) on its device.

    Raises:
        ComposeError: no frames or no picture, another shape, or a picture of another size than the box's. Arguments
            are checked when called, frames when their turn comes.
    """
    if not 0 <= feather <= 0.5:
        raise ComposeError(f"feather is {feather}; allowed is 0 to 0.5 of the box's side")
    if isinstance(picture, (Tensor, np.ndarray)) and picture.ndim == 3:
        picture = [picture]
    if isinstance(frames, (Tensor, np.ndarray)) and frames.ndim == 3:
        frames = [frames]
    return _paste(iter(frames), iter(picture), box, feather)


def _paste(frames: Iterator[Frame], pictures: Iterator[Frame], box: Box, feather: float) -> Iterator[Tensor]:
    rows = slice(max(box.top, 0), min(box.bottom, box.height))
    columns = slice(max(box.left, 0), min(box.right, box.width))
    inside = (
        slice(rows.start - box.top, rows.stop - box.top),
        slice(columns.start - box.left, columns.stop - box.left),
    )
    down = _feather(box.side, feather, box.top > 0, box.bottom < box.height)
    across = _feather(box.side, feather, box.left > 0, box.right < box.width)
    weight = (down[:, None] * across)[inside][..., None]
    below: Tensor | None = None
    patch: Tensor | None = None
    while True:
        new_frame, new_below = next(frames, None), next(pictures, None)
        if patch is None and new_frame is None:
            raise ComposeError("there are no frames to paste")
        if below is None and new_below is None:
            raise ComposeError("there is no picture to paste into")
        if new_frame is None and new_below is None:
            return
        if new_below is not None:
            below = torch.as_tensor(new_below)
            if below.shape != (box.height, box.width, 3):
                raise ComposeError(
                    f"the box belongs to a {box.width}x{box.height} picture, [{box.height}, {box.width}, 3]; received "
                    f"{list(below.shape)}. Paste into the picture that the box came from"
                )
            if not below.is_floating_point():
                below = to_float(below)
            weight = weight.to(below.device)
        assert below is not None
        if new_frame is not None:
            patch, opacity = _patch(to_float(check_frame(new_frame, transparency=True)), box.side)
            patch = patch[inside].to(below.device)
            opacity = None if opacity is None else opacity[inside].to(below.device)
        assert patch is not None
        result = below.clone()
        under = below[rows, columns].float()
        if opacity is None:
            mixed = torch.lerp(under, patch, weight)
        else:
            mixed = under + weight * (patch - opacity * under)
        result[rows, columns] = mixed.to(result.dtype)
        yield result


def _patch(frame: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    """A frame [h, w, 3 or 4] as a square, [side, side, 3]; with transparency premultiplied, and [side, side, 1]."""
    colours, opacity = frame[..., :3], frame[..., 3:]
    if bool((opacity >= 1).all()):  # also without a fourth channel
        return resize_frames(colours, side, side), None
    # Premultiplied: what nobody sees must not bleed into the edge when it is scaled.
    opacity = opacity.clamp(0, 1).expand(-1, -1, 3)
    return resize_frames(colours * opacity, side, side), resize_frames(opacity, side, side)[..., :1]


def _feather(side: int, part: float, start: bool, end: bool) -> Tensor:
    """Weights [side], 1 inside, falling smoothly towards the ends asked for."""
    near = torch.arange(side) + 0.5  # pixels to the edge
    width = max(part * side, 1e-6)
    weight = torch.ones(side)
    if start:
        weight = weight * smoothstep(near / width)
    if end:
        weight = weight * smoothstep(near.flip(0) / width)
    return weight


def cross_fade(parts: Iterable[Iterable[Frame]], frames: int = 0) -> Iterator[Frame]:
    """Joins clips. Over the first frames of each next one the last frame of the one before fades out.

    So nothing gets shorter and the sound stays in time. Holds at most `frames` frames; parts are opened one by one.

    Args:
        parts: clips, iterables of frames of one size. Empty ones are skipped.
        frames: how many frames a fade lasts; 0 cuts hard and hands all frames on as they are. A part that is shorter
            fades over its own length.

    Yields:
        Frames of the type of the part that they belong to.

    Raises:
        ComposeError: a negative length, or frames of another shape or size than the first.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 0:
        raise ComposeError(f"a cross fade lasts a whole number of frames, 0 and up; received {frames!r}")
    return _fade(parts, frames)


def _fade(parts: Iterable[Iterable[Frame]], length: int) -> Iterator[Frame]:
    last: Frame | None = None
    size = None
    for number, part in enumerate(parts, 1):
        rest = iter(part)
        begin = deque(islice(rest, length) if last is not None else ())
        before, fading = last, len(begin)
        for index, frame in enumerate(chain((begin.popleft() for _ in range(fading)), rest)):
            check_frame(frame)
            size = size or tuple(frame.shape)
            if tuple(frame.shape) != size:
                raise ComposeError(
                    f"clip {number} has frames of {frame.shape[1]}x{frame.shape[0]} pixels (width x height), the first "
                    f"ones {size[1]}x{size[0]}; scale them to one size first"
                )
            if before is not None and index < fading:
                frame = _mix(before, frame, float(smoothstep(torch.tensor((index + 1) / (fading + 1)))))
            last = frame
            yield frame


def _mix(old: Frame, new: Frame, weight: float) -> Frame:
    """old * (1 - weight) + new * weight in the type of `new`."""
    target = torch.as_tensor(new)
    mixed = torch.lerp(to_float(torch.as_tensor(old).to(target.device)), to_float(target), weight)
    mixed = _as_type(mixed, target.dtype)
    return mixed.numpy() if isinstance(new, np.ndarray) else mixed


# --- Helpers ----------------------------------------------------------------------------------------------------------


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, 3x^2 - 2x^3 between."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def check_frame(frame: Frame, transparency: bool = False) -> Tensor:
    """The frame as a tensor; ComposeError unless it is [H, W, 3], uint8 or float; with transparency also [H, W, 4]."""
    tensor = torch.as_tensor(frame)
    known = tensor.dtype == torch.uint8 or tensor.is_floating_point()
    channels = (3, 4) if transparency else (3,)
    if tensor.ndim != 3 or tensor.shape[2] not in channels or 0 in tensor.shape or not known:
        allowed = " or ".join(f"[H, W, {count}]" for count in channels)
        raise ComposeError(f"a frame is uint8 or float {allowed}; received {tensor.dtype} {list(tensor.shape)}")
    return tensor


def to_float(frames: Tensor) -> Tensor:
    """uint8 or any float -> float32 in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def _as_type(frames: Tensor, dtype: torch.dtype) -> Tensor:
    return (frames * 255).round().to(torch.uint8) if dtype == torch.uint8 else frames.to(dtype)


def _size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in (height, width)):
        raise ComposeError(f"a size is two whole numbers of pixels from 1; received {height}x{width} (height x width)")
    return height, width
