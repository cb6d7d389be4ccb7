"""Recordings in, speech embeddings out."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT, relative_l2
from safetensors.torch import load_file, save_file
from torch import Tensor

from memo_core.encoders.speech import SpeechEncoder
from memo_core.errors import AudioError, CheckpointError
from memo_core.inputs import recording, separation
from memo_core.inputs.separation import separate_vocals, separate_vocals_spectral
from memo_core.inputs.sound import load_audio, prepare_waveform
from memo_core.inputs.speech import CHUNK_SECONDS, CONTEXT_SECONDS, LOCAL_PAST, count_frames, encode_audio

RATE = 16000


@pytest.fixture(scope="module")
def encoder(memo_tiny: Path) -> SpeechEncoder:
    return SpeechEncoder.from_pretrained(memo_tiny / "wav2vec2")


@pytest.fixture(scope="module")
def voice(expected: dict[str, Tensor]) -> Tensor:
    return expected["in.waveform"]


def speech(voice: Tensor, seconds: float) -> Tensor:
    """The fixture's voice again and again: varying in loudness, backwards every other time, with pauses."""
    generator = torch.Generator().manual_seed(0)
    parts: list[Tensor] = []
    while sum(map(len, parts)) < seconds * RATE:
        loud = voice * (0.3 + 0.7 * torch.rand(1, generator=generator))
        pause = 0.002 * torch.randn(int(8000 * torch.rand(1, generator=generator)), generator=generator)
        parts += [loud.flip(0) if len(parts) % 4 == 2 else loud, pause]
    return torch.cat(parts)[: round(seconds * RATE)]


def tone(rate: float, seconds: float = 0.5, frequency: float = 440) -> Tensor:
    return (
        0.5
        * torch.sin(2 * math.pi * frequency / rate * torch.arange(round(seconds * rate), dtype=torch.float64)).float()
    )


