"""Clips joined to one video: at one size, one frame rate, with one sound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..inputs.sound import resample
from ..release import WINDOW
from .clips import Clip, ImageClip, Sound
from .compose import cross_fade as joined
from .compose import resize_frames
from .write import VideoWriter

AnyClip = Clip | ImageClip
Picture = NDArray[np.uint8]


def join(
    path: str | os.PathLike[str],
    parts: Sequence[AnyClip],
    *,
    fps: float,
    sound: Sound | None = None,
    cross_fade: int = 0,
    on_frames: Callable[[int, int], None] = lambda done, total: None,
    look: Callable[[], None] = lambda: None,
) -> Path:
    """Encodes clips one after the other into a video file, as they are decoded.

    Args:
        path: of the file, MP4.
        parts: at least one; those of another size than the first are scaled to fit it, with black bars.
        fps: of the video; frames are repeated or left out, nothing gets slower.
        sound: of the whole video, from its beginning; None: every part brings its own.
        cross_fade: frames over which the last picture of a part fades into the next one.
        on_frames: called as (frames written, frames in all) every few of them.
        look: called every few frames that are decoded; what either raises ends the writing, and no file appears.

    Returns:
        The path.
    """
    height, width = parts[0].size
    total = sum(frames_at(part, fps) for part in parts)
    rate = sound.sample_rate if sound is not None else next((p.sound.sample_rate for p in parts if p.sound), None)
    about = next((dict(part.about) for part in parts if part.about), {})

    def frames_of(part: AnyClip) -> Iterator[Picture]:
        for frame in paced(_watched(part.frames(), look), part, fps):
            shown = frame if part.size == (height, width) else fitted(frame, height, width)
            # H.264 wants even sizes: the last row and column stand twice.
            yield np.pad(shown, ((0, height % 2), (0, width % 2), (0, 0)), "edge")

    on_frames(0, total)
    with VideoWriter(path, width + width % 2, height + height % 2, fps, rate, about) as writer:
        if sound is not None:
            writer.write_audio(sound.waveform)
        elif rate is not None:
            frames = 0
            for part in parts:
                # From frame to frame of the video: rounded for each by itself, many short clips would drift.
                began, frames = frames, frames + frames_at(part, fps)
                writer.write_audio(sound_at(part, round(frames / fps * rate) - round(began / fps * rate), rate))
        for number, frame in enumerate(joined(map(frames_of, parts), cross_fade), 1):
            writer.write_frames(frame)
            if number % WINDOW == 0 or number == total:
                on_frames(number, total)
    return writer.path


def _watched(frames: Iterator[Picture], look: Callable[[], None]) -> Iterator[Picture]:
    for number, frame in enumerate(frames):
        if number % WINDOW == 0:
            look()
        yield frame


def fitted(frame: Picture, height: int, width: int) -> Picture:
    """A frame scaled to fit, in its own proportions, with black bars."""
    scale = min(height / frame.shape[0], width / frame.shape[1])
    sides = [max(1, round(scale * side)) for side in frame.shape[:2]]
    small = np.asarray(resize_frames(frame, sides[0], sides[1]))
    top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    result = np.zeros((height, width, 3), np.uint8)
    result[top : top + small.shape[0], left : left + small.shape[1]] = small
    return result


def frames_at(part: AnyClip, fps: float) -> int:
    """Frames that a clip takes in a video of `fps` frames a second."""
    return max(1, round(part.seconds * fps)) if part.num_frames else 0


def paced(frames: Iterator[Picture], part: AnyClip, fps: float) -> Iterator[Picture]:
    """The clip's frames at another speed: repeated or left out, each time the one that is due."""
    if part.fps == fps:
        yield from frames
        return
    number = -1
    for wanted in range(frames_at(part, fps)):
        due = min(int((wanted + 0.5) * part.fps / fps), part.num_frames - 1)
        while number < due:
            current, number = next(frames), number + 1
        yield current


def sound_at(part: AnyClip, samples: int, rate: int) -> Tensor:
    """The clip's sound, [channels, samples] at `rate`; silence for one without and where it ends before."""
    if part.sound is None:
        return torch.zeros(1, samples)
    own = part.sound.span(part.start / part.fps, samples / rate)
    found = own.waveform if own.sample_rate == rate else resample(own.waveform, own.sample_rate, rate)
    return torch.nn.functional.pad(found, (0, samples - found.shape[1]))  # which also cuts
