"""Reads video as a stream, frame by frame, through PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from ..errors import VideoError
from ..inputs.recording import open_media, reason

BT709, LIMITED_RANGE = 1, 1  # codes of ITU-T H.273: what players assume of MP4, here also written into the stream
_SHORT = 0.5  # seconds by which a video may end before its own length without being called damaged


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    frames: number of pictures. duration, audio_duration: seconds; None without sound. width, height: pixels.
    fps: pictures per second. metadata: the container's tags.
    """

    frames: int
    duration: float
    audio_duration: float | None
    width: int
    height: int
    fps: float
    metadata: dict[str, str]


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Reads what a video file holds from its header; where that does not count the frames, from its packets.

    Raises VideoError if the file cannot be opened or holds no video.
    """
    with _opened(path) as file:
        return _info(file, path)


def read_video(path: str | os.PathLike[str]) -> tuple[VideoInfo, Iterator[NDArray[np.uint8]]]:
    """What a video holds, and an iterator over its frames, each uint8 [H, W, 3] RGB, decoded as they are asked for.

    Frames stand upright, as players show them, whichever way the camera was held.

    Raises VideoError if the file cannot be opened, holds no video, or, while iterating, is damaged or ends early.
    """
    about = probe(path)
    return about, _frames(path)


def _frames(path: str | os.PathLike[str]) -> Iterator[NDArray[np.uint8]]:
    count, last = 0, 0.0
    with _opened(path) as file:
        stream = file.streams.video[0]
        listed, seconds = stream.frames, float((stream.duration or 0) * (stream.time_base or 0))
        zero = (stream.start_time or 0) * (stream.time_base or 0)
        for frame in file.decode(video=0):
            count, last = count + 1, last if frame.time is None else frame.time - float(zero)
            yield to_rgb(frame)
    # Half a file plays to its middle, and no decoder minds. Fewer frames than listed is no sign: what was cut out of a
    # video without coding it anew lists them all. Of files that list none nothing can be said.
    if count < listed and last + seconds / listed + _SHORT < seconds:
        raise VideoError(f"{path} is incomplete: it ends at {last:.2f} s of {seconds:.2f} s, after {count} frames")


def quarter_turns(frame: Any) -> int:
    """Anticlockwise, that make a frame upright: telephones film as they are held and write the angle beside it."""
    return round(frame.rotation / 90) % 4


def to_rgb(frame: Any, longest_side: int | None = None) -> NDArray[np.uint8]:
    """A decoded frame upright, uint8 [H, W, 3]; smaller where a side would be longer than `longest_side`."""
    shrink = min(1.0, (longest_side or math.inf) / max(frame.width, frame.height))
    size = {} if shrink == 1 else {"width": max(2, round(frame.width * shrink))}
    if size:
        size["height"] = max(2, round(frame.height * shrink))
    # PyAV before 17 takes all for BT.601 unless given two matrices that differ; that of RGB has no effect.
    matrices = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if frame.colorspace == BT709 else {}
    picture = frame.to_ndarray(format="rgb24", **size, **matrices)
    turns = quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The container, and a VideoError for whatever goes wrong with it, at opening or while it is read."""
    try:
        with open_media(path) as container:
            yield container
    except VideoError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"cannot read {path}: {reason(error)}") from error


def _info(file: Any, path: str | os.PathLike[str]) -> VideoInfo:
    if not file.streams.video:
        raise VideoError(f"{path} holds no video; its streams are {[stream.type for stream in file.streams] or 'none'}")
    stream = file.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} is coded in a way that FFmpeg does not know")
    fps = stream.average_rate or stream.guessed_rate
    frames = stream.frames
    width, height = stream.codec_context.width, stream.codec_context.height
    try:
        first = next(file.decode(stream), None)  # it alone says how it is turned
    except av.FFmpegError:  # damaged; the rest may not be
        first = None
    if first is not None and quarter_turns(first) % 2:
        width, height = height, width
    if not frames:
        file.seek(0)
        frames = sum(packet.size > 0 for packet in file.demux(stream))
    audio = file.streams.audio[0] if file.streams.audio else None
    return VideoInfo(
        frames=frames,
        duration=_seconds(stream, file),
        audio_duration=None if audio is None else _seconds(audio, file),
        width=width,
        height=height,
        fps=float(fps or math.nan),
        metadata=dict(file.metadata),
    )


def _seconds(stream: Any, file: Any) -> float:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return file.duration / av.time_base if file.duration is not None else math.nan