class Recorder:
    """Notes the number of samples and frames of every call of an encoder."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.calls: list[tuple[int, int]] = []
        self.handle = encoder.register_forward_pre_hook(lambda _, args: self.calls.append((args[0].shape[-1], args[1])))

    def __enter__(self) -> list[tuple[int, int]]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


# ---- the whole recording at once, as released


def test_whole_encoding_equals_the_reference(
    encoder: SpeechEncoder, voice: Tensor, expected: dict[str, Tensor]
) -> None:
    track = encode_audio(voice, RATE, encoder, fps=30, context=None)
    assert relative_l2(track.embeddings, expected["audio.embedding_windows"]) < 1e-5
    assert (track.num_frames, track.num_padded_frames, track.fps, track.context) == (69, 80, 30.0, None)


def test_released_wav_file_equals_the_reference(
    encoder: SpeechEncoder, memo_tiny: Path, expected: dict[str, Tensor]
) -> None:
    track = encode_audio(*load_audio(memo_tiny / "speech.wav"), encoder)
    assert relative_l2(track.embeddings, expected["audio.embedding_windows"]) < 1e-5


def test_loudness_and_offset_do_not_matter(encoder: SpeechEncoder, voice: Tensor) -> None:
    reference = encode_audio(voice, RATE, encoder).embeddings
    assert relative_l2(encode_audio(0.01 * voice + 0.2, RATE, encoder).embeddings, reference) < 1e-3


def test_checkpoint_without_normalisation_is_not_normalised(memo_tiny: Path, tmp_path: Path, voice: Tensor) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((memo_tiny / "wav2vec2" / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 16000}')
    plain = SpeechEncoder.from_pretrained(tmp_path)
    heard: list[Tensor] = []
    plain.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    encode_audio(voice, RATE, plain)
    assert torch.equal(heard[0][0, : len(voice)], voice)


def test_embeddings_of_neighbours_are_the_frames_around(encoder: SpeechEncoder, voice: Tensor) -> None:
    embeddings = encode_audio(voice, RATE, encoder).embeddings
    own = embeddings[:, 2]
    for offset in range(-2, 3):
        frames = (torch.arange(len(own)) + offset).clamp(0, len(own) - 1)
        assert torch.equal(embeddings[:, offset + 2], own[frames])
    nominal = embeddings.numel() * 4
    assert embeddings.untyped_storage().nbytes() < nominal / 4, "neighbours should share memory"


def test_track_is_frozen(encoder: SpeechEncoder, voice: Tensor) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        encode_audio(voice, RATE, encoder).fps = 25  # type: ignore[misc]


def test_encoding_changes_nothing_of_its_input(encoder: SpeechEncoder, voice: Tensor) -> None:
    given = voice.clone()
    encode_audio(given, RATE, encoder, context=1)
    assert torch.equal(given, voice)


@pytest.mark.parametrize(("fps", "window_frames"), [(25, 16), (30, 1), (12.5, 8), (29.97, 16)])
def test_frames_fill_whole_windows(encoder: SpeechEncoder, voice: Tensor, fps: float, window_frames: int) -> None:
    for context in (None, 0.5, "local"):
        track = encode_audio(voice, RATE, encoder, fps=fps, window_frames=window_frames, context=context)
        assert track.num_frames == math.ceil(len(voice) / RATE * fps)
        assert track.num_padded_frames % window_frames == 0
        assert 0 <= track.num_padded_frames - track.num_frames < window_frames


# ---- chunks


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("fps", [24, 25, 29.97, 30, 60])
@pytest.mark.parametrize("frames", [1, 2, 100, 101, 299, 300])
def test_the_sound_of_so_many_frames_has_so_many(frames: int, fps: float, rate: int) -> None:
    """As other programs cut it: to the nearest sample."""
    assert count_frames(round(frames * rate / fps), rate, fps) == frames
    assert count_frames(round(frames * rate / fps) + 2, rate, fps) == frames + 1


def test_resampling_adds_no_frame(encoder: SpeechEncoder) -> None:
    assert encode_audio(torch.zeros(round(100 * 44100 / 30)), 44100, encoder, fps=30).num_frames == 100


def test_auto_context_is_whole_up_to_a_minute(encoder: SpeechEncoder) -> None:
    assert encode_audio(torch.zeros(60 * RATE), RATE, encoder).context is None
    assert encode_audio(torch.zeros(60 * RATE + 1), RATE, encoder).context == CONTEXT_SECONDS


def test_chunked_cost_is_linear(encoder: SpeechEncoder, voice: Tensor) -> None:
    long = speech(voice, 160)
    with Recorder(encoder) as short_calls:
        encode_audio(long[: 80 * RATE], RATE, encoder, context=2)
    with Recorder(encoder) as long_calls:
        encode_audio(long, RATE, encoder, context=2)
    assert len(long_calls) in (2 * len(short_calls), 2 * len(short_calls) + 1, 2 * len(short_calls) - 1)
    for samples, frames in short_calls + long_calls:
        assert frames <= (CHUNK_SECONDS + 2 * 2) * 30
        assert samples <= (CHUNK_SECONDS + 2 * 2) * RATE


def test_an_edit_changes_only_embeddings_near_it(encoder: SpeechEncoder, voice: Tensor) -> None:
    original = speech(voice, 100)
    edited = original.clone()
    edited[52 * RATE : 53 * RATE] = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(1))
    before, after = (encode_audio(x, RATE, encoder, context=3).embeddings for x in (original, edited))
    changed = (before != after).flatten(1).any(dim=1).nonzero().flatten() / 30
    assert len(changed)
    assert float(changed.min()) >= 52 - CHUNK_SECONDS - 3 - 0.1  # 2 frames of neighbours
    assert float(changed.max()) <= 53 + CHUNK_SECONDS + 3 + 0.1
    assert bool((before[52 * 30 : 53 * 30] != after[52 * 30 : 53 * 30]).any())


def test_appending_changes_only_embeddings_near_the_end(encoder: SpeechEncoder, voice: Tensor) -> None:
    long = speech(voice, 90)
    before = encode_audio(long[: 75 * RATE], RATE, encoder, context=3).embeddings
    after = encode_audio(long, RATE, encoder, context=3).embeddings
    same = (75 - CHUNK_SECONDS - 3 - 1) * 30
    assert torch.equal(before[:same], after[:same])


def test_chunks_stay_close_to_whole_encoding_and_closer_with_more_context(
    encoder: SpeechEncoder, voice: Tensor
) -> None:
    long = speech(voice, 50)
    whole = encode_audio(long, RATE, encoder, context=None).embeddings
    distance = {c: relative_l2(encode_audio(long, RATE, encoder, context=c).embeddings, whole) for c in (0, 5, 10, 60)}
    assert distance[0] > distance[5] > distance[10] > distance[60]
    assert distance[5] < 0.25  # the docstring says 0.21
    assert distance[60] < 0.02  # every chunk hears everything


def test_chunked_frames_are_in_step_with_whole_ones(encoder: SpeechEncoder, voice: Tensor) -> None:
    """Shifting the chunks' frames by one in either direction takes them further from the whole encoding."""
    long = speech(voice, 40)
    whole = encode_audio(long, RATE, encoder, context=None).embeddings[:, 2]
    chunked = encode_audio(long, RATE, encoder, context=5).embeddings[:, 2]
    shifted = [relative_l2(chunked.roll(shift, 0)[30:-30], whole[30:-30]) for shift in (-1, 0, 1)]
    assert shifted[1] < min(shifted[0], shifted[2])


