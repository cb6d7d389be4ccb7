"""Pairs of videos, read in step and in chunks: memory stays bounded whatever their length and size."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memo_core.errors import VideoError
from memo_core.video.read import VideoInfo

from .. import media
from ..prepare.rows import Drop
from .crop import Crop

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
CHUNK_PIXELS, CHUNK_FRAMES = 2**21, 16  # 8 frames of 512x512
MAX_PIXELS = 8192 * 4320
MAX_GAP = 60  # seconds that one picture may stand
ASPECT = 0.05  # pictures whose aspects differ by more (as a logarithm) are not compared pixel by pixel


@dataclass(frozen=True)
class Pair:
    """A generated and a real video; `problem` says why they cannot be compared.

    crop: the part of the real pictures that is compared; None takes the whole.
    """

    name: str
    generated: Path | None
    real: Path | None
    problem: str = ""
    crop: Crop | None = None


def pair_videos(generated: Path, real: Path) -> list[Pair]:
    """Pairs two files, or the videos below two folders by their paths without suffix.

    Raises:
        VideoError: one is absent, one is a file and the other a folder, or a folder holds no video.
    """
    for path in (generated, real):
        if not path.exists():
            raise VideoError(f"{path} does not exist")
    if generated.is_file() != real.is_file():
        raise VideoError(f"{generated} and {real} must be two files or two folders")
    if generated.is_file():
        return [Pair(generated.stem, generated, real)]
    ours, theirs = _by_name(generated), _by_name(real)
    pairs = []
    for name in sorted(ours | theirs):
        mine, other = ours.get(name, []), theirs.get(name, [])
        if len(mine) > 1 or len(other) > 1:
            files = ", ".join(path.name for path in (mine if len(mine) > 1 else other))
            pairs.append(Pair(name, None, None, f"several videos of one name: {files}"))
        elif not mine or not other:
            where = generated if other else real
            pairs.append(Pair(name, next(iter(mine), None), next(iter(other), None), f"no such video in {where}"))
        else:
            pairs.append(Pair(name, mine[0], other[0]))
    return pairs


def _by_name(folder: Path) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    if not found:
        raise VideoError(f"{folder} holds no video ({', '.join(sorted(SUFFIXES))})")
    return dict(found)


@dataclass
class Chunk:
    """Consecutive frames of a pair, uint8 [N, 3, H, W] each; real ones may be of another size.

    start: number of the first frame. fps: of both.
    """

    generated: Tensor
    real: Tensor
    start: int
    fps: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def times(self) -> list[float]:
        """Seconds of the frames."""
        return [(self.start + i) / self.fps for i in range(len(self.generated))]

    def chosen(self, every: int) -> list[int]:
        """Indices into the chunk of every n-th frame of the video."""
        return list(range(-self.start % every, len(self.generated), every))

    @cached_property
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Both as float [N, 3, H, W] in [0, 1], the real ones scaled to the generated ones' size.

        Raises VideoError where the aspects differ.
        """
        height, width = self.generated.shape[2:]
        real = self.real.to(self.device).float() / 255
        if real.shape[2:] != (height, width):
            if abs(math.log(width / height / (real.shape[3] / real.shape[2]))) > ASPECT:
                sizes = f"{width}x{height} and {real.shape[3]}x{real.shape[2]}"
                raise VideoError(f"pictures of {sizes} have different aspects and cannot be compared")
            real = F.interpolate(real, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
        return self.generated.to(self.device).float() / 255, real


class PairReader:
    """Reads a pair in step, at `fps` or else the generated video's rate; of the real pictures the part `crop`.

    Raises VideoError if one of them cannot be opened; while iterating, where one is damaged.
    """

    def __init__(
        self, generated: Path, real: Path, device: torch.device, fps: float | None = None, crop: Crop | None = None
    ) -> None:
        self.paths, self.device, self.crop = (generated, real), device, crop
        self.generated, self.real = read_header(generated), read_header(real)
        self.fps = fps or self.generated.fps
        self.frames = 0  # read so far

    def chunks(self) -> Iterator[Chunk]:
        pixels = max(width * height for width, height in self.sizes)
        size = max(1, min(CHUNK_FRAMES, CHUNK_PIXELS // pixels))
        lengths = self.generated.duration, self.real.duration
        ours, theirs = (frames_at(path, self.fps, end) for path, end in zip(self.paths, lengths, strict=True))
        if self.crop is not None:
            theirs = map(self.crop.cut, theirs)
        parts: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        for frames in zip(ours, theirs, strict=False):
            parts.append(frames)
            if len(parts) == size:
                yield self._chunk(parts)
                parts = []
        if parts:
            yield self._chunk(parts)
        if not self.frames:
            raise VideoError(f"{' or '.join(path.name for path in self.paths)} has no frames")

    def _chunk(self, parts: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Chunk:
        generated, real = (stack([pair[side] for pair in parts]) for side in (0, 1))
        self.frames += len(parts)
        return Chunk(generated, real, self.frames - len(parts), self.fps, self.device)

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of the generated and of the real pictures that are compared."""
        real = self.real if self.crop is None else self.crop
        return (self.generated.width, self.generated.height), (real.width, real.height)

    def note(self) -> str:
        """In words, how the two differ; after reading."""
        notes = []
        if max(abs(info.fps - self.fps) for info in (self.generated, self.real)) > 0.01:
            notes.append(f"{self.generated.fps:g} and {self.real.fps:g} fps, compared at {self.fps:g}")
        if self.crop is not None:
            notes.append(f"of the real {self.real.width}x{self.real.height} pixels {self.crop}")
        sizes = [f"{width}x{height}" for width, height in self.sizes]
        if sizes[0] != sizes[1]:
            notes.append(f"{sizes[0]} and {sizes[1]} pixels")
        longest = max(round(info.duration * self.fps) for info in (self.generated, self.real))
        if self.frames < longest:
            notes.append(f"compared the first {self.frames} of {longest} frames")
        return "; ".join(notes)


def frames_at(path: Path, fps: float, seconds: float | None = None) -> Iterator[NDArray[np.uint8]]:
    """Frames of a video, uint8 [H, W, 3], at an even rate: each the one nearest in time, by the file's time stamps.

    Time 0 is where the file begins, with sound or picture; `seconds` is when the picture ends (`read_header`).

    Raises VideoError if the file cannot be opened, is damaged, or tells no rate.
    """
    if seconds is None:
        seconds = read_header(path).duration
    with video_errors(path):
        yield from media.at_rate(path, 0.0, seconds, fps, MAX_PIXELS)


def stack(frames: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 [N, 3, H, W]; VideoError where the sizes differ."""
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError("the frames change their size within the video")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def read_header(path: Path) -> VideoInfo:
    """What a video holds, by its packets, without decoding; `duration` is from the file's beginning to the picture's
    end. VideoError for one that cannot be measured: no rate, too large pictures, hours without one, cut off.
    """
    with video_errors(path), media.opened(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or math.nan)
        if not 0.1 <= fps <= 1000:  # also refuses NaN
            raise VideoError(f"{path.name} claims {fps:g} frames a second; allowed is 0.1 to 1000")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise VideoError(f"{path.name} has pictures of {width}x{height}; as many pixels as 8192x4320 are allowed")
        zero = (container.start_time or 0) / 1_000_000
        frames, times = 0, array("d")
        for packet in container.demux(stream):
            frames += packet.size > 0
            if packet.size and packet.pts is not None and not packet.is_discard:
                times.append(float(packet.pts * packet.time_base) - zero)
        shown = np.sort(np.append(times, 0.0))
        if len(shown) > 1 and (gap := float(np.diff(shown).max())) > MAX_GAP:
            raise VideoError(f"{path.name} has no picture for {gap:.0f} s; at most {MAX_GAP} s are allowed")
        if frames < stream.frames:
            raise VideoError(f"{path.name} is cut off: it holds {frames} of {stream.frames} frames")
        seconds = float(shown[-1]) + 1 / fps if times else frames / fps
        return VideoInfo(frames, seconds, None, width, height, fps, {})


@contextmanager
def video_errors(path: Path) -> Iterator[None]:
    """What `media` says of a file, as a VideoError."""
    try:
        yield
    except Drop as error:
        raise VideoError(f"{path.name}: {error}") from error
