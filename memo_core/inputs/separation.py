"""The voice without what plays behind it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from .sound import as_channels, check_rate, load_audio, resample, to_float, to_mono

_SEPARATOR_RATE = 44100
_SEPARATOR_LOG_LEVEL = 30  # warnings
# How Kim_Vocal_2 was trained; the package would otherwise fetch a list of all models from the internet to find this.
_SEPARATOR_SETTINGS = {
    "compensate": 1.009,
    "mdx_dim_f_set": 3072,
    "mdx_dim_t_set": 8,
    "mdx_n_fft_scale_set": 6144,
    "primary_stem": "Vocals",
}
_SEPARATOR_LISTS = (
    "vr_download_list",
    "mdx_download_vip_list",
    "demucs_download_list",
    "mdx23c_download_list",
    "mdx23c_download_vip_list",
    "roformer_download_list",
    "other_network_list",
)


def separate_vocals(waveform: Tensor | np.ndarray, sample_rate: float, model: str | Path) -> tuple[Tensor, int]:
    """Removes music and noise around a voice with the optional audio-separator package. Nothing is downloaded.

    Args:
        waveform: [T] or [channels, T]; see `prepare_waveform` for formats.
        sample_rate: in Hz.
        model: the released misc/vocal_separator/Kim_Vocal_2.onnx.

    Returns:
        the voice alone, [2, T] float32, as long as what was given, and its sample rate (44100 Hz).

    Raises:
        AudioError: the package or the model is absent (the message says how to get it), a bad recording, or the package
            fails.
    """
    model = Path(model)
    rate = check_rate(sample_rate)
    waveform = as_channels(waveform)
    if not model.is_file():
        raise AudioError(f"{model} does not exist; it comes with the released weights (memo download)")
    try:
        from audio_separator.separator import Separator
    except ImportError as error:
        raise AudioError(
            f'separating vocals needs the audio-separator package: pip install "audio-separator[cpu]" ({error})'
        ) from error
    to_mono(waveform, rate)  # the same checks as everywhere
    mixture = torch.stack([resample(to_float(channel), rate, _SEPARATOR_RATE) for channel in waveform[:2]])
    with tempfile.TemporaryDirectory(prefix="memo-vocals-") as folder:
        models, output = Path(folder, "models"), Path(folder, "output")
        models.mkdir()
        _describe_separator_model(model, models)
        _write_wav(Path(folder, "mixture.wav"), mixture)
        try:
            separator = Separator(
                log_level=_SEPARATOR_LOG_LEVEL,
                model_file_dir=str(models),
                output_dir=str(output),
                output_single_stem="vocals",
            )
            separator.model_file_dir = str(models)  # whatever AUDIO_SEPARATOR_MODEL_DIR says
            separator.load_model(model.name)
            names = separator.separate(str(Path(folder, "mixture.wav")))
        except Exception as error:
            raise AudioError(f"audio-separator failed: {type(error).__name__}: {error}") from error
        if not names:
            raise AudioError("audio-separator wrote no vocals")
        voice, voice_rate = load_audio(output / names[0])
        return F.pad(voice, (0, round(waveform.shape[1] * voice_rate / rate) - voice.shape[1])), voice_rate


_SPECTRAL_FRAME = 0.064  # seconds, rounded to a power of two of samples; a quarter of it from frame to frame
_SPECTRAL_BLOCK = 60  # seconds processed at once: repetitions are looked for within them
_SPECTRAL_OVERLAP = 2  # seconds over which two blocks fade into each other
_SPECTRAL_APART = 1.0  # seconds that repetitions lie apart at least: a held vowel repeats itself at once
_SPECTRAL_LOWEST = 100  # Hz, no voice reaches below


def separate_vocals_spectral(waveform: Tensor | np.ndarray, sample_rate: float) -> tuple[Tensor, float]:
    """Lowers repeating music around a voice, without any weights: REPET-SIM (Rafii and Pardo, ISMIR 2012).

    Every spectrum is compared with the most similar ones at other times, within blocks of a minute: what it shares with
    them is accompaniment, what is left the voice. Music that does not repeat, and noise, stay. A toon voice over a loop
    of chords gains 4 dB where it was 8 dB louder than the music, 7 dB where it was 2 dB louder. A minute of stereo at
    44.1 kHz takes about 15 s.

    Args:
        waveform: [T] or [channels, T]; see `prepare_waveform` for formats.
        sample_rate: in Hz.

    Returns:
        the voice, [channels, T] float32 on the CPU, and the sample rate as given. A recording too short to repeat
        anything (below three seconds), or below 1000 Hz, comes back as it is.

    Raises:
        AudioError: bad recording.
    """
    rate = check_rate(sample_rate)
    channels = as_channels(waveform)
    to_mono(channels, rate)  # the same checks as everywhere
    channels = torch.stack([to_float(channel) for channel in channels])
    length = channels.shape[1]
    block, overlap = round(_SPECTRAL_BLOCK * rate), round(_SPECTRAL_OVERLAP * rate)
    if length < 3 * _SPECTRAL_APART * rate or rate < 1000:
        return channels, sample_rate
    # As many blocks as needed, of equal length, so that none at the end is too short to repeat anything.
    count = math.ceil(max(1, length - overlap) / (block - overlap))
    step = math.ceil((length - overlap) / count)
    voice = torch.zeros_like(channels)
    for start in range(0, count * step, step):
        piece = channels[:, start : start + step + overlap]
        part = _without_repetition(piece, rate)
        if start:  # fades in where the block before fades out
            part[:, :overlap] *= torch.linspace(0, 1, overlap)
        if start + piece.shape[1] < length:
            part[:, -overlap:] *= torch.linspace(1, 0, overlap)
        voice[:, start : start + piece.shape[1]] += part
    return voice, sample_rate


def _without_repetition(channels: Tensor, rate: float) -> Tensor:
    """[channels, T] -> the same without what similar moments share; at least three seconds."""
    import librosa

    size = 2 ** max(4, round(math.log2(_SPECTRAL_FRAME * rate)))
    spectra = np.stack([librosa.stft(channel.numpy(), n_fft=size, hop_length=size // 4) for channel in channels])
    loudness = np.abs(spectra).mean(axis=0)
    apart = round(_SPECTRAL_APART * rate / (size // 4))
    # The spectra of silence are no directions to compare: a little of everything makes them alike.
    floor = 1e-6 * loudness.max() + 1e-12
    repeated = librosa.decompose.nn_filter(loudness + floor, aggregate=np.median, metric="cosine", width=apart)
    repeated = np.minimum(loudness, repeated)
    mask = librosa.util.softmask(loudness - repeated, repeated, power=2)
    mask[librosa.fft_frequencies(sr=rate, n_fft=size) < _SPECTRAL_LOWEST] = 0
    voice = [librosa.istft(s * mask, hop_length=size // 4, length=channels.shape[1]) for s in spectra]
    return torch.from_numpy(np.stack(voice).astype(np.float32))


def _describe_separator_model(model: Path, folder: Path) -> None:
    """Puts the model into `folder` with the three files that audio-separator would otherwise download."""
    import hashlib

    shutil.copyfile(model, folder / model.name)
    digest = hashlib.md5(model.read_bytes()[-10000 * 1024 :], usedforsecurity=False).hexdigest()
    lists: dict[str, dict[str, str]] = {name: {} for name in _SEPARATOR_LISTS} | {
        "mdx_download_list": {model.stem: model.name}
    }
    (folder / "download_checks.json").write_text(json.dumps(lists))
    (folder / "vr_model_data.json").write_text("{}")
    (folder / "mdx_model_data.json").write_text(json.dumps({digest: _SEPARATOR_SETTINGS}))


def _write_wav(path: Path, waveform: Tensor) -> None:
    """[channels, T] float32 -> 32-bit float WAV at 44.1 kHz."""
    import soundfile  # comes with librosa

    soundfile.write(path, waveform.T.numpy(), _SEPARATOR_RATE, subtype="FLOAT")
