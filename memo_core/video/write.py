"""Writes video as a stream, frame by frame: H.264 and AAC in MP4, through PyAV.

Memory stays constant whatever the length: frames are encoded as they come, sound follows the picture, and packets go to
the file in the order of their time. A file appears under its final name only when it is whole.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import ArrayLike, NDArray

from ..checks import number, shown, whole
from ..errors import VideoError
from ..files import Unfinished
from ..inputs.recording import reason
from .read import BT709, LIMITED_RANGE, probe

# Other rates are resampled to 48 kHz: every player takes it, and one AAC packet (1024 samples, the grain in which sound
# can end) is then shorter than a frame at 30 fps; at 16 kHz it would be twice as long.
AAC_RATES = (44100, 48000)
_X264 = {"crf": "17", "preset": "medium"}
ENCODER_THREADS = 4  # x264 codes the same pictures to the same bytes only where their number is the same
_Result = TypeVar("_Result")


def ai_statement(metadata: Mapping[str, Any]) -> str:
    """One sentence: made by AI, with which model and seed (`metadata["model"]` and `metadata["seed"]`)."""
    model, seed = metadata.get("model", "not stated"), metadata.get("seed", "not stated")
    return f"This video was made by AI (artificial intelligence): MEMO talking video, model {model}, seed {seed}."


class VideoWriter:
    """Writes one MP4 file: H.264 (yuv420p, BT.709) and, when `sample_rate` is given, AAC stereo.

    The file is written under a temporary name beside `path` and renamed by `finish`, which leaving the `with` block
    calls. When the block is left by an exception the temporary file is removed, unless `finish(partial=True)` was
    called before: that closes what was written so far into a playable file, for example after Ctrl-C.

    Sound may be written at any time, before, between or after the frames; the writer encodes it up to the picture's
    time. At the end sound that is too long is cut and sound that is too short is filled with silence, so that both last
    equally long.

    Args:
        path: the final file, ending in .mp4 or .m4v, in a folder that exists.
        width, height: pixels, even (H.264 halves the colour planes).
        fps: frames per second.
        sample_rate: of the sound in Hz; None for a silent video. Others than 44100 and 48000 are resampled to 48000.
        metadata: tags of the file. Strings are kept, everything else is written as JSON, so a whole workflow fits.
            `description` and, unless given, `comment` say in words that the video was made by AI (`ai_statement`).
        made_by_ai: whether to say so; False for pictures that a camera took.

    Raises:
        VideoError: sizes, rates or path cannot be used, PyAV has no H.264 encoder, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: float,
        sample_rate: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        made_by_ai: bool = True,
    ) -> None:
        try:
            self.path = Path(os.fsdecode(path))
        except TypeError as error:
            raise VideoError(f"{shown(path)} is no path") from error
        self.width, self.height, self.made_by_ai = width, height, made_by_ai
        self.frames_written = 0
        _check_size(width, height)
        if not isinstance(fps, Fraction) and number(fps, 0.01, 1000) is None or not 0.01 <= fps <= 1000:
            raise VideoError(f"fps is {shown(fps)}; allowed is 0.01 to 1000")
        if isinstance(sample_rate, float) and sample_rate.is_integer():
            sample_rate = int(sample_rate)
        if sample_rate is not None and whole(sample_rate, 1, 768_000) is None:
            raise VideoError(f"sample_rate is {shown(sample_rate)} Hz; allowed is 1 to 768000, or None for no sound")
        if self.path.suffix.lower() not in (".mp4", ".m4v"):
            raise VideoError(f"{self.path.name!r} does not end in .mp4; only MP4 is written")
        if not os.path.isdir(self.path.parent):
            raise VideoError(f"cannot write {self.path}: there is no folder {self.path.parent}")
        if os.path.isdir(self.path):
            raise VideoError(f"cannot write {self.path}: it is a folder")
        self.fps = Fraction(fps).limit_denominator(1001)  # 29.97 stays 2997/100, 30000/1001 is met exactly
        self.sample_rate = sample_rate
        self._rate = sample_rate or 0  # as a number, where there may be no sound
        self._sound: deque[NDArray[np.float32] | Iterator[ArrayLike]] = deque()  # [2, T], not encoded yet
        self._samples_written = 0
        self._to_yuv: Any = VideoReformatter()  # one for all frames: setting it up costs more than a small frame
        self._file: Any = None
        self._video: Any = None
        self._audio: Any = None
        self._open = True
        # What went wrong before: FFmpeg crashes when it is to go on with a file that it could not begin.
        self._broken: VideoError | None = None
        try:
            self._unfinished = Unfinished(self.path)
        except (OSError, ValueError) as error:
            raise VideoError(f"cannot write {self.path}: {reason(error)}") from error
        # PyAV runs in one thread of its own: Ctrl-C then interrupts the waiting caller, never a packet halfway into the
        # file, and the file can still be closed properly.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="video-writer")
        self._begun: Future[Any] | None = None
        try:
            self._run(lambda: self._start(dict(metadata or {})))
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if error is None:
            self.finish()
        else:
            self.discard()

    def write_frames(self, frames: ArrayLike, wait: bool = True) -> None:
        """Encodes frames: uint8 [N, H, W, 3] or [H, W, 3], RGB in [0, 255], an array or a CPU tensor.

        Args:
            wait: until they are encoded; else only until those of the call before are, and what goes wrong with these
                is said by the next call. They must not be changed before.

        Raises VideoError for another shape or type, or when the file cannot be written.
        """
        pixels = np.asarray(frames)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3:] != (self.height, self.width, 3):
            raise VideoError(
                f"frames are {pixels.dtype} {list(pixels.shape)}; allowed is uint8 [N, {self.height}, {self.width}, 3] "
                f"or [{self.height}, {self.width}, 3]"
            )
        self._check_open()
        self._run(lambda: self._encode_frames(pixels.reshape(-1, self.height, self.width, 3)), wait)

    def write_audio(self, waveform: ArrayLike | Iterator[ArrayLike]) -> None:
        """Adds sound after what was added before: float [T] or [C, T] in [-1, 1] (louder is clipped).

        An array, a CPU tensor, or an iterator over such, which is asked for the next one when the picture has come that
        far. One channel plays on both sides, two are left and right, more are averaged. An array is not copied before
        it is encoded: do not change it.

        Raises VideoError for another shape or type, or samples that are not finite; for those of an iterator, and
        whatever it raises itself, while frames are written.
        """
        if self.sample_rate is None:
            raise VideoError("sound for a video that was opened without a sample_rate; give one to VideoWriter")
        self._check_open()
        self._sound.append(waveform if isinstance(waveform, Iterator) else _as_stereo(waveform))

    def finish(self, partial: bool = False) -> Path | None:
        """Ends both streams, moves the index to the front and gives the file its final name.

        Args:
            partial: close what there is, for example after Ctrl-C; without a single frame no file is made.

        Returns:
            The final path; None if `partial` and nothing was written.

        Raises:
            VideoError: no frames were written, or the file could not be written whole; then no file appears under the
                final name, and an older one of that name stays as it was.
        """
        self._check_open()
        if self._broken is not None:
            self.discard()
            raise self._broken
        try:
            written = self._run(self._close_file)
        except BaseException:
            self.discard()
            raise
        if not written:
            self.discard()
            if partial:
                return None
            raise VideoError(f"no frames were written to {self.path.name}; a video needs at least one")
        self._open = False
        self._thread.shutdown()
        return self.path

    def discard(self) -> None:
        """Stops writing and removes the temporary file; nothing appears under the final name."""
        if not self._open:
            return
        self._open = False
        self._thread.submit(self._abandon).exception()  # its errors no longer matter: the file goes away
        self._thread.shutdown()
        self._unfinished.discard()

    def _check_open(self) -> None:
        if not self._open:
            raise VideoError(f"{self.path.name} is already closed; open another VideoWriter")

    def _run(self, work: Callable[[], _Result], wait: bool = True) -> _Result | None:
        """Runs `work` in the writer's thread and waits, for what was begun before at least; errors of FFmpeg and of the
        system become VideoError.
        """
        try:
            if self._begun is not None:
                self._begun.result()  # an interrupt here leaves it to the next call
                self._begun = None
            future = self._thread.submit(work)
            if not wait:
                self._begun = future
                return None
            return future.result()
        except (av.FFmpegError, OSError) as error:
            self._broken = VideoError(f"cannot write {self.path}: {reason(error)}")
            raise self._broken from error

    # Below here everything runs in the writer's thread.

    def _start(self, metadata: dict[str, Any]) -> None:
        encoder = _h264_encoder(self.width, self.height)
        # "file:" before a whole path: or a colon in its name would make it an address. "use_metadata_tags" keeps keys
        # of any name; "faststart" puts the index first, so that players start at once.
        address = f"file:{self._unfinished.temporary.absolute()}"
        self._file = av.open(address, "w", format="mp4", options={"movflags": "faststart+use_metadata_tags"})
        tags = metadata
        if self.made_by_ai:
            statement = ai_statement(metadata)
            tags = {"comment": statement} | metadata | {"description": statement}
        for key, value in tags.items():
            self._file.metadata[str(key)] = value if isinstance(value, str) else json.dumps(value, default=str)
        quality = _X264 | _without_avx512() if encoder == "libx264" else {}
        self._video = self._file.add_stream(encoder, rate=self.fps, options=quality)
        context = self._video.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        context.thread_type, context.thread_count = "FRAME", ENCODER_THREADS
        if not quality:  # other encoders have no constant quality in common: 0.2 bits a pixel is generous
            context.bit_rate = int(0.2 * self.width * self.height * self.fps)
        if self.sample_rate is not None:
            rate = self.sample_rate if self.sample_rate in AAC_RATES else 48000
            self._audio = self._file.add_stream("aac", rate=rate, layout="stereo")
            self._audio.codec_context.bit_rate = 160_000

    def _encode_frames(self, frames: NDArray[np.uint8]) -> None:
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame = self._to_yuv.reformat(frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = self.frames_written, 1 / self.fps
            self.frames_written += 1
            self._file.mux(self._video.encode(frame))
            self._encode_sound()

    def _encode_sound(self) -> None:
        """Encodes waiting sound up to the end of the last frame."""
        while self._sound and (room := self._samples_due() - self._samples_written) > 0:
            samples = self._sound.popleft()
            if isinstance(samples, Iterator):
                piece = next(samples, None)
                if piece is not None:
                    self._sound.extendleft((samples, _as_stereo(piece)))
                continue
            if samples.shape[1] > room:
                self._sound.appendleft(samples[:, room:])
            self._encode_samples(samples[:, :room])

    def _samples_due(self) -> int:
        return round(self.frames_written * self._rate / self.fps)

    def _encode_samples(self, samples: NDArray[np.floating]) -> None:
        if samples.shape[1] == 0:
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.clip(-1, 1)), "fltp", "stereo")
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._samples_written
        self._samples_written += samples.shape[1]
        self._file.mux(self._audio.encode(frame))

    def _close_file(self) -> bool:
        """Flushes the encoders and closes the file; False if it holds no frame."""
        if not self.frames_written:
            return False
        if self._audio is not None:
            self._encode_sound()
            while (missing := self._samples_due() - self._samples_written) > 0:  # a second at a time: it may be an hour
                self._encode_samples(np.zeros((2, min(missing, self._rate)), np.float32))
        self._file.mux(self._video.encode(None))
        if self._audio is not None:
            self._file.mux(self._audio.encode(None))
        self._file.close()
        self._close_sources()
        found = probe(self._unfinished.temporary).frames
        if found != self.frames_written:
            raise VideoError(f"{self.path} holds {found} of {self.frames_written} frames; is the disk full?")
        self._unfinished.finish(self.path)
        return True

    def _close_sources(self) -> None:
        """Lets go of the files that iterators read."""
        for source in self._sound:
            if isinstance(source, Generator):
                source.close()
        self._sound.clear()

    def _abandon(self) -> None:
        self._close_sources()
        if self._file is not None:
            self._file.close()


