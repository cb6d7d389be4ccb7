"""Recordings as arrays and tensors: read, checked, made mono, resampled."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import shown
from ..errors import AudioError
from ..release import SAMPLE_RATE
from .recording import MAX_CHANNELS, MAX_RATE, MAX_SECONDS, Recording, too_long

_MAX_PEAK = 1e6
_INTEGER_SCALES = {torch.uint8: (128.0, 128.0), torch.int16: (0.0, 2.0**15), torch.int32: (0.0, 2.0**31)}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_audio(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Reads the first audio stream of any file that PyAV opens (wav, mp3, flac, m4a, the sound of a video, ...).

    Samples lie at their times in the file: see `inputs.recording.Recording`, which also reads it piece by piece.

    Returns:
        waveform [channels, T] float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        AudioError: the file is absent, cannot be decoded, has no sound, is longer than MAX_SECONDS or larger than
            media.MAX_BYTES.
    """
    recording = Recording(path)
    return recording.read(), recording.sample_rate


def prepare_waveform(waveform: Tensor | np.ndarray, sample_rate: float) -> Tensor:
    """Checks a recording and makes it mono at 16 kHz.

    Channels are averaged, then resampled as librosa.load, the released loader, does by default: `soxr_hq`. (The
    released script has ffmpeg resample the file to 16 kHz and 16 bits first, so that its own numbers depend on the
    ffmpeg at hand.)

    Args:
        waveform: [T] or [channels, T], at most 64 channels. Floating point (about in [-1, 1]; louder is allowed up to a
            peak of 1e6, because what follows normalises), or int16, int32, uint8, which are scaled to [-1, 1].
        sample_rate: in Hz, above 0 and at most 768,000.

    Returns:
        [T at 16 kHz] float32 on the CPU, at least one sample.

    Raises:
        AudioError: wrong shape or number format, no samples, samples that are not finite, a rate out of
            range, more than MAX_SECONDS.
    """
    rate = check_rate(sample_rate)
    mono = to_mono(as_channels(waveform), rate)
    return mono if rate == SAMPLE_RATE else resample(mono, rate, SAMPLE_RATE)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor or array of one."""
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def check_rate(sample_rate: Any) -> float:
    """A sample rate in Hz; AudioError for what is none."""
    if not is_number(sample_rate) or not 0 < sample_rate <= MAX_RATE:
        raise AudioError(
            f"the sample rate is {shown(sample_rate)}; it must be a number of Hz above 0, at most {MAX_RATE}"
        )
    return float(sample_rate)


def as_channels(waveform: Any) -> Tensor:
    """Checks shape and number format; returns [channels, T] on the CPU."""
    if not isinstance(waveform, Tensor):
        try:
            waveform = torch.from_numpy(np.ascontiguousarray(waveform))
        except (TypeError, ValueError) as error:
            raise AudioError(
                f"the waveform is a {type(waveform).__name__} and no tensor of numbers ({error})"
            ) from error
    if waveform.is_meta or waveform.layout != torch.strided or waveform.is_quantized:
        kind = "meta" if waveform.is_meta else str(waveform.layout)
        raise AudioError(f"the waveform is a {kind} tensor, which holds no samples one after the other")
    waveform = waveform.detach().cpu()
    shape = tuple(waveform.shape)
    if waveform.dtype not in _FLOATS and waveform.dtype not in _INTEGER_SCALES:
        raise AudioError(f"samples are {waveform.dtype}; floating point, int16, int32 and uint8 are understood")
    if waveform.ndim not in (1, 2):
        raise AudioError(f"the waveform has shape {shape}; [samples] or [channels, samples] is expected")
    if waveform.numel() == 0:
        raise AudioError(f"the waveform is empty, its shape is {shape}")
    if waveform.ndim == 2 and shape[0] > MAX_CHANNELS:
        raise AudioError(
            f"the waveform has shape {shape}, that is {shape[0]} channels and at most {MAX_CHANNELS} are allowed; "
            "[channels, samples] is expected, should it be transposed?"
        )
    return waveform.reshape(-1, shape[-1])


def to_float(samples: Tensor) -> Tensor:
    """A float32 copy; integers are scaled to [-1, 1]."""
    offset, scale = _INTEGER_SCALES.get(samples.dtype, (0.0, 1.0))
    return samples.to(torch.float32, copy=True).sub_(offset).div_(scale)


def to_mono(channels: Tensor, rate: float) -> Tensor:
    """Averages the channels and checks length and values; [channels, T] -> [T] float32."""
    seconds = channels.shape[1] / rate
    if seconds > MAX_SECONDS:
        raise too_long(seconds)
    # One channel after the other: an hour of 16-bit stereo would double in size if converted at once.
    mono = to_float(channels[0])
    for channel in channels[1:]:
        mono += to_float(channel)
    mono /= len(channels)
    finite = torch.isfinite(mono)
    if not finite.all():
        bad = int(len(mono) - finite.sum())
        first = int(finite.to(torch.uint8).argmin()) / rate
        raise AudioError(f"{bad} of {len(mono)} samples are not finite numbers, the first at {first:.3f} s")
    peak = max(abs(float(value)) for value in mono.aminmax())
    if peak > _MAX_PEAK:
        raise AudioError(f"the loudest sample is {peak:.3g}; samples are expected in [-1, 1]")
    return mono


def resample(samples: Tensor, rate: float, target: float) -> Tensor:
    """[..., T] at `rate` Hz -> [..., T * target / rate], float32 on the CPU (soxr_hq).

    The samples that librosa.resample makes.

    Raises:
        AudioError: samples that are not finite.
    """
    import soxr

    if rate == target:
        return samples.to(torch.float32, copy=True)
    if not samples.isfinite().all():
        raise AudioError("samples of the recording are not finite numbers")
    made = np.apply_along_axis(soxr.resample, -1, samples.numpy(), rate, target, "soxr_hq")
    wanted = math.ceil(samples.shape[-1] * (float(target) / rate))
    result = torch.zeros(*samples.shape[:-1], wanted)
    count = min(wanted, made.shape[-1])
    result[..., :count] = torch.from_numpy(made[..., :count])
    return result