def test_progress_counts_chunks(encoder: SpeechEncoder) -> None:
    seen: list[tuple[int, int]] = []
    encode_audio(torch.zeros(25 * RATE), RATE, encoder, context=1, progress=lambda *args: seen.append(args))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- local context


def unchanged_seconds(before: Tensor, after: Tensor) -> float:
    """How long two tracks are equal to the last bit."""
    frames = min(len(before), len(after))
    changed = (before[:frames] != after[:frames]).flatten(1).any(dim=1).nonzero()
    return float(changed.min()) / 30


@pytest.fixture(scope="module")
def spoken(voice: Tensor) -> Tensor:
    return speech(voice, 22)


@pytest.fixture(scope="module")
def local(encoder: SpeechEncoder, spoken: Tensor) -> Tensor:
    """Embeddings of its first 20 s."""
    return encode_audio(spoken[: 20 * RATE], RATE, encoder, context="local").embeddings


def test_a_late_edit_changes_only_late_local_embeddings(encoder: SpeechEncoder, spoken: Tensor, local: Tensor) -> None:
    edited = spoken[: 20 * RATE].clone()
    edited[18 * RATE :] = 0.1 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(1))
    after = encode_audio(edited, RATE, encoder, context="local").embeddings
    assert 18 - 0.6 <= unchanged_seconds(local, after) <= 18
    assert bool((local != after)[18 * 30 :].flatten(1).any(dim=1).all())


def test_appending_and_cutting_change_only_local_embeddings_near_the_end(
    encoder: SpeechEncoder, spoken: Tensor, local: Tensor
) -> None:
    for seconds in (1.23, 18.4, 22):
        other = encode_audio(spoken[: round(seconds * RATE)], RATE, encoder, context="local").embeddings
        assert min(seconds, 20) - 0.6 <= unchanged_seconds(local, other) <= min(seconds, 20)


def test_an_edit_is_forgotten_by_local_embeddings(encoder: SpeechEncoder, spoken: Tensor, local: Tensor) -> None:
    edited = spoken[: 20 * RATE].clone()
    edited[3 * RATE : 4 * RATE] *= 0.5
    after = encode_audio(edited, RATE, encoder, context="local").embeddings
    assert unchanged_seconds(local.flip(0), after.flip(0)) >= 20 - 4 - LOCAL_PAST - 0.3


def test_silence_after_the_end_changes_no_local_embedding(
    encoder: SpeechEncoder, spoken: Tensor, local: Tensor
) -> None:
    track = encode_audio(F.pad(spoken[: 20 * RATE], (0, RATE)), RATE, encoder, context="local")
    assert track.context == "local"
    assert torch.equal(track.embeddings[: len(local) - 2], local[:-2])  # the last two have other neighbours


def test_other_rates_keep_the_law_of_local_embeddings(encoder: SpeechEncoder) -> None:
    whole = 0.1 * torch.randn(5 * 44100, generator=torch.Generator().manual_seed(2))
    before, after = (
        encode_audio(whole[: seconds * 44100], 44100, encoder, context="local").embeddings for seconds in (4, 5)
    )
    assert unchanged_seconds(before, after) >= 4 - 0.7


