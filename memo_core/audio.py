"""Reading and encoding recordings, where they were before version 0.2: import from `memo_core.inputs`."""

from .inputs.separation import separate_vocals, separate_vocals_spectral
from .inputs.sound import load_audio, prepare_waveform, resample
from .inputs.speech import AudioTrack, count_frames, encode_audio

__all__ = [
    "AudioTrack",
    "count_frames",
    "encode_audio",
    "load_audio",
    "prepare_waveform",
    "resample",
    "separate_vocals",
    "separate_vocals_spectral",
]