def _as_stereo(waveform: ArrayLike) -> NDArray[np.float32]:
    """[T] or [C, T] -> [2, T]; VideoError for what is no sound."""
    samples = np.asarray(waveform)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating) or 0 in samples.shape[:-1]:
        raise VideoError(f"sound is {samples.dtype} {list(samples.shape)}; allowed is float [T] or [C, T]")
    if not np.isfinite(samples).all():
        raise VideoError("sound holds NaN or infinite samples; allowed is [-1, 1]")
    channels = np.atleast_2d(samples.astype(np.float32, copy=False))
    if len(channels) > 2:
        channels = channels.mean(0, keepdims=True)
    return np.broadcast_to(channels, (2, channels.shape[-1]))


def _check_size(width: int, height: int) -> None:
    if whole(width) is None or whole(height) is None:
        raise VideoError(f"the frame is {shown(width)} x {shown(height)} (width x height); whole numbers are allowed")
    if min(width, height) < 2 or max(width, height) > 16384:
        raise VideoError(f"the frame is {width}x{height} (width x height); allowed is 2 to 16384 pixels a side")
    if width % 2 or height % 2:

        def even(value: int) -> tuple[int, ...]:
            return (value,) if value % 2 == 0 else (value - 1, value + 1)

        near = " or ".join(f"{w}x{h}" for w in even(width) for h in even(height) if w and h)
        raise VideoError(f"the frame is {width}x{height} (width x height); H.264 wants even sizes, nearest are {near}")