def test_faint_noise_in_a_long_pause_is_silence_to_local_embeddings(encoder: SpeechEncoder, voice: Tensor) -> None:
    noise = 3e-4 * torch.randn(7 * RATE, generator=torch.Generator().manual_seed(4))  # -70 dB
    faint, fainter, loud = (
        encode_audio(torch.cat([voice[:RATE], gain * noise]), RATE, encoder, context="local").embeddings
        for gain in (1, 0.5, 100)
    )
    late = slice((1 + LOCAL_PAST) * 30 + 6, None)
    assert torch.equal(faint[late], fainter[late])
    assert relative_l2(faint[late], loud[late]) > 0.1


def test_local_embeddings_are_in_step_with_whole_ones(encoder: SpeechEncoder, spoken: Tensor, local: Tensor) -> None:
    whole = encode_audio(spoken[: 20 * RATE], RATE, encoder, context=None).embeddings[:, 2]
    shifted = [relative_l2(local[:, 2].roll(shift, 0)[30:-30], whole[30:-30]) for shift in (-1, 0, 1)]
    assert shifted[1] < min(shifted[0], shifted[2])


# ---- the silence gate


@pytest.mark.parametrize("context", [None, 1.0, "local"])
def test_the_gate_gives_noise_between_words_the_embedding_of_silence(
    encoder: SpeechEncoder, voice: Tensor, context: float | str | None
) -> None:
    word = voice[: RATE // 2] / voice[: RATE // 2].square().mean().sqrt() * 0.1
    noise = 1e-3 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(3))  # -60 dB
    recording = torch.cat([word, noise[: RATE // 10], word, noise, word])  # frames 0-14, 18-32, 93-107
    plain, gated = (
        encode_audio(recording, RATE, encoder, context=context, window_frames=1, silence_gate=gate).embeddings[:, 2]
        for gate in (False, True)
    )
    silence = encode_audio(torch.zeros(RATE), RATE, encoder, context=None, window_frames=1).embeddings[15, 2]
    gap = range(34, 92)
    assert all(torch.equal(gated[frame], silence) for frame in gap)
    assert not any(torch.equal(plain[frame], silence) for frame in gap)
    words = [*range(33), *range(93, len(plain))]  # with a pause too short to be one
    assert torch.equal(gated[words], plain[words])


def test_all_of_a_silent_recording_is_gated(encoder: SpeechEncoder) -> None:
    for silence in (torch.zeros(RATE), torch.full((RATE,), 0.3), torch.zeros(1)):  # an offset is no sound
        states = encode_audio(silence, RATE, encoder, silence_gate=True).embeddings
        assert torch.equal(states, states[:1, :1].expand_as(states))


def test_the_gate_keeps_the_law_of_local_embeddings(encoder: SpeechEncoder, voice: Tensor) -> None:
    recording = torch.cat([voice[:RATE], torch.zeros(RATE), 10 * voice[:RATE]])
    before = encode_audio(recording, RATE, encoder, context="local", silence_gate=True).embeddings
    for seconds in (1.1, 1.28, 1.32, 1.7, 2.1):
        edited = recording.clone()
        edited[round(seconds * RATE) :] = 0.5 * torch.randn(len(edited) - round(seconds * RATE))
        after = encode_audio(edited, RATE, encoder, context="local", silence_gate=True).embeddings
        assert seconds - 0.6 <= unchanged_seconds(before, after) <= seconds


# ---- odd and bad input


@pytest.mark.parametrize("context", [None, 0, 5, "local"])
@pytest.mark.parametrize("samples", [1, 399, 533, 10 * RATE, 10 * RATE + 1])
def test_silence_and_tiny_recordings_give_finite_embeddings(
    encoder: SpeechEncoder, samples: int, context: float | str | None
) -> None:
    for waveform in (torch.zeros(samples), torch.full((samples,), 0.5)):
        track = encode_audio(waveform, RATE, encoder, context=context, window_frames=1)
        assert track.num_frames == math.ceil(samples / RATE * 30)
        assert torch.isfinite(track.embeddings).all()


@pytest.mark.parametrize(
    ("waveform", "rate", "named"),
    [
        (torch.zeros(0), RATE, "empty"),
        (torch.zeros(2, 0), RATE, r"\(2, 0\)"),
        (torch.zeros(1, 1, 100), RATE, r"\(1, 1, 100\)"),
        (torch.zeros(()), RATE, r"\(\)"),
        (torch.zeros(48000, 2), RATE, "transposed"),
        (torch.tensor([0.0, math.nan, 0.0]), RATE, "1 of 3 samples are not finite"),
        (torch.tensor([[0.0, 0.0], [0.0, math.inf]]), RATE, "not finite"),
        (torch.full((10,), 1e300, dtype=torch.float64), RATE, "not finite"),
        (torch.full((10,), 1e9), RATE, r"1e\+09"),
        (torch.zeros(10), -44100, "-44100"),
        (torch.zeros(10), 0, "0"),
        (torch.zeros(10), math.nan, "nan"),
        (torch.zeros(10), "16000", "'16000'"),
        (torch.zeros(10), None, "None"),
        (torch.zeros(10, dtype=torch.complex64), RATE, "complex64"),
        (torch.zeros(10, dtype=torch.bool), RATE, "bool"),
        (torch.zeros(10, dtype=torch.int64), RATE, "int64"),
        (None, RATE, "NoneType"),
        (["a"], RATE, "list"),
        (torch.zeros(10), 1e-4, "100000 s"),
        (torch.zeros(10), 2**63, "at most 768000"),
        (torch.zeros(10), 10**400, "at most 768000"),
        (torch.zeros(10, device="meta"), RATE, "meta"),
        (torch.zeros(10).to_sparse(), RATE, "sparse"),
        (object(), RATE, "object"),
        (torch.zeros(10), [16000], r"\[16000\]"),
    ],
)
def test_bad_recordings_are_refused_by_name(encoder: SpeechEncoder, waveform: object, rate: object, named: str) -> None:
    for call in (prepare_waveform, lambda w, r: encode_audio(w, r, encoder)):
        with pytest.raises(AudioError, match=named):
            call(waveform, rate)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0},
        {"fps": math.nan},
        {"fps": 1000},
        {"fps": "30"},
        {"window_frames": 0},
        {"window_frames": 1.5},
        {"context": -1},
        {"context": 61},
        {"context": "whole"},
        {"context": "Local"},
        {"context": math.nan},
        {"context": True},
    ],
)
def test_bad_options_are_refused_by_name(encoder: SpeechEncoder, options: dict) -> None:
    (name,) = options
    with pytest.raises(AudioError, match=f"{name} is {next(iter(options.values()))!r}"):
        encode_audio(torch.zeros(100), RATE, encoder, **options)


