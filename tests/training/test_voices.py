"""Synthesised voices: the mouth is the sound's, emotions sound different, every length is exact."""

from __future__ import annotations

import dataclasses
import subprocess
import time

import numpy as np
import pytest

from memo_core.errors import AudioError
from memo_core.release import EMOTIONS
from training.toon import voices
from training.toon.voices import FPS, RATE, Utterance, estimate_mouth, sample_voice, speak

MAN = voices.Voice(pitch=110.0, tract=1.0, breath=0.1, rate=1.0, loudness=0.08, brightness=0.0, bandwidth=1.0)
NEUTRAL = EMOTIONS.index("neutral")


def spoken(emotion: int | str = NEUTRAL, seconds: float = 3.0, seed: int = 0, voice: voices.Voice = MAN) -> Utterance:
    emotion = EMOTIONS.index(emotion) if isinstance(emotion, str) else emotion
    return speak(voice, emotion, seconds, np.random.default_rng(seed))


def babble(count: int, seed: int) -> list[Utterance]:
    """Utterances of 3 s of different voices, the eight emotions in turn."""
    rng = np.random.default_rng(seed)
    return [speak(sample_voice(rng), i % 8, 3.0, rng) for i in range(count)]


def frame_levels(waveform: np.ndarray) -> np.ndarray:
    """RMS of every video frame, [F]."""
    frames = round(len(waveform) / RATE * FPS)
    edges = np.round(np.arange(frames + 1) * RATE / FPS).astype(int)
    return np.array([np.sqrt(np.mean(waveform[a:b].astype(float) ** 2)) for a, b in zip(edges[:-1], edges[1:])])


def pitch_track(waveform: np.ndarray) -> np.ndarray:
    """Fundamental frequencies of the clearly voiced parts, Hz, by autocorrelation."""
    windows = np.lib.stride_tricks.sliding_window_view(waveform.astype(float), 800)[::320]
    windows = windows[windows.std(axis=1) > 0.3 * waveform.std()] * np.hanning(800)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(windows, 2048, axis=1)) ** 2, axis=1)
    lags = np.arange(RATE // 500, RATE // 60)
    strength = correlation[:, lags] / correlation[:, :1]
    return RATE / lags[strength.argmax(axis=1)][strength.max(axis=1) > 0.5]


def columns(utterances: list[Utterance], name: str) -> np.ndarray:
    return np.concatenate([getattr(u, name) for u in utterances])


def test_a_seed_gives_the_same_utterance_and_another_seed_another() -> None:
    first, again, other = spoken(seed=4), spoken(seed=4), spoken(seed=5)
    assert np.array_equal(first.waveform, again.waveform) and np.array_equal(first.mouth_open, again.mouth_open)
    assert first.phonemes == again.phonemes != other.phonemes
    assert sample_voice(np.random.default_rng(1)) == sample_voice(np.random.default_rng(1))


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2.0, 3.0, 4.37, 20.0])
def test_sound_mouth_and_phonemes_have_the_asked_length(seconds: float) -> None:
    utterance = spoken(seconds=seconds)
    assert len(utterance.waveform) == round(seconds * RATE)
    assert len(utterance.mouth_open) == len(utterance.mouth_width) == round(seconds * FPS)
    ends = [end for _, _, end in utterance.phonemes]
    starts = [start for _, start, _ in utterance.phonemes]
    assert starts == [0.0, *ends[:-1]] and ends[-1] == pytest.approx(seconds, abs=1e-3)


def test_samples_are_finite_and_do_not_clip_and_mouths_stay_in_range() -> None:
    loud = dataclasses.replace(MAN, loudness=1.0)
    for utterance in [*babble(32, seed=1), spoken("angry", voice=loud)]:
        assert utterance.waveform.dtype == utterance.mouth_open.dtype == utterance.mouth_width.dtype == np.float32
        assert np.isfinite(utterance.waveform).all() and np.abs(utterance.waveform).max() < 0.96
        assert utterance.mouth_open.min() >= 0.0 and utterance.mouth_open.max() <= 1.0
        assert utterance.mouth_width.min() >= -1.0 and utterance.mouth_width.max() <= 1.0


def test_silence_and_closing_lips_shut_the_mouth_and_open_vowels_open_it() -> None:
    shut, wide, seen = [], [], set()
    for utterance in babble(24, seed=2):
        for symbol, start, end in utterance.phonemes:
            frame = int((start + end) / 2 * FPS)
            # A frame shows the mouth at its middle; ask where that lies well inside the sound.
            if not start + 0.02 < (frame + 0.5) / FPS < end - 0.02 or frame >= len(utterance.mouth_open):
                continue
            seen.add(symbol)
            if symbol in ("", "m", "p", "b"):
                shut.append(utterance.mouth_open[frame])
            elif symbol == "a":
                wide.append(utterance.mouth_open[frame])
    assert {"", "m", "p", "b", "a"} <= seen
    assert max(shut) < 0.02
    assert np.mean(wide) > 0.65


