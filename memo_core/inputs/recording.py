"""Sound and video files as they come: opened so that they can name no other file, decoded as a stream.

A file is read through a Python file object, and FFmpeg may open nothing besides: a playlist that calls itself
`voice.wav` reads no sibling, a name such as `http:host` opens no connection, and `10:30.wav` is a name like any other.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import AudioError
from ..files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SECONDS = 3 * 3600  # a longer recording is refused: at 16 kHz three hours are 0.7 GB
MAX_BYTES = 4 * 2**30  # of decoded samples at their own rate, as `Recording.read` gives them
MAX_CHANNELS = 64
MAX_RATE = 768_000  # Hz, twice what any converter makes
GAP = 0.05  # seconds by which time stamps and samples may differ before sound is moved to its time
_LONGEST_HOLE = 600.0  # seconds without sound, in a file that does not say how long it is
_LONGEST_OVERLAP = 5.0  # seconds; what jumps back further begins anew, as in recordings that were joined
_NOTHING = {"protocol_whitelist": "none"}  # of FFmpeg's protocols, `file` among them
_PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"<?xml", b"v=0")  # how files begin that name others
# What PyAV may raise besides, where it does not understand what a damaged file makes FFmpeg say.
_CONFUSED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BLOCK = 10  # seconds of silence that are made at once


@contextmanager
def open_media(path: str | os.PathLike[str]) -> Iterator[Any]:
    """PyAV's container of a regular file. Raises OSError, or whatever FFmpeg finds wrong with it (`av.FFmpegError`)."""
    import av

    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise OSError("it is empty")
        try:
            # PyAV 19 reads any tag and no longer knows the argument.
            tags: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
            container = av.open(_Source(file), "r", container_options=_NOTHING, **tags)
        except (av.FFmpegError, OSError) as error:
            file.seek(0)
            if file.read(8).startswith(_PLAYLISTS):
                raise OSError("it is a list that names other files; give the recording itself") from error
            raise
        with container:
            yield container


