"""AudioTrack: the speech embeddings that drive the video."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AudioError
from ..release import SAMPLE_RATE, WINDOW
from .sound import as_channels, check_rate, is_number, prepare_waveform

if TYPE_CHECKING:
    from ..encoders.speech import SpeechEncoder

MAX_EMBEDDING_BYTES = 8 * 2**30  # embeddings of the released encoder take 1.1 MB a second: 2 hours
WHOLE_SECONDS = 60  # up to here context="auto" encodes the recording whole, as released
MAX_WHOLE_SECONDS = 300  # whole encoding beyond this is refused: 6 GB of working memory with the released encoder
CHUNK_SECONDS = 10
CONTEXT_SECONDS = 5  # context on either side of a chunk that "auto" takes
MAX_CONTEXT_SECONDS = 60
LOCAL_CHUNK = 4  # frames; context="local" encodes so many at once, counted from frame 0; it divides a window
LOCAL_PAST = 5  # seconds that each chunk hears before itself
LOCAL_FUTURE = 0.4  # seconds after: with the chunk and two neighbours an edit reaches back 0.6 s at 30 fps
LOCAL_SILENCE = -60.0  # dB of full scale: a chunk that hears nothing louder is heard as digital silence
SILENCE_LEVEL = -50.0  # dB of full scale: quieter than this is silence for the gate, whatever sounds elsewhere
SILENCE_SECONDS = 0.3  # a shorter pause is part of speech
SILENCE_BLOCK = 0.02  # seconds over which the level is taken
NEIGHBOURS = 2  # frames of context on either side of each frame's embedding


@dataclass(frozen=True, eq=False)
class AudioTrack:
    """Speech embeddings of a recording, one per video frame with its neighbours'.

    Attributes:
        embeddings: [F_padded, 5, L, C] float32 on the CPU: for every video frame the hidden states of the L encoder
            layers at frames -2 ... +2 around it, clamped at the ends. A read-only view: neighbouring frames share
            memory, so that it costs a fifth of its nominal size; slices copy when they are moved or made contiguous.
        num_frames: frames that the recording itself spans; the rest up to F_padded is silence to fill the last window.
        fps: frames a second.
        context: seconds of context around each encoded chunk, "local", or None where the recording was encoded whole.
    """

    embeddings: Tensor
    num_frames: int
    fps: float
    context: float | Literal["local"] | None

    @property
    def num_padded_frames(self) -> int:
        """F_padded, a multiple of the window length."""
        return self.embeddings.shape[0]


def count_frames(samples: int, sample_rate: float, fps: float) -> int:
    """Video frames that so many samples last, rounded up; but half a sample makes no frame: N frames of sound, to the
    nearest sample, are N frames.

    (The released code, which always rounds up, then makes one more.)
    """
    return max(1, math.ceil((samples - 0.5) / sample_rate * fps - 1e-9))


def encode_audio(
    waveform: Tensor | np.ndarray,
    sample_rate: float,
    speech_encoder: SpeechEncoder,
    fps: float = 30,
    context: float | Literal["auto", "local"] | None = "auto",
    window_frames: int = WINDOW,
    progress: Callable[[int, int], None] | None = None,
    silence_gate: bool = False,
    num_frames: int | None = None,
) -> AudioTrack:
    """Encodes a recording into per-frame speech embeddings (MEMO appendix D).

    With `context=None` it is encoded whole, as released: normalised to zero mean and unit variance over all of it,
    continued by zeros to whole windows, encoded at once. Every embedding then depends on every sample, and the cost
    grows with the square of the length, so this is refused beyond MAX_WHOLE_SECONDS.

    With `context=seconds`, fixed chunks of CHUNK_SECONDS, counted from the start of the recording, are each encoded
    with that much sound before and after them (what there is, at the ends) and normalised over it. The cost is linear,
    the working memory constant, and an edit changes embeddings only of the chunks that hear it, at most CHUNK_SECONDS +
    `context` away. The embeddings differ from whole encoding's because mean, variance, group norm and attention see
    less: on the trained toon encoder, over 30 s of two voices, the relative L2 distance is 0.24 with 2 s of context,
    0.23 with 5 s, 0.12 with 10 s; on the random encoder of the tests, over 50 s of speech-like sound, 0.23, 0.21, 0.17,
    and the step between two chunks is 1.1 times that of whole encoding.

    With `context="local"`, an edit of the sound from second t on changes embeddings only from t - 0.6 s on (at 30 fps;
    resampling from another rate adds up to 0.08 s), those before are equal to the last bit: chunks of LOCAL_CHUNK
    frames each hear LOCAL_PAST before them, or what there is, and LOCAL_FUTURE after them. Beyond its end the recording
    is silent, so that appending zeros changes no hidden state. On the trained toon checkpoint the relative L2 distance
    from whole encoding is 0.27 over 8 s of one voice and 0.39 over 30 s of two, and mouths follow the truth as well
    (correlation 0.92 against 0.91, five unseen voices of 4 s); ten minutes take 52 s on one core. Normalisation makes
    a pause longer than LOCAL_PAST as loud as speech: below LOCAL_SILENCE it is taken for digital silence, and
    `silence_gate` stills what is louder. Speech below LOCAL_SILENCE has to be amplified first.

    Args:
        waveform: [T] or [channels, T]; see `prepare_waveform`.
        sample_rate: in Hz.
        fps: video frames a second, up to 240.
        context: None, seconds from 0 to 60, "local", or "auto": None up to WHOLE_SECONDS, else CONTEXT_SECONDS.
        window_frames: the embeddings are padded to a multiple of this.
        progress: called with (chunks done, chunks in all).
        silence_gate: gives frames inside a silent stretch the embedding of digital silence, so that mouths rest: at
            least SILENCE_SECONDS below SILENCE_LEVEL. The level is absolute, so that the gate, too, hears only what is
            near; a recording whose speech is that quiet has to be amplified first.
        num_frames: how many frames the recording spans, where it was resampled before, so that its samples no longer
            say it exactly; None counts them (`count_frames`).

    Raises:
        AudioError: bad recording or argument, or embeddings that would exceed MAX_EMBEDDING_BYTES.
    """
    if not is_number(fps) or not 0 < fps <= 240:
        raise AudioError(f"fps is {fps!r}; it must be a number above 0 and at most 240")
    if isinstance(window_frames, bool) or not isinstance(window_frames, int) or window_frames < 1:
        raise AudioError(f"window_frames is {window_frames!r}; it must be a whole number of at least 1")
    fps = float(fps)
    samples = prepare_waveform(waveform, sample_rate)
    seconds = len(samples) / SAMPLE_RATE
    context = _resolve_context(context, seconds)
    counted = count_frames(as_channels(waveform).shape[1], sample_rate, fps)
    if num_frames is None:
        num_frames = counted
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or abs(num_frames - counted) > 1:
        raise AudioError(f"num_frames is {num_frames!r}, but the recording spans {counted} frames at {fps:g} fps")
    padded = math.ceil(num_frames / window_frames) * window_frames
    size = padded * speech_encoder.num_layers * speech_encoder.hidden_dim * 4
    if size > MAX_EMBEDDING_BYTES:
        allowed = seconds * MAX_EMBEDDING_BYTES / size
        raise AudioError(
            f"the recording lasts {seconds:.0f} s and its embeddings would take {size / 2**30:.1f} GiB; "
            f"at {fps:g} fps with this speech encoder at most {allowed:.0f} s are allowed"
        )
    if context is None:
        hidden = _encode_whole(samples, speech_encoder, fps, num_frames, padded)
        if progress is not None:
            progress(1, 1)
    else:
        hidden = _encode_chunks(samples, speech_encoder, fps, padded, context, progress)
    if silence_gate:
        frames = math.ceil(fps)
        silence = _encode(torch.zeros(SAMPLE_RATE), speech_encoder, SAMPLE_RATE, frames)[frames // 2]
        hidden[_silent_frames(samples, fps, padded)] = silence
    return AudioTrack(_with_neighbours(hidden), num_frames, fps, context)


def seconds_at_once(
    waveform: Tensor | np.ndarray, sample_rate: float, context: float | Literal["auto", "local"] | None = "auto"
) -> float:
    """How many seconds of a recording `encode_audio` gives the speech encoder at once: its working memory follows them.

    Raises:
        AudioError: as `encode_audio`.
    """
    seconds = as_channels(waveform).shape[1] / check_rate(sample_rate)
    context = _resolve_context(context, seconds)
    if context is None:
        return seconds
    return min(seconds, LOCAL_PAST + 1 + LOCAL_FUTURE if context == "local" else CHUNK_SECONDS + 2 * context)


def _resolve_context(context: Any, seconds: float) -> float | Literal["local"] | None:
    if isinstance(context, str) and context == "local":
        return "local"
    if isinstance(context, str) and context == "auto":
        return None if seconds <= WHOLE_SECONDS else float(CONTEXT_SECONDS)
    if context is None:
        if seconds > MAX_WHOLE_SECONDS:
            raise AudioError(
                f"the recording lasts {seconds:.0f} s; encoding it whole (context=None) is allowed up to "
                f'{MAX_WHOLE_SECONDS} s, beyond that give context in seconds or "auto"'
            )
        return None
    if not is_number(context) or not 0 <= context <= MAX_CONTEXT_SECONDS:
        raise AudioError(
            f'context is {context!r}; None, "auto", "local" or seconds from 0 to {MAX_CONTEXT_SECONDS} are allowed'
        )
    return float(context)


def _normalize(samples: Tensor) -> Tensor:
    """Zero mean and unit variance; silence stays silence, no samples stay none."""
    centred = samples.double() - samples.double().mean()
    return (centred / torch.sqrt(centred.square().mean() + 1e-7)).float()


@torch.no_grad()
def _encode(samples: Tensor, encoder: SpeechEncoder, num_samples: int, num_frames: int) -> Tensor:
    """Normalises, continues by zeros to `num_samples`, encodes -> [num_frames, L, C] float32 on the CPU."""
    if encoder.normalize:
        samples = _normalize(samples)
    samples = F.pad(samples, (0, num_samples - len(samples)))
    weight = next(encoder.parameters())
    return encoder(samples[None].to(weight.device, weight.dtype), num_frames).float().cpu()


def _encode_whole(samples: Tensor, encoder: SpeechEncoder, fps: float, num_frames: int, padded: int) -> Tensor:
    # The released code rounds the samples per frame down, so that padding is a little shorter than the frames it fills.
    padding = (padded - num_frames) * int(SAMPLE_RATE // fps)
    return _encode(samples, encoder, len(samples) + padding, padded)


def _encode_chunks(
    samples: Tensor,
    encoder: SpeechEncoder,
    fps: float,
    padded: int,
    context: float | Literal["local"],
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    if context == "local":
        chunk, before, after = LOCAL_CHUNK, round(LOCAL_PAST * fps), round(LOCAL_FUTURE * fps)
    else:
        chunk, before, after = max(1, round(CHUNK_SECONDS * fps)), round(context * fps), round(context * fps)
    starts = range(0, padded, chunk)
    hidden = torch.empty(padded, encoder.num_layers, encoder.hidden_dim)
    # One chunk at a time: in a batch, the last bits depend on how many others there are.
    for done, start in enumerate(starts, 1):
        stop = min(start + chunk, padded)
        first, last = max(0, start - before), start + chunk + after
        if context != "local":
            last = min(last, padded)
        # The last frame takes the feature at the very end (align_corners): ending there keeps the frames evenly spaced,
        # and every chunk on the same raster.
        begin = round(first * SAMPLE_RATE / fps)
        end = round((last - 1) * SAMPLE_RATE / fps) + encoder.min_samples
        heard = samples[begin:end]
        if context == "local":  # silence beyond the end counts in mean and variance like any other sound
            heard = F.pad(heard, (0, end - begin - len(heard)))
            if heard.double().var(correction=0) < 10 ** (LOCAL_SILENCE / 10):
                heard = torch.zeros_like(heard)  # normalised, the noise of a long pause would be as loud as speech
        states = _encode(heard, encoder, end - begin, last - first)
        hidden[start:stop] = states[start - first : stop - first]
        if progress is not None:
            progress(done, len(starts))
    return hidden


def _silent_frames(samples: Tensor, fps: float, padded: int) -> Tensor:
    """[padded] bool: the frames that lie wholly within a silent stretch; beyond its end the recording is silent."""
    block = round(SILENCE_BLOCK * SAMPLE_RATE)
    enough = math.ceil(SILENCE_SECONDS / SILENCE_BLOCK)
    blocks = math.ceil(max(len(samples), padded * SAMPLE_RATE / fps) / block) + enough
    level = torch.zeros(blocks)
    for first in range(0, len(samples), part := 60 * SAMPLE_RATE):  # not three hours in double precision at once
        piece = samples[first : first + part].double()
        piece = F.pad(piece, (0, -len(piece) % block)).view(-1, block)
        level[first // block : first // block + len(piece)] = piece.var(dim=1, correction=0)
    quiet = (level < 10 ** (SILENCE_LEVEL / 10)).numpy()
    # Where each run of equal blocks begins, and the end of the last one.
    runs = np.flatnonzero(np.r_[True, quiet[1:] != quiet[:-1], True])
    for begin, end in zip(runs[:-1], runs[1:]):
        quiet[begin:end] &= end - begin >= enough
    edges = np.arange(padded + 1) * SAMPLE_RATE / fps / block
    loud = np.r_[0, np.cumsum(~quiet)]
    begins, ends = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int)
    return torch.from_numpy(loud[begins] == loud[ends])


def _with_neighbours(hidden: Tensor) -> Tensor:
    """[F, L, C] -> [F, 5, L, C], a view of one padded copy."""
    ends = hidden[:1].expand(NEIGHBOURS, -1, -1), hidden[-1:].expand(NEIGHBOURS, -1, -1)
    return torch.cat([ends[0], hidden, ends[1]]).unfold(0, 2 * NEIGHBOURS + 1, 1).permute(0, 3, 1, 2)