def _without_avx512() -> dict[str, str]:
    """An option for x264, whose AVX-512 code reads memory that nobody wrote: small pictures then come out as other
    bytes at every run.
    """
    import torch

    # Only where AVX-512 is there may x264 be told to use AVX2: it does not ask the processor again.
    return {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


def _h264_encoder(width: int, height: int) -> str:
    """Name of the first H.264 encoder that opens here at this size: libx264 if PyAV has it, then any other.

    Hardware encoders are often compiled in without the hardware being there, so each is really opened.
    """
    names = sorted((name for name in av.codecs_available if "264" in name), key=lambda name: (name != "libx264", name))
    problems = []
    for name in names:
        try:
            codec = av.Codec(name, "w")
        except ValueError:  # only decodes
            continue
        if "yuv420p" not in {format.name for format in codec.video_formats or ()}:
            continue
        try:
            context: Any = av.CodecContext.create(codec, "w")  # of which PyAV's types do not know that it is a video's
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base, context.framerate = Fraction(1, 30), Fraction(30)
            context.open()
        except (av.FFmpegError, OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        return name
    raise VideoError(
        f"PyAV {av.__version__} has no H.264 encoder that works here ({'; '.join(problems) or 'none compiled in'}); "
        "install PyAV from PyPI (pip install av), which brings libx264"
    )