def test_lips_spread_for_i_and_round_for_u() -> None:
    width: dict[str, list[float]] = {"i": [], "u": []}
    for utterance in babble(24, seed=3):
        for symbol, start, end in utterance.phonemes:
            if symbol in width and end - start > 0.06:
                width[symbol].append(utterance.mouth_width[min(int((start + end) / 2 * FPS), 89)])
    assert np.mean(width["i"]) > 0.5 and np.mean(width["u"]) < -0.5


@pytest.mark.parametrize("emotion", range(8), ids=EMOTIONS[:8])
def test_the_mouth_visibly_moves_in_every_emotion(emotion: int) -> None:
    rng = np.random.default_rng(emotion)
    opened = np.concatenate([speak(sample_voice(rng), emotion, 3.0, rng).mouth_open for _ in range(8)])
    assert opened.std() >= 0.22 and opened.max() > 0.8


def test_loudness_follows_the_mouth_without_lag() -> None:
    utterances = babble(24, seed=5)
    level = np.concatenate([np.log(x / x.max() + 0.03) for x in (frame_levels(u.waveform) for u in utterances)])
    opened = columns(utterances, "mouth_open")
    by_lag = {lag: np.corrcoef(np.roll(level, lag), opened)[0, 1] for lag in range(-4, 5)}
    assert max(by_lag, key=by_lag.__getitem__) == 0
    assert by_lag[0] > 0.6


def test_pitch_is_the_voices() -> None:
    for pitch in (90.0, 150.0, 240.0):
        heard = pitch_track(spoken(seconds=4.0, voice=dataclasses.replace(MAN, pitch=pitch)).waveform)
        assert np.median(heard) == pytest.approx(pitch, rel=0.12)


