"""Pictures and sound of a part of any video, decoded as a stream: memory holds one picture, whatever the length."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memo_core.inputs.recording import GAP, Damage, open_media, reason, sound_pieces
from memo_core.video.read import quarter_turns, to_rgb

from .prepare.rows import Drop

SOUND_LEAD = 0.5  # seconds decoded before a span: the first packet after a jump may sound wrong
LEAD = 0.2  # seconds before a span whose pictures are handed over, because one may be the nearest to its start
INSTANT = 1e-6  # seconds, less than any time stamp's unit: sums of times are not exact
MAX_HOLD = 1.0  # seconds that a picture may stand for missing ones after it
Convert = Callable[..., NDArray[np.uint8]]
"""A decoded picture: (longest side, None for its own size) -> uint8 [H, W, 3] RGB, upright."""


@dataclass(frozen=True)
class Header:
    """What a container claims. seconds: None where it does not say. fps likewise. Width and height as shown upright."""

    seconds: float | None
    width: int
    height: int
    fps: float | None


@contextmanager
def opened(path: str | os.PathLike[str], kind: str = "video") -> Iterator[Any]:
    """The container, and a Drop for whatever goes wrong with it: before, at opening, or while it is read."""
    import av

    try:
        with open_media(path) as container:
            if not getattr(container.streams, kind):
                raise Drop(f"no {'picture' if kind == 'video' else 'sound'}", f"the file has no {kind} stream")
            yield container
    except (av.FFmpegError, OSError, EOFError) as error:
        raise Drop("cannot be read", f"{type(error).__name__}: {reason(error)}") from error


def header(path: str | os.PathLike[str], max_pixels: float = math.inf) -> Header:
    """What the file claims about its picture. Raises Drop without picture or sound, or with too large a picture."""
    with opened(path) as container:
        stream = container.streams.video[0]
        if not container.streams.audio:
            raise Drop("no sound", "the file has no audio stream")
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        rate = stream.average_rate or stream.guessed_rate
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_pixels(width, height, max_pixels)
        frame = next(container.decode(stream), None)  # it alone says how it is turned
        if frame is not None and quarter_turns(frame) % 2:
            width, height = height, width
        return Header(float(seconds) if seconds > 0 else None, width, height, float(rate) if rate else None)


def pictures(
    path: str | os.PathLike[str],
    start: float = 0.0,
    end: float = math.inf,
    max_pixels: float = math.inf,
    longest_side: int | None = None,
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Decoded pictures from shortly before `start` up to `end`.

    Args:
        start, end: seconds since the beginning of the file.
        max_pixels: a larger picture raises Drop before it is converted.
        longest_side: pictures are made smaller, to this.

    Yields:
        (seconds, uint8 [H, W, 3] RGB, upright), times rising.
    """
    for time, picture in frames(path, start, end, max_pixels):
        yield time, picture(longest_side)


def frames(
    path: str | os.PathLike[str], start: float = 0.0, end: float = math.inf, max_pixels: float = math.inf
) -> Iterator[tuple[float, Convert]]:
    """As `pictures`, each as a function of its longest side, so that it is converted in the sizes that are needed."""
    for begin in (start, 0.0):
        with opened(path) as container:
            decoded = _decode(container, begin, max_pixels)
            first = next(decoded, None)
            if begin > 0 and (first is None or first[0] > begin + LEAD):
                continue  # an index that leads past the place: read from the beginning
            for time, picture in chain([] if first is None else [first], decoded):
                if time >= end - INSTANT:
                    return
                if time >= start - LEAD:
                    yield time, picture
        return


def _decode(container: Any, start: float, max_pixels: float) -> Iterator[tuple[float, Convert]]:
    stream = container.streams.video[0]
    zero = (container.start_time or 0) / 1_000_000
    if start > 0:
        container.seek(int((start + zero) / stream.time_base), stream=stream)
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    last, size = None, None
    for frame in container.decode(stream):
        time = frame.time - zero if frame.time is not None else (0.0 if last is None else last + step)
        if last is not None and time <= last:
            continue
        last = time
        _check_pixels(frame.width, frame.height, max_pixels)
        if size is not None and size != (frame.width, frame.height):
            said = f"from {size[0]}x{size[1]} to {frame.width}x{frame.height} at {time:.1f} s"
            raise Drop("picture size changes", said)
        size = frame.width, frame.height
        yield time, partial(to_rgb, frame)