class _Source:
    """What PyAV asks of a file. A place that does not exist, which damaged files name, is no exception: PyAV would
    print it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name, self.read, self.tell, self._file = os.fspath(file.name), file.read, file.tell, file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1


def reason(error: BaseException) -> str:
    """What went wrong, without the name of the file."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Recording:
    """The first audio stream of any file that PyAV opens (wav, mp3, flac, m4a, the sound of a video, ...).

    Nothing of it is held: every call decodes the file again. Samples lie at the times that the file gives them, so that
    they stay in step with its picture: holes become silence, of what overlaps the first is kept. Where rate or channels
    change on the way, what follows is converted. Damaged packets are left out; a log line counts them.

    Args:
        path: of a regular file.

    Attributes:
        sample_rate: in Hz, of the first sample.
        channels: of the first sample.
        declared: seconds that the file says it lasts, 0 where it does not.

    Raises:
        AudioError: the file is absent, cannot be decoded, has no sound, or is longer than MAX_SECONDS.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.sample_rate = self.channels = 0
        self.declared = 0.0
        self._num_samples: int | None = None  # known after the first complete pass
        self._warned = False
        next(self.blocks(), None)  # its first samples say what it is

    @property
    def num_samples(self) -> int:
        """How many there are; decodes it for that where nothing has yet."""
        if self._num_samples is None:
            for _ in self.blocks():
                pass
        assert self._num_samples is not None
        return self._num_samples

    @property
    def seconds(self) -> float:
        """How long it is; decodes it for that where nothing has yet."""
        return self.num_samples / self.sample_rate

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Decodes; yields [channels, samples] float32, about in [-1, 1], one after the other without gaps."""
        import av

        try:
            yield from self._blocks()
        except AudioError:
            raise
        except MemoryError as error:
            raise AudioError(f"{self.path} takes more memory than there is") from error
        except av.FFmpegError as error:
            raise AudioError(f"{self.path} cannot be decoded: {reason(error)}") from error
        except OSError as error:
            raise AudioError(f"{self.path} cannot be read: {reason(error)}") from error

    def span(self, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """As `blocks`, of the samples from `start` up to `stop`."""
        end = 0
        for block in self.blocks():
            first, end = end, end + block.shape[1]
            if end > start:
                yield block[:, max(0, start - first) : stop - first]
            if end >= stop:
                return

    def read(self) -> Tensor:
        """All of it at its own rate, [channels, T] float32; AudioError where that is more than MAX_BYTES, or memory."""
        import torch

        samples = _Growing(self.channels, self.declared * self.sample_rate)
        for block in self.blocks():
            if (samples.filled + block.shape[1]) * self.channels * 4 > MAX_BYTES:
                raise AudioError(
                    f"{self.path} holds more than {MAX_BYTES / 2**30:g} GiB of sound at {self.sample_rate} Hz in "
                    f"{self.channels} channels: make it mono at 16 kHz, or cut it"
                )
            samples.append(block)
        return torch.from_numpy(samples.all())

    def mono(self, rate: int) -> Tensor:
        """All of it as one channel at `rate` Hz, [T] float32: channels are averaged, then resampled (soxr_hq).

        The same samples as `inputs.sound.prepare_waveform` makes of `read`, without holding that.
        """
        import soxr
        import torch

        samples = _Growing(1, self.declared * rate)
        stream = None if rate == self.sample_rate else soxr.ResampleStream(self.sample_rate, rate, 1, quality="HQ")
        count = 0
        for block in self.blocks():
            total = block[0].copy()
            for channel in block[1:]:
                total += channel
            total /= len(block)
            if not np.isfinite(total).all():
                first = (count + int(np.isfinite(total).argmin())) / self.sample_rate
                raise AudioError(f"samples of {self.path} are not finite numbers, the first at {first:.3f} s")
            count += len(total)
            samples.append((total if stream is None else stream.resample_chunk(total))[None])
        if stream is not None:
            samples.append(stream.resample_chunk(np.zeros(0, np.float32), last=True)[None])
            wanted = math.ceil(count * rate / self.sample_rate)
            samples.append(np.zeros((1, max(0, wanted - samples.filled)), np.float32))
            samples.filled = wanted
        return torch.from_numpy(samples.all()[0])

    def _blocks(self) -> Iterator[NDArray[np.float32]]:
        put = end = 0  # where the next decoded sample belongs, and how many were handed over
        shift, damage = 0, Damage()
        with open_media(self.path) as container:
            self._check(container)
            zero = (container.start_time or 0) / 1_000_000
            for time, rate, samples in sound_pieces(container, damage):
                samples = self._as_channels(samples, rate)
                if time is not None:
                    place = round((time - zero) * self.sample_rate) - shift
                    moved = (place - put) / self.sample_rate
                    if abs(moved) > GAP:
                        if self._is_believed(moved, place):
                            put = place
                        else:  # the clock began anew: what follows goes on here
                            shift += place - put
                if put > MAX_SECONDS * self.sample_rate:
                    raise too_long(put / self.sample_rate)
                while end < put:
                    silence = min(put - end, _BLOCK * self.sample_rate)
                    yield np.zeros((self.channels, silence), np.float32)
                    end += silence
                fresh = samples[:, end - put :]
                put += samples.shape[1]
                if fresh.shape[1]:
                    yield fresh
                    end += fresh.shape[1]
        if not end:
            raise AudioError(f"{self.path} holds no audio samples{damage}")
        if damage.packets and not self._warned:
            count = f"{damage.packets} packet{'s' * (damage.packets > 1)}"
            logger.warning("%s is damaged: %s of sound left out", self.path, count)
            self._warned = True
        self._num_samples = end

    def _check(self, container: Any) -> None:
        if not container.streams.audio:
            raise AudioError(f"{self.path} has no audio stream")
        if container.streams.audio[0].codec_context is None:
            raise AudioError(f"the sound of {self.path} is coded in a way that FFmpeg does not know")
        self.declared = max(0, container.duration or 0) / 1_000_000
        if self.declared > MAX_SECONDS:
            raise too_long(self.declared)

    def _is_believed(self, moved: float, place: int) -> bool:
        """Whether a jump of so many seconds in the time stamps is a hole or an overlap, and no other clock."""
        if moved > 0:
            return place <= (self.declared + 1) * self.sample_rate if self.declared else moved <= _LONGEST_HOLE
        return -moved <= _LONGEST_OVERLAP and place > GAP * self.sample_rate

    def _as_channels(self, samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
        if not self.sample_rate:
            self.sample_rate, self.channels = rate, len(samples)
            if rate > MAX_RATE or len(samples) > MAX_CHANNELS:
                raise AudioError(
                    f"{self.path} has {len(samples)} channels of {rate} samples a second; up to {MAX_CHANNELS} of "
                    f"{MAX_RATE} are read"
                )
        if len(samples) == self.channels:
            return samples
        return np.broadcast_to(samples.mean(axis=0, keepdims=True), (self.channels, samples.shape[1]))


class Damage:
    """Packets that could not be decoded: how many, and what was said of the first."""

    packets = 0
    first: BaseException | None = None

    def add(self, error: BaseException) -> None:
        """Counts a packet."""
        self.packets, self.first = self.packets + 1, self.first or error

    def __str__(self) -> str:
        return "" if self.first is None else f": {reason(self.first)}"


def sound_pieces(
    container: Any, damage: Damage, rate: int | None = None
) -> Iterator[tuple[float | None, int, NDArray[np.float32]]]:
    """Decodes the first audio stream of a container, from where it stands.

    Args:
        damage: counts what is left out.
        rate: in Hz; None for that of the first sample.

    Yields:
        The time in the container, in seconds, where it is known; the rate; samples [channels, T]. Where rate or layout
        change on the way, the rate stays, and the number of channels changes.
    """
    import av

    converter: av.AudioResampler | None = None
    kind, target = None, rate or 0
    for frame in _frames(container, damage):
        if not frame.samples or not frame.sample_rate:
            continue
        target = target or frame.sample_rate
        found = (frame.sample_rate, frame.layout.name, frame.format.name)
        if converter is None or kind != found:
            if converter is not None:
                yield from ((None, target, _channels(rest)) for rest in converter.resample(None))
            # Channels are kept: FFmpeg's own mixing makes the sum of two equal ones louder.
            converter, kind = av.AudioResampler(format="flt", layout=frame.layout, rate=target), found
        pieces = converter.resample(frame)
        yield frame.time, target, np.empty((frame.layout.nb_channels, 0), np.float32)  # also where no piece comes yet
        yield from ((None, target, _channels(piece)) for piece in pieces)
    if converter is not None:
        yield from ((None, target, _channels(rest)) for rest in converter.resample(None))


def _channels(frame: Any) -> NDArray[np.float32]:
    """[channels, T] of a frame of packed floats: of eight planes and more PyAV counts one that is not there."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _frames(container: Any, damage: Damage) -> Iterator[Any]:
    """Decoded frames of the first audio stream, without what is damaged."""
    import av

    packets = container.demux(container.streams.audio[0])
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:  # nothing can be read behind this
            damage.add(error)
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except (av.FFmpegError, *_CONFUSED) as error:
            damage.add(error)
            continue
        yield from frames


class _Growing:
    """Samples [channels, T] that come one after the other. Room that is never filled costs no memory: the system gives
    pages when they are written.
    """

    def __init__(self, channels: int, expected: float) -> None:
        expected = min(expected, MAX_BYTES / 4 / channels)  # whatever the file claims
        try:
            self._samples = np.empty((channels, int(expected) + 65536), np.float32)
        except MemoryError:
            self._samples = np.empty((channels, 65536), np.float32)
        self.filled = 0

    def append(self, samples: NDArray[np.float32]) -> None:
        end = self.filled + samples.shape[1]
        if end > self._samples.shape[1]:
            try:
                room = np.empty((len(self._samples), end + self._samples.shape[1] // 2), np.float32)
            except MemoryError as error:
                raise AudioError(f"the recording takes more memory than there is, {self.filled} samples fit") from error
            room[:, : self.filled] = self._samples[:, : self.filled]
            self._samples = room
        self._samples[:, self.filled : end] = samples
        self.filled = end

    def all(self) -> NDArray[np.float32]:
        return self._samples[:, : self.filled]


def too_long(seconds: float) -> AudioError:
    """What is said of a recording that lasts more than MAX_SECONDS."""
    return AudioError(
        f"the recording lasts {seconds:.0f} s; "
        f"at most {MAX_SECONDS} s ({MAX_SECONDS / 3600:g} hours) are allowed, cut it"
    )