def test_emotions_differ_in_pitch_loudness_pauses_and_brightness() -> None:
    said = {name: spoken(name, seconds=8.0, seed=6) for name in EMOTIONS[:8]}
    pitch = {name: pitch_track(u.waveform) for name, u in said.items()}
    level = {name: float(np.std(u.waveform)) for name, u in said.items()}
    quiet = {name: sum(e - s for p, s, e in u.phonemes if not p) for name, u in said.items()}
    spectra = {name: np.abs(np.fft.rfft(u.waveform)) ** 2 for name, u in said.items()}
    bright = {name: s[len(s) // 8 : len(s) // 2].sum() / s[: len(s) // 8].sum() for name, s in spectra.items()}

    assert np.median(pitch["fearful"]) > 1.25 * np.median(pitch["neutral"]) > 1.25 * 1.05 * np.median(pitch["sad"])
    # Percentiles: the tracker takes a formant for the pitch now and then.
    spread = {name: float(np.subtract(*np.percentile(np.log2(p), [90, 10]))) for name, p in pitch.items()}
    assert spread["happy"] > 0.55 and spread["angry"] > 0.36, "accents, in octaves"
    assert spread["happy"] > 1.7 * spread["neutral"] and spread["surprised"] > 1.7 * spread["sad"]
    assert level["angry"] > 1.3 * level["neutral"] > 1.3 * 1.3 * level["sad"]
    assert quiet["sad"] > 1.5 * quiet["happy"]
    assert bright["angry"] > 2 * bright["neutral"] > 4 * bright["sad"]
    assert len(pitch["other"]) < 0.7 * len(pitch["neutral"]), "`other` is half whispered"
    assert len(pitch["disgusted"]) < 0.5 * len(pitch["neutral"]), "creak hides the pitch"


def test_ten_seconds_take_less_than_half_a_second() -> None:
    spoken(seconds=1.0)
    taken = []
    for _ in range(3):
        start = time.process_time()
        spoken(seconds=10.0)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.5


@pytest.mark.parametrize(("emotion", "seconds"), [(8, 2.0), (-1, 2.0), (0, 0.05), (0, float("nan"))])
def test_impossible_requests_are_refused(emotion: int, seconds: float) -> None:
    with pytest.raises(AudioError, match=str(emotion if seconds == 2.0 else seconds)):
        spoken(emotion, seconds)


# --- A guessed mouth --------------------------------------------------------------------------------------------------


def test_guessed_mouth_agrees_with_the_true_one_of_unheard_voices() -> None:
    utterances = babble(32, seed=77)
    guesses = [estimate_mouth(u.waveform) for u in utterances]
    opened, width = (np.concatenate(g) for g in zip(*guesses, strict=True))
    assert np.corrcoef(opened, columns(utterances, "mouth_open"))[0, 1] > 0.85
    assert np.corrcoef(width, columns(utterances, "mouth_width"))[0, 1] > 0.5


def test_guessed_mouth_does_not_depend_on_loudness_and_shuts_in_silence() -> None:
    waveform = spoken(seed=8).waveform
    opened, _ = estimate_mouth(waveform)
    assert np.abs(estimate_mouth(0.2 * waveform)[0] - opened).max() < 0.05
    padded, _ = estimate_mouth(np.concatenate([waveform, np.zeros(RATE, np.float32)]))
    assert len(padded) == len(opened) + FPS and (padded[-FPS + 2 :] == 0).all()
    assert not np.any(estimate_mouth(np.zeros(RATE, np.float32)))


@pytest.mark.parametrize(
    "waveform", [np.zeros(10), np.zeros((2, RATE)), np.full(RATE, np.nan)], ids=["short", "two channels", "nan"]
)
def test_mouth_of_something_else_than_a_recording_is_refused(waveform: np.ndarray) -> None:
    with pytest.raises(AudioError, match="shape"):
        estimate_mouth(waveform)


# --- espeak-ng --------------------------------------------------------------------------------------------------------

needs_espeak = pytest.mark.skipif(not voices.espeak_available(), reason="espeak-ng is not installed")


@needs_espeak
def test_espeak_reads_with_a_moving_mouth_that_shuts_when_it_has_finished() -> None:
    sentence = voices.SENTENCES["en-us"][1]
    own = voices.espeak("en-us+f3", sentence)
    assert own.waveform.dtype == np.float32 and np.abs(own.waveform).max() <= 1.0
    assert len(own.waveform) > 2 * RATE and len(own.mouth_open) == round(len(own.waveform) / RATE * FPS)
    assert own.mouth_open.std() > 0.15 and own.mouth_open.max() > 0.6
    filled = voices.espeak("en-us+f3", sentence, seconds=10.0)
    assert len(filled.waveform) == 10 * RATE and (filled.mouth_open[-30:] == 0).all()
    # Not to the bit: espeak-ng's breath was once seen to differ between two calls.
    assert np.linalg.norm(filled.waveform[: len(own.waveform)] - own.waveform) < 0.1 * np.linalg.norm(own.waveform)


@needs_espeak
def test_espeak_speaks_higher_when_asked_and_reads_a_dash_as_text() -> None:
    said = [voices.espeak("en-us+m3", "no one knows our own road", pitch=pitch).waveform for pitch in (20, 80)]
    low, high = map(pitch_track, said)
    assert np.median(high) > 1.2 * np.median(low)
    assert voices.espeak("en-us", "--version and -h are only words").mouth_open.max() > 0.3


@needs_espeak
def test_random_espeak_is_as_long_as_asked_and_repeats_with_its_seed() -> None:
    first, again = (voices.random_espeak(2.0, np.random.default_rng(3)) for _ in range(2))
    assert len(first.waveform) == 2 * RATE and len(first.mouth_open) == 2 * FPS
    assert np.array_equal(first.waveform, again.waveform)


@needs_espeak
def test_every_voice_that_random_espeak_draws_exists() -> None:
    for language, sentences in voices.SENTENCES.items():
        for variant in voices.VARIANTS[:: len(voices.VARIANTS) - 1]:
            assert voices.espeak(f"{language}+{variant}", sentences[0]).mouth_open.max() > 0.3


@needs_espeak
@pytest.mark.parametrize(("name", "text"), [("zz-nobody", "hello"), ("en-us", "")])
def test_espeak_that_says_nothing_is_an_error_that_names_the_voice(name: str, text: str) -> None:
    with pytest.raises(AudioError, match=name):
        voices.espeak(name, text)


def test_without_espeak_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("espeak-ng")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(AudioError, match="not installed"):
        voices.espeak("en-us", "hello")


# --- The recording the project ships ----------------------------------------------------------------------------------


def test_default_recording_is_always_the_same_few_seconds_happy_then_neutral() -> None:
    recording, again = voices.default_voice_recording(), voices.default_voice_recording()
    assert np.array_equal(recording.waveform, again.waveform)
    seconds = len(recording.waveform) / RATE
    assert 4.0 <= seconds <= 6.0 and len(recording.mouth_open) == len(recording.mouth_width) == round(seconds * FPS)
    assert recording.phonemes[-1][2] == pytest.approx(seconds, abs=1e-3)
    happy, neutral = (pitch_track(part) for part in np.split(recording.waveform, [round(2.8 * RATE)]))
    assert np.median(happy) > 1.15 * np.median(neutral)
    assert recording.mouth_open.std() > 0.22