def _check_pixels(width: int, height: int, max_pixels: float) -> None:
    if width * height > max_pixels:
        raise Drop("picture too large", f"{width}x{height}, more than --max-pixels {max_pixels:g}")


def at_rate(
    path: str | os.PathLike[str], start: float, end: float, fps: float, max_pixels: float = math.inf
) -> Iterator[NDArray[np.uint8]]:
    """Pictures of a file at an even rate, as `EvenRate` chooses them. Raises Drop where the picture ends early."""
    rate = EvenRate(start, end, fps)
    for time, picture in pictures(path, start, end, max_pixels):
        yield from rate.push(time, picture)
    yield from rate.finish()


class EvenRate:
    """Chooses round((end - start) fps) pictures at an even rate: each the nearest in time of those before `end`, where
    another scene may begin, whatever rate they come at. Several of these can be fed by one decoder.
    """

    def __init__(self, start: float, end: float, fps: float) -> None:
        self.start, self.end, self.fps = start, end, fps
        self.count, self.done = round((end - start) * fps), 0
        self._before: tuple[float, NDArray[np.uint8]] | None = None

    def push(self, time: float, picture: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Takes the next picture; yields those before it, as often as they are the nearest."""
        if time >= self.end - INSTANT:
            return
        while self._before is not None and self.done < self.count:
            wanted = self.start + self.done / self.fps
            if abs(wanted - self._before[0]) > abs(time - wanted):
                break
            self.done += 1
            yield self._before[1]
        self._before = time, picture

    def finish(self) -> Iterator[NDArray[np.uint8]]:
        """Yields the last ones. Raises Drop where the picture ends more than MAX_HOLD before `end`."""
        while (
            self._before is not None
            and self.done < self.count
            and self.start + self.done / self.fps <= self._before[0] + MAX_HOLD
        ):
            self.done += 1
            yield self._before[1]
        if self.done < self.count:
            said = f"{self.done} of {self.count} pictures from {self.start:.2f} to {self.end:.2f} s"
            raise Drop("picture ends early", said)


def sound(path: str | os.PathLike[str], start: float, end: float, rate: int) -> tuple[NDArray[np.float32], float]:
    """Mono sound of a span, each sample at its time, zeros where there is none.

    Returns:
        float32 [round((end - start) rate)], and how many seconds of it the file has.
    """
    samples = np.zeros(round((end - start) * rate), np.float32)
    heard = 0
    for jump in (True, False):
        with opened(path, "audio") as container:
            stream = container.streams.audio[0]
            zero = (container.start_time or 0) / 1_000_000
            if jump and start > SOUND_LEAD:
                container.seek(int((start - SOUND_LEAD + zero) / stream.time_base), stream=stream)
            cursor, damage = None, Damage()
            for time, _, piece in sound_pieces(container, damage, rate):
                if damage.packets:  # nothing is learnt from sound that has holes
                    raise Drop("cannot be read", f"its sound is damaged{damage}")
                if time is not None:
                    place = round((time - zero - start) * rate)
                    if cursor is None and jump and start > SOUND_LEAD and place > 0:
                        break  # an index that leads past the place: read from the beginning
                    if cursor is None or abs(place - cursor) > GAP * rate:
                        cursor = place
                cursor = cursor or 0
                if cursor >= len(samples):
                    break
                first, last = max(cursor, 0), min(cursor + piece.shape[1], len(samples))
                if last > first:
                    samples[first:last] = piece.mean(axis=0)[first - cursor : last - cursor]
                    heard += last - first
                cursor += piece.shape[1]
        if heard:
            break
    np.nan_to_num(samples, copy=False)
    return samples, heard / rate


def cut(
    image: NDArray[np.uint8],
    box: list[float] | tuple[float, ...],
    size: int | tuple[int, int],
    fill: int | None = None,
) -> NDArray[np.uint8]:
    """The part `box` (left, top, right, bottom) of an image as uint8 [H, W, 3] of `size`, the side of a square or width
    and height; beyond the image its edge repeats, or there is gray `fill`.
    """
    shape = (size, size) if isinstance(size, int) else size
    left, top, right, bottom = box
    height, width = image.shape[:2]
    x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        x, y = np.arange(x0, x1), np.arange(y0, y1)
        image = image[y.clip(0, height - 1)[:, None], x.clip(0, width - 1)]
        if fill is not None:
            image[(y < 0) | (y >= height)] = fill
            image[:, (x < 0) | (x >= width)] = fill
        left, top, right, bottom = left - x0, top - y0, right - x0, bottom - y0
    picture = Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(picture)