def test_three_hours_are_the_limit() -> None:
    low = 100  # Hz, so that the test needs little memory
    with pytest.raises(AudioError, match="10801 s; at most 10800 s"):
        prepare_waveform(torch.zeros(low * (3 * 3600 + 1)), low)


def test_whole_encoding_is_refused_beyond_five_minutes(encoder: SpeechEncoder) -> None:
    with pytest.raises(AudioError, match="context in seconds"):
        encode_audio(torch.zeros(301 * RATE), RATE, encoder, context=None)


def test_embeddings_beyond_the_memory_limit_are_refused(
    encoder: SpeechEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memo_core.inputs.speech.MAX_EMBEDDING_BYTES", 30 * 20 * 2 * 32 * 4)  # 20 s of this encoder
    with Recorder(encoder) as calls, pytest.raises(AudioError, match="at most 20 s are allowed"):
        encode_audio(torch.zeros(30 * RATE), RATE, encoder)
    assert not calls


def test_integers_are_scaled() -> None:
    wanted = torch.tensor([-1.0, 0.0, 0.5])
    for dtype, values in (
        (torch.int16, [-(2**15), 0, 2**14]),
        (torch.int32, [-(2**31), 0, 2**30]),
        (torch.uint8, [0, 128, 192]),
    ):
        assert torch.equal(prepare_waveform(torch.tensor(values, dtype=dtype), RATE), wanted)
    assert torch.equal(prepare_waveform(np.array([-(2**15), 0, 2**14], np.int16), RATE), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_format_is_understood(dtype: torch.dtype) -> None:
    assert torch.equal(prepare_waveform(torch.tensor([0.5, -0.25], dtype=dtype), RATE), torch.tensor([0.5, -0.25]))


def test_channels_are_averaged() -> None:
    both = torch.rand(2, 1000)
    given = both.clone()
    assert torch.allclose(prepare_waveform(given, RATE), both.mean(dim=0))
    assert torch.equal(given, both), "the given recording was changed"


@pytest.mark.parametrize("rate", [8000, 11025, 22050.5, 44100, 48000, 192000])
def test_every_rate_is_resampled(rate: float) -> None:
    resampled = prepare_waveform(tone(rate), rate)
    wanted = tone(RATE)
    assert abs(len(resampled) - len(wanted)) <= 1
    assert relative_l2(resampled[800:7000], wanted[800:7000]) < 0.01


# ---- files


def write_file(path: Path, waveform: Tensor, rate: int, codec: str, picture: bool = False, sound: bool = True) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25) if picture else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if sound:
            stream = container.add_stream(codec, rate=rate)
            stream.layout = "stereo" if waveform.shape[0] == 2 else "mono"
            if codec == "aac":  # at its default PyAV 19's encoder spoils a block of some tones
                stream.bit_rate = 160_000
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(waveform.numpy()), format="fltp", layout=stream.layout.name
            )
            frame.sample_rate = rate
            frame.pts, frame.time_base = 0, Fraction(1, rate)
            resampler = av.AudioResampler(stream.format, stream.layout, rate, frame_size=stream.frame_size or 1024)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(stream.encode(piece))
            container.mux(stream.encode(None))
        if video is not None:
            for _ in range(10):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
            container.mux(video.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "tolerance"),
    [
        ("a.wav", "pcm_s16le", 1e-3),
        ("a.flac", "flac", 1e-3),
        ("a.m4a", "aac", 0.1),
        ("a.mp3", "mp3", 0.1),
        ("a.ogg", "opus", 0.2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_files_are_read_as_written(tmp_path: Path, name: str, codec: str, tolerance: float, channels: int) -> None:
    rate = 48000
    written = torch.stack([tone(rate, 0.7, 300 * (1 + c)) for c in range(channels)])
    waveform, read_rate = load_audio(write_file(tmp_path / name, written, rate, codec))
    assert (read_rate, waveform.shape[0], waveform.dtype) == (rate, channels, torch.float32)
    assert abs(waveform.shape[1] - written.shape[1]) <= 2500
    inner = slice(5000, 25000)
    assert relative_l2(waveform[:, inner], written[:, inner]) < tolerance, "other samples, or shifted ones"


def test_sound_of_a_video_is_read(tmp_path: Path) -> None:
    written = tone(44100)[None]
    waveform, rate = load_audio(write_file(tmp_path / "a.mp4", written, 44100, "aac", picture=True))
    assert rate == 44100
    assert relative_l2(waveform[:, 5000:15000], written[:, 5000:15000]) < 0.1


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    text, empty = tmp_path / "a.wav", tmp_path / "empty.mp3"
    text.write_text("not a recording at all, although its name says so")
    empty.touch()
    silent_film = write_file(tmp_path / "film.mp4", torch.zeros(1, 1), 16000, "aac", picture=True, sound=False)
    cases = [
        (text, "cannot be decoded"),
        (empty, "is empty"),
        (silent_film, "no audio stream"),
        (tmp_path / "absent.wav", "No such file"),
        (tmp_path, "Is a directory"),
    ]
    for path, message in cases:
        with pytest.raises(AudioError, match=message) as caught:
            load_audio(path)
        assert path.name in str(caught.value)


def test_wav_without_samples_is_refused(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.zeros((0, 1)), 16000)
    with pytest.raises(AudioError):
        load_audio(tmp_path / "a.wav")


def test_truncated_files_give_what_is_there(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.wav", tone(16000, 2)[None], 16000, "pcm_s16le")
    path.write_bytes(path.read_bytes()[: 16000 * 2])
    waveform, _ = load_audio(path)
    assert 0.9 < waveform.shape[1] / 16000 < 1.1


def test_long_files_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a.flac", tone(16000, 3)[None], 16000, "flac")
    monkeypatch.setattr(recording, "MAX_SECONDS", 2)
    monkeypatch.setattr(av, "AudioResampler", None)  # would fail if a frame got there
    with pytest.raises(AudioError, match="lasts 3 s; at most 2 s"):
        load_audio(path)


# ---- vocal separation


def test_separation_without_the_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "audio_separator.separator", None)
    model = tmp_path / "Kim_Vocal_2.onnx"
    with pytest.raises(AudioError, match="Kim_Vocal_2.onnx does not exist"):
        separate_vocals(torch.zeros(100), RATE, model)
    model.touch()
    with pytest.raises(AudioError, match=r'pip install "audio-separator\[cpu\]"'):
        separate_vocals(torch.zeros(100), RATE, model)


def test_separation_runs_the_given_model_and_touches_no_network(
    tmp_path: Path, voice: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the model: one that halves what it hears."""
    pytest.importorskip("audio_separator.separator", exc_type=ImportError)
    onnx = pytest.importorskip("onnx")

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    make, kind, shape = onnx.helper, onnx.TensorProto.FLOAT, ["batch", 4, 3072, 256]
    graph = make.make_graph(
        [make.make_node("Mul", ["input", "half"], ["output"])],
        "stand_in",
        [make.make_tensor_value_info("input", kind, shape)],
        [make.make_tensor_value_info("output", kind, shape)],
        [make.make_tensor("half", kind, [], [0.5])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "Kim_Vocal_2.onnx")
    vocals = prepare_waveform(*separate_vocals(voice, RATE, tmp_path / "Kim_Vocal_2.onnx"))
    assert relative_l2(F.normalize(vocals, dim=0), F.normalize(voice, dim=0)) < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["Kim_Vocal_2.onnx"]


def decibels(found: np.ndarray, wanted: np.ndarray) -> float:
    """Signal to distortion ratio."""
    return 10 * math.log10(float(np.square(wanted).sum() / np.square(found - wanted).sum()))


@pytest.mark.slow
def test_spectral_separation_lowers_repeating_music_and_keeps_the_voice() -> None:
    from training.toon import voices  # imports scipy

    spoken, music = voices.default_song()
    for loudness, gain in ((1, 3), (2, 5)):
        mixture = np.stack([spoken.waveform + loudness * music, 0.5 * spoken.waveform + loudness * music])
        voice, rate = separate_vocals_spectral(mixture, RATE)
        assert (voice.shape, voice.dtype, rate) == (mixture.shape, torch.float32, RATE)
        for found, mixed, share in zip(voice.numpy(), mixture, (1, 0.5)):
            wanted = share * spoken.waveform
            assert decibels(found, wanted) > decibels(mixed, wanted) + gain


def test_spectral_separation_works_in_blocks_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "_SPECTRAL_BLOCK", 7)
    monkeypatch.setattr(separation, "_without_repetition", lambda piece, _: piece.clone())
    for samples in (7 * RATE, 7 * RATE + 1, 31 * RATE + 7):
        sound = torch.rand(1, samples)
        assert relative_l2(separate_vocals_spectral(sound, RATE)[0], sound) < 1e-6


@pytest.mark.parametrize(("samples", "rate"), [(1, RATE), (2 * RATE, RATE), (30, 1), (24001, 8000), (70000, 22050.5)])
def test_spectral_separation_of_odd_recordings(samples: int, rate: float) -> None:
    for sound in (torch.zeros(samples), torch.rand(samples) - 0.5):
        voice, same = separate_vocals_spectral(sound, rate)
        assert (voice.shape, same) == ((1, samples), rate)
        assert torch.isfinite(voice).all()
    with pytest.raises(AudioError, match="not finite"):
        separate_vocals_spectral(torch.tensor([math.nan]), rate)


@pytest.mark.slow
def test_the_shipped_song_is_the_voice_over_the_music() -> None:
    shipped, rate = load_audio(ROOT / "assets" / "song.flac")
    from training.toon import voices  # imports scipy

    spoken, music = voices.default_song()
    assert rate == RATE
    assert np.abs(shipped[0].numpy() - spoken.waveform - music).max() < 1e-3


# ---- the speech encoder


def test_importing_audio_and_emotion_stays_light() -> None:
    code = (
        "import sys, memo_core.inputs.speech, memo_core.inputs.emotion;"
        "heavy = ('transformers', 'librosa', 'av', 'onnxruntime', 'soundfile', 'PIL', 'yaml');"
        "print([name for name in heavy if name in sys.modules])"
    )
    root = ROOT
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_speech_encoder_survives_saving_in_halves(encoder: SpeechEncoder, tmp_path: Path, voice: Tensor) -> None:
    encoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    again = SpeechEncoder.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    wanted, found = (encode_audio(voice, RATE, e).embeddings for e in (encoder, again))
    assert 0 < relative_l2(found, wanted) < 3e-3
    half = SpeechEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # oneDNN's grouped convolutions in bf16 are wrong on processors with AMX (torch 2.13).
    with torch.backends.mkldnn.flags(enabled=False):
        assert relative_l2(encode_audio(voice, RATE, half).embeddings, wanted) < 3e-2


def test_transformers_reads_what_is_saved(encoder: SpeechEncoder, tmp_path: Path, voice: Tensor) -> None:
    from transformers import Wav2Vec2Model

    encoder.save_pretrained(tmp_path)
    model, info = Wav2Vec2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    frames = model.feature_extractor(voice[None]).shape[-1]  # at its own rate interpolation does nothing
    with torch.no_grad():
        assert relative_l2(encoder(voice[None], frames)[:, -1], model.eval()(voice[None]).last_hidden_state[0]) < 1e-5


def test_files_with_a_ctc_head_and_old_names_load(encoder: SpeechEncoder, memo_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((memo_tiny / "wav2vec2" / "config.json").read_bytes())
    stored = {
        f"wav2vec2.{name}": value for name, value in load_file(memo_tiny / "wav2vec2" / "model.safetensors").items()
    }
    conv = "wav2vec2.encoder.pos_conv_embed.conv."
    stored[conv + "weight_g"] = stored.pop(conv + "parametrizations.weight.original0")
    stored[conv + "weight_v"] = stored.pop(conv + "parametrizations.weight.original1")
    stored |= {"lm_head.weight": torch.zeros(32, 32), "lm_head.bias": torch.zeros(32)}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    again = SpeechEncoder.from_pretrained(tmp_path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_listed(memo_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((memo_tiny / "wav2vec2" / "config.json").read_bytes())
    stored = load_file(memo_tiny / "wav2vec2" / "model.safetensors")
    del stored["encoder.layer_norm.weight"]
    stored["encoder.layer_norm.bias"] = torch.zeros(7)
    stored |= {f"strange.{i}": torch.zeros(1) for i in range(20)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing encoder.layer_norm.weight" in message
    assert "encoder.layer_norm.bias has shape (7,), expected (32,)" in message
    assert "unexpected strange.0" in message
    assert len(message.splitlines()) == 1 + 10 + 1 and "and 12 more" in message


def test_other_folders_are_refused(memo_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        SpeechEncoder.from_pretrained(tmp_path)
    config = json.loads((memo_tiny / "wav2vec2" / "config.json").read_text())
    for change in ({"model_type": "bert"}, {"do_stable_layer_norm": True}, {"add_adapter": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        (tmp_path / "model.safetensors").write_bytes((memo_tiny / "wav2vec2" / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=next(iter(change))):
            SpeechEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        SpeechEncoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        SpeechEncoder.from_pretrained(tmp_path)


def test_fresh_speech_encoder_trains_everywhere() -> None:
    torch.manual_seed(0)
    fresh = SpeechEncoder.from_config(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "conv_dim": [16] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        }
    )
    states = fresh.train()(torch.randn(3, RATE), 30)
    assert states.shape == (3, 30, 2, 32)
    states.square().mean().backward()
    assert not [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.any()]
