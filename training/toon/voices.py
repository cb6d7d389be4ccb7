"""Toon voices: a source-filter synthesiser whose mouth is known, and espeak-ng's voices with an estimated mouth.

`speak` strings phonemes into words and words into phrases, draws a pitch contour in one of eight emotions, and filters
a glottal source and noise with moving formants (G. Fant, Acoustic Theory of Speech Production, 1960; the source is the
pulse of D. Klatt and L. Klatt, JASA 87, 1990). The same articulation gives the mouth, so that sound and picture agree
exactly.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d
from scipy.signal import resample_poly

from memo_core.errors import AudioError
from memo_core.release import EMOTIONS

RATE = 16000  # Hz
FPS = 30
CONTROL = 1000  # Hz, rate of articulation and pitch contours
HOP, WINDOW, FFT = 128, 256, 512  # samples; a filter rings on for at most FFT - WINDOW
RECORDING_SEED = 7_000_010  # no training run draws it; of 60 seeds the first whose emotions the detector hears
SONG_SEED = 7_000_100

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Utterance:
    """What was said, and how the mouth moved.

    Attributes:
        waveform: [T] float32, mono at 16 kHz, within [-1, 1].
        mouth_open: [F] float32 in [0, 1], F = round(30 T / 16000); frame f is the mouth at (f + 0.5)/30 s, the middle
            of the time it covers.
        mouth_width: [F] float32 in [-1, 1]: -1 rounded, 1 spread.
        phonemes: (symbol, start, end) in seconds, in order, "" for silence; empty where unknown.
        emotion: index into `memo_core.release.EMOTIONS`.
    """

    waveform: NDArray[np.float32]
    mouth_open: NDArray[np.float32]
    mouth_width: NDArray[np.float32]
    phonemes: tuple[tuple[str, float, float], ...]
    emotion: int


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        pitch: mean fundamental frequency of neutral speech, Hz.
        tract: formant frequencies relative to a man's of average size (a shorter vocal tract has higher ones).
        breath: 0 clear to 1 breathy.
        rate: speed relative to about 4.5 syllables a second.
        loudness: RMS of neutral speech.
        brightness: spectral tilt above 500 Hz, dB per octave.
        bandwidth: widths of the formants relative to the usual ones.
    """

    pitch: float
    tract: float
    breath: float
    rate: float
    loudness: float
    brightness: float
    bandwidth: float


def sample_voice(rng: np.random.Generator) -> Voice:
    """A random man, woman or child."""
    size = rng.uniform(0.0, 1.0)  # 0 a deep voice in a long tract, 1 a child
    return Voice(
        pitch=float(95.0 * 3.0**size * rng.uniform(0.92, 1.08)),
        tract=float(0.92 + 0.38 * size + rng.uniform(-0.05, 0.05)),
        breath=float(rng.uniform(0.0, 0.5)),
        rate=float(rng.uniform(0.88, 1.12)),
        loudness=float(rng.uniform(0.05, 0.11)),
        brightness=float(rng.uniform(-1.0, 1.0)),
        bandwidth=float(rng.uniform(0.8, 1.3)),
    )


# --- Phonemes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Phoneme:
    """Targets of one sound: a man's formants (Hz), the sources' levels, the lips.

    `width` None leaves the lips to the neighbouring vowel. `noise` is the level of frication, centred at `hiss` Hz; a
    stop keeps it for its burst.
    """

    seconds: float
    formants: tuple[float, float, float]
    voiced: float = 1.0
    aspiration: float = 0.0
    noise: float = 0.0
    hiss: float = 3000.0
    hiss_octaves: float = 0.5
    open: float = 0.0
    width: float | None = None
    stop: bool = False
    nasal: bool = False
    lips_shut: bool = False


def _vowel(f1: float, f2: float, f3: float, open: float, width: float) -> Phoneme:
    return Phoneme(seconds=0.125, formants=(f1, f2, f3), open=open, width=width)


VOWELS = {
    "i": _vowel(280, 2250, 2950, 0.30, 0.95),
    "ɪ": _vowel(400, 1950, 2550, 0.42, 0.60),
    "e": _vowel(430, 2080, 2650, 0.50, 0.75),
    "ɛ": _vowel(570, 1800, 2500, 0.70, 0.50),
    "æ": _vowel(700, 1680, 2450, 0.90, 0.55),
    "a": _vowel(780, 1280, 2500, 1.00, 0.20),
    "ɑ": _vowel(740, 1080, 2450, 1.00, -0.05),
    "ʌ": _vowel(630, 1220, 2450, 0.80, 0.05),
    "ə": _vowel(500, 1450, 2450, 0.55, 0.00),
    "ɔ": _vowel(580, 870, 2450, 0.75, -0.55),
    "o": _vowel(450, 800, 2400, 0.52, -0.80),
    "ʊ": _vowel(430, 1050, 2300, 0.42, -0.60),
    "u": _vowel(310, 850, 2280, 0.28, -1.00),
    "y": _vowel(290, 1880, 2180, 0.26, -0.85),
}
CONSONANTS = {
    "m": Phoneme(seconds=0.085, formants=(260, 1000, 2200), voiced=0.45, nasal=True, lips_shut=True),
    "n": Phoneme(seconds=0.070, formants=(270, 1650, 2550), voiced=0.45, nasal=True, open=0.18),
    "ŋ": Phoneme(seconds=0.075, formants=(280, 2100, 2700), voiced=0.40, nasal=True, open=0.30),
    "p": Phoneme(
        seconds=0.105, formants=(300, 850, 2200), voiced=0, noise=0.5, hiss=900, hiss_octaves=1.2, aspiration=0.6,
        stop=True, lips_shut=True
    ),
    "b": Phoneme(
        seconds=0.085, formants=(260, 900, 2200), voiced=0.15, noise=0.3, hiss=800, hiss_octaves=1.2, stop=True,
        lips_shut=True
    ),
    "t": Phoneme(
        seconds=0.095, formants=(320, 1750, 2650), voiced=0, noise=1.0, hiss=4500, aspiration=0.5, stop=True,
        open=0.15
    ),
    "d": Phoneme(seconds=0.075, formants=(280, 1720, 2600), voiced=0.15, noise=0.6, hiss=4000, stop=True, open=0.15),
    "k": Phoneme(
        seconds=0.100, formants=(320, 1900, 2300), voiced=0, noise=0.9, hiss=2000, aspiration=0.6, stop=True,
        open=0.28
    ),
    "g": Phoneme(seconds=0.080, formants=(280, 1850, 2250), voiced=0.15, noise=0.5, hiss=1900, stop=True, open=0.28),
    "f": Phoneme(
        seconds=0.095, formants=(320, 1100, 2200), voiced=0, noise=0.30, hiss=5500, hiss_octaves=1.3, open=0.06,
        width=0.1
    ),
    "v": Phoneme(
        seconds=0.070, formants=(280, 1100, 2200), voiced=0.45, noise=0.15, hiss=5000, hiss_octaves=1.3, open=0.06,
        width=0.1
    ),
    "θ": Phoneme(
        seconds=0.090, formants=(320, 1400, 2600), voiced=0, noise=0.25, hiss=6200, hiss_octaves=0.9, open=0.22
    ),
    "s": Phoneme(
        seconds=0.100, formants=(320, 1650, 2600), voiced=0, noise=0.85, hiss=6000, hiss_octaves=0.3, open=0.10,
        width=0.45
    ),
    "z": Phoneme(
        seconds=0.080, formants=(280, 1650, 2600), voiced=0.4, noise=0.55, hiss=5800, hiss_octaves=0.3, open=0.10,
        width=0.45
    ),
    "ʃ": Phoneme(
        seconds=0.105, formants=(320, 1750, 2400), voiced=0, noise=1.0, hiss=3000, hiss_octaves=0.4, open=0.18,
        width=-0.6
    ),
    "ʒ": Phoneme(
        seconds=0.085, formants=(280, 1700, 2350), voiced=0.4, noise=0.6, hiss=2900, hiss_octaves=0.4, open=0.18,
        width=-0.6
    ),
    "x": Phoneme(
        seconds=0.090, formants=(380, 1500, 2300), voiced=0, noise=0.7, hiss=1700, hiss_octaves=0.4, open=0.35
    ),
    "h": Phoneme(seconds=0.065, formants=(520, 1500, 2450), voiced=0.1, aspiration=1.0, open=0.50),
    "l": Phoneme(seconds=0.065, formants=(360, 1250, 2750), voiced=0.65, open=0.35),
    "r": Phoneme(seconds=0.070, formants=(380, 1250, 1650), voiced=0.65, open=0.28, width=-0.35),
    "j": Phoneme(seconds=0.060, formants=(270, 2250, 3000), voiced=0.7, open=0.24, width=0.8),
    "w": Phoneme(seconds=0.070, formants=(290, 700, 2200), voiced=0.6, open=0.10, width=-1.0),
}
SILENCE = Phoneme(seconds=0.3, formants=(500, 1450, 2450), voiced=0.0, width=0.0)
PHONEMES = {"": SILENCE, **VOWELS, **CONSONANTS}

_VOWEL_SYMBOLS, _ONSETS = tuple(VOWELS), tuple(c for c in CONSONANTS if c != "ŋ")
_CODAS = ("m", "n", "ŋ", "p", "t", "k", "d", "f", "s", "z", "ʃ", "l", "r")
# Lips that close are seen best, and open vowels after them: both come more often than chance.
_VOWEL_SHARES = np.array([1.3 if VOWELS[v].open > 0.6 else 0.9 for v in _VOWEL_SYMBOLS])
_ONSET_SHARES = np.array([2.0 if CONSONANTS[c].lips_shut else 1.0 for c in _ONSETS])


# --- Emotions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prosody:
    """How an emotion sounds, relative to the voice.

    Attributes:
        pitch: factor of the mean pitch.
        accent: rise on stressed syllables, semitones.
        wander: standard deviation of slow random pitch motion, semitones.
        slope: pitch change over a word, semitones; positive rises.
        declination: pitch change over a phrase, semitones.
        glide: pitch change within every syllable, semitones.
        tremor: depth (semitones) of a pitch and loudness tremor of 6.5 Hz.
        jitter: relative standard deviation of the pitch from one millisecond to the next; a period averages it.
        creak: 0 to 1, how much weaker every second glottal pulse is.
        voicing: level of the glottal source; what is missing is breath.
        breath: added aspiration.
        tilt: spectral tilt above 500 Hz, dB per octave.
        rate: factor of the speed; `stretch` of the vowels' length alone.
        pause: probability of a pause after a word, and its mean length in seconds.
        gain: factor of the loudness.
        opening: factor of the mouth's opening.
    """

    pitch: float = 1.0
    accent: float = 1.5
    wander: float = 0.5
    slope: float = 0.0
    declination: float = -1.5
    glide: float = 0.0
    tremor: float = 0.0
    jitter: float = 0.008
    creak: float = 0.0
    voicing: float = 1.0
    breath: float = 0.0
    tilt: float = 0.0
    rate: float = 1.0
    stretch: float = 1.0
    pause: tuple[float, float] = (0.25, 0.22)
    gain: float = 1.0
    opening: float = 1.0


PROSODY = dict(
    angry=Prosody(
        pitch=1.25, accent=4.0, wander=0.8, slope=-3.0, jitter=0.1, tilt=5.0, rate=1.15, pause=(0.2, 0.12),
        gain=1.7, opening=1.1
    ),
    disgusted=Prosody(
        pitch=0.78, accent=0.8, glide=-3.5, jitter=0.04, creak=0.7, tilt=1.0, rate=0.9, stretch=1.35,
        pause=(0.3, 0.25), gain=0.9, opening=0.95
    ),
    fearful=Prosody(
        pitch=1.5, accent=1.0, wander=0.8, tremor=1.2, jitter=0.02, breath=0.5, tilt=-1.0, rate=1.3,
        pause=(0.45, 0.12), gain=0.8, opening=0.95
    ),
    happy=Prosody(
        pitch=1.3, accent=6.0, wander=2.0, slope=1.0, declination=0.0, tilt=2.5, rate=1.1, pause=(0.15, 0.15),
        gain=1.2, opening=1.05
    ),
    neutral=Prosody(),
    other=Prosody(accent=0.3, wander=0.2, declination=0.0, voicing=0.12, breath=1.6, tilt=1.0, gain=0.6, rate=0.95),
    sad=Prosody(
        pitch=0.88, accent=0.6, wander=0.4, declination=-3.5, glide=-1.0, breath=0.25, tilt=-6.0, rate=0.75,
        pause=(0.5, 0.4), gain=0.55, opening=0.9
    ),
    surprised=Prosody(
        pitch=1.35, accent=1.5, wander=0.6, slope=9.0, declination=2.0, breath=0.2, tilt=0.5, rate=1.0, stretch=1.15,
        pause=(0.5, 0.25), gain=1.2, opening=1.1
    ),
)


# --- Speaking ---------------------------------------------------------------------------------------------------------


@dataclass
class _Score:
    """The phonemes of an utterance, column by column, before they become contours."""

    symbols: list[str]
    seconds: list[float]
    stress: list[float]  # 1 usual
    syllable: list[int]  # -1 in pauses
    word: list[int]
    phrase: list[int]
    vowel: list[str]  # of the syllable


def _compose(prosody: Prosody, rate: float, seconds: float, rng: np.random.Generator) -> _Score:
    """Random words and pauses that fill `seconds`; the last 60 ms are silence."""
    score = _Score([], [], [], [], [], [], [])
    at, syllable, word, phrase = 0.0, -1, -1, 0

    def add(symbol: str, length: float, stress: float, vowel: str) -> None:
        nonlocal at
        score.symbols.append(symbol)
        score.seconds.append(length)
        score.stress.append(stress)
        score.syllable.append(syllable if symbol else -1)
        score.word.append(word if symbol else -1)
        score.phrase.append(phrase)
        score.vowel.append(vowel)
        at += length

    add("", rng.uniform(0.03, 0.2), 1.0, "ə")
    speed = prosody.rate * rate
    while at < seconds:
        word += 1
        count = 1 + int(rng.choice(4, p=(0.2, 0.4, 0.28, 0.12)))
        strong = int(rng.integers(count))
        for i in range(count):
            syllable += 1
            stress = rng.uniform(1.0, 1.2) if i == strong else rng.uniform(0.7, 0.95)
            vowel = str(rng.choice(_VOWEL_SYMBOLS, p=_VOWEL_SHARES / _VOWEL_SHARES.sum()))
            symbols = [vowel]
            if rng.random() < 0.85:
                symbols.insert(0, str(rng.choice(_ONSETS, p=_ONSET_SHARES / _ONSET_SHARES.sum())))
            if rng.random() < 0.3:
                symbols.append(str(rng.choice(_CODAS)))
            for symbol in symbols:
                length = PHONEMES[symbol].seconds * rng.uniform(0.85, 1.15) / speed
                if symbol == vowel:
                    length *= stress * prosody.stretch
                add(symbol, max(length, 0.05), stress, vowel)
        chance, mean = prosody.pause
        if rng.random() < chance:
            phrase += 1
            add("", mean * rng.uniform(0.6, 1.4), 1.0, "ə")
    # Cut what is too long: the last sounds end early and the mouth shuts.
    end = seconds - 0.06
    while at - score.seconds[-1] > end:
        at -= score.seconds[-1]
        for column in vars(score).values():
            column.pop()
    score.seconds[-1] -= at - end
    add("", 0.06, 1.0, "ə")
    return score


def _held(values: list[float] | Array, counts: NDArray[np.int64]) -> Array:
    return np.repeat(np.asarray(values, dtype=np.float64), counts)


def _drift(rng: np.random.Generator, length: int, sigma: float) -> Array:
    """Smooth noise of unit variance that changes over `sigma` control samples."""
    noise = gaussian_filter1d(rng.standard_normal(length + 8 * int(sigma) + 8), sigma)[4 * int(sigma) :][:length]
    return noise * np.sqrt(2.0 * np.sqrt(np.pi) * sigma)


def _progress(groups: NDArray[np.int64]) -> Array:
    """0 to 1 within every run of equal numbers."""
    edges = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1, append=groups[-1] + 1))
    lengths = np.diff(edges)
    return (np.arange(len(groups)) - np.repeat(edges[:-1], lengths)) / np.repeat(lengths, lengths)


def _pitch(score: _Score, counts: NDArray[np.int64], voice: Voice, prosody: Prosody, rng: np.random.Generator) -> Array:
    """Fundamental frequency at the control rate, Hz."""
    length = int(counts.sum())
    words, syllables, phrases = (np.repeat(np.asarray(g), counts) for g in (score.word, score.syllable, score.phrase))
    accented = _held([s > 1.0 for s in score.stress], counts) * (syllables >= 0)
    semitones = (
        prosody.declination * (_progress(phrases) - 0.5)
        + prosody.slope * (_progress(words) - 0.5) * (words >= 0)
        + prosody.glide * (_progress(syllables) - 0.5) * (syllables >= 0)
        + prosody.accent * accented
    )
    semitones = gaussian_filter1d(semitones, 25.0)
    semitones += prosody.wander * _drift(rng, length, 150.0)
    time = np.arange(length) / CONTROL
    semitones += prosody.tremor * np.sin(2 * np.pi * (6.5 * time + 0.4 * _drift(rng, length, 200.0) + rng.random()))
    semitones += 12.0 * np.log2(1.0 + np.clip(prosody.jitter * rng.standard_normal(length), -0.6, 0.6))
    return np.clip(voice.pitch * prosody.pitch * 2.0 ** (semitones / 12.0), 50.0, 700.0)


def _mouth(score: _Score, counts: NDArray[np.int64], opening: float) -> tuple[Array, Array]:
    """Opening and width of the lips at the control rate."""
    targets, widths = [], []
    for symbol, stress, vowel in zip(score.symbols, score.stress, score.vowel, strict=True):
        phoneme = PHONEMES[symbol]
        target = phoneme.open
        if symbol in VOWELS:
            target *= opening * (0.35 + 0.65 * stress)
        elif target and phoneme.width is None:
            target = 0.75 * target + 0.25 * VOWELS[vowel].open * target  # the tongue is busy, the jaw follows the vowel
        targets.append(target)
        widths.append(phoneme.width if phoneme.width is not None else 0.6 * VOWELS[vowel].width)
    opened = gaussian_filter1d(_held(targets, counts), 22.0)
    width = gaussian_filter1d(_held(widths, counts), 35.0)
    shut = _held([PHONEMES[s].lips_shut or not s for s in score.symbols], counts)
    # Lips that meet stay together for the whole sound, and open as fast as they can.
    opened *= 1.0 - uniform_filter1d((uniform_filter1d(shut, 21) > 0).astype(np.float64), 31)
    return np.clip(opened, 0.0, 1.0), np.clip(width, -1.0, 1.0)


def _levels(score: _Score, counts: NDArray[np.int64], voice: Voice, prosody: Prosody) -> tuple[Array, Array, Array]:
    """Levels of glottal pulses, aspiration and frication at the control rate."""
    voiced, breath, noise = (np.zeros(int(counts.sum())) for _ in range(3))
    start = 0
    for symbol, stress, count in zip(score.symbols, score.stress, counts.tolist(), strict=True):
        phoneme, end = PHONEMES[symbol], start + count
        if phoneme.stop:
            burst = max(start, end - min(max(count // 3, 12), 30))
            voiced[start:burst] = phoneme.voiced
            noise[burst : burst + 12] = phoneme.noise * stress
            breath[burst:end] = phoneme.aspiration * 0.6
            if phoneme.voiced:
                voiced[burst:end] = 0.4
        else:
            voiced[start:end] = phoneme.voiced * stress
            noise[start:end] = phoneme.noise
            breath[start:end] = phoneme.aspiration
        start = end
    breath += voiced * (0.25 * voice.breath + prosody.breath)
    voiced *= prosody.voicing
    return tuple(gaussian_filter1d(level, 4.0) for level in (voiced, breath, noise))


def _to_samples(control: Array, length: int) -> Array:
    return np.interp(np.arange(length) / RATE, (np.arange(len(control)) + 0.5) / CONTROL, control)


def _glottis(pitch: Array, creak: float, length: int, rng: np.random.Generator) -> Array:
    """Derivative of the glottal flow, [T]: one pulse a period, open for 60% of it."""
    phase = rng.random() + np.cumsum(_to_samples(pitch, length)) / RATE
    cycle = np.floor(phase)
    x = (phase - cycle) / 0.6
    return np.where(x < 1.0, 2.0 * x - 3.0 * x * x, 0.0) * (1.0 - creak * (cycle % 2))


_BINS = np.arange(FFT // 2 + 1) * (RATE / FFT)
_Z1 = np.exp(-2j * np.pi * _BINS / RATE).astype(np.complex64)
_Z2 = _Z1 * _Z1
_OCTAVES = np.log2(np.maximum(_BINS, 1.0)).astype(np.float32)
_TILT = np.maximum(_OCTAVES - np.log2(500.0), 0.0).astype(np.float32)
_HANN = np.hanning(WINDOW + 1)[:WINDOW]


def _tract(formants: Array, widths: Array) -> NDArray[np.complex64]:
    """Responses [N, FFT/2 + 1] of cascaded resonators with centres and bandwidths [N, K] in Hz, each 1 at 0 Hz."""
    radius = np.exp(-np.pi * widths / RATE)
    a1, a2 = -2.0 * radius * np.cos(2 * np.pi * formants / RATE), radius * radius
    response = np.ones((len(formants), len(_BINS)), dtype=np.complex64)
    for k in range(formants.shape[1]):
        response *= 1.0 + a1[:, k, None].astype(np.float32) * _Z1 + a2[:, k, None].astype(np.float32) * _Z2
    return np.prod(1.0 + a1 + a2, axis=1)[:, None].astype(np.float32) / response


def _frames(signal: Array, count: int) -> NDArray[np.complex64]:
    """Spectra [count, FFT/2 + 1] of Hann windows centred on every HOP-th sample."""
    padded = np.pad(signal, (WINDOW // 2, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: count * HOP : HOP]
    return np.fft.rfft((windows * _HANN).astype(np.float32), FFT, axis=1).astype(np.complex64)


def _overlap_add(spectra: NDArray[np.complex64], length: int) -> Array:
    pieces = np.fft.irfft(spectra, FFT, axis=1)
    count, steps = len(pieces), FFT // HOP
    out = np.zeros((count + steps, HOP))
    for i in range(steps):
        out[i : i + count] += pieces[:, i * HOP : (i + 1) * HOP]
    return out.ravel()[WINDOW // 2 :][:length]


def speak(voice: Voice, emotion: int, seconds: float, rng: np.random.Generator) -> Utterance:
    """A voice says random words in an emotion.

    Args:
        voice: who speaks.
        emotion: 0 to 7, an index into `memo_core.release.EMOTIONS`.
        seconds: exact length of the result, at least 0.1.
        rng: the same state gives the same utterance.

    Raises:
        AudioError: if `seconds` is too short or `emotion` has no prosody.
    """
    if not 0 <= emotion < len(PROSODY):
        raise AudioError(f"a voice speaks with emotion 0 to {len(PROSODY) - 1}, got {emotion}")
    if not seconds >= 0.1:
        raise AudioError(f"an utterance lasts at least 0.1 s, got {seconds}")
    prosody = PROSODY[EMOTIONS[emotion]]
    score = _compose(prosody, voice.rate, seconds, rng)
    ends = np.round(np.cumsum(score.seconds) * CONTROL).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    length = round(seconds * RATE)

    opened, width = _mouth(score, counts, prosody.opening)
    voiced, breath, noise = _levels(score, counts, voice, prosody)
    time = np.arange(len(opened)) / CONTROL
    tremble = 1.0 + 0.25 * prosody.tremor * np.sin(2 * np.pi * 6.5 * time + rng.uniform(0, 6.3))
    swell = 10 ** (0.12 * _drift(rng, len(opened), 120.0)) * tremble

    # Formants glide between the sounds' targets; a consonant leans towards its vowel, a wider jaw raises the first one.
    own = np.array([PHONEMES[s].formants for s in score.symbols], dtype=np.float64)
    near = np.array([VOWELS[v].formants for v in score.vowel], dtype=np.float64)
    lean = np.array([0.0 if s in VOWELS else 0.3 for s in score.symbols])[:, None]
    targets = own + lean * (near - own)
    targets[:, 0] = own[:, 0]
    targets[:, 0] *= [0.75 + 0.25 * s if y in VOWELS else 1.0 for s, y in zip(score.stress, score.symbols, strict=True)]
    formants = gaussian_filter1d(np.repeat(targets, counts, axis=0), 14.0, axis=0)

    count = length // HOP + 2
    at = np.minimum(np.arange(count) * HOP * CONTROL // RATE, len(opened) - 1)
    centres = np.concatenate([formants[at], np.broadcast_to([3500.0, 4500.0], (count, 2))], axis=1) * voice.tract
    nasal = gaussian_filter1d(_held([PHONEMES[s].nasal for s in score.symbols], counts), 8.0)[at]
    widths = np.array([70.0, 90.0, 140.0, 220.0, 350.0]) * voice.bandwidth * (1.0 + 2.0 * nasal[:, None])
    response = _tract(np.minimum(centres, 7600.0), widths)
    response *= 10.0 ** ((prosody.tilt + voice.brightness) * _TILT / 20.0)

    hiss = _held([PHONEMES[s].hiss for s in score.symbols], counts)[at, None]
    octaves = _held([PHONEMES[s].hiss_octaves for s in score.symbols], counts)[at, None]
    band = np.exp(-0.5 * ((_OCTAVES - np.log2(hiss)) / octaves) ** 2).astype(np.float32)

    pitch = _pitch(score, counts, voice, prosody, rng)
    glottal = _glottis(pitch, prosody.creak, length, rng) * _to_samples(voiced * swell, length)
    white = rng.standard_normal((2, length))
    spectra = _frames(glottal + 0.12 * white[0] * _to_samples(breath * swell, length), count) * response
    spectra += _frames(0.25 * white[1] * _to_samples(noise * swell, length), count) * band
    waveform = _overlap_add(spectra, length)

    loud = waveform[np.abs(waveform) > 0.1 * np.abs(waveform).max()]
    waveform *= voice.loudness * prosody.gain / (np.sqrt(np.mean(loud**2)) if loud.any() else 1.0)
    waveform += 1e-4 * rng.standard_normal(length)  # no recording is perfectly silent
    waveform *= min(1.0, 0.95 / np.abs(waveform).max())

    frames = round(seconds * FPS)
    middle = np.minimum(((np.arange(frames) + 0.5) * CONTROL / FPS).astype(np.int64), len(opened) - 1)
    starts = (ends - counts) / CONTROL
    spans = zip(score.symbols, starts.tolist(), (ends / CONTROL).tolist(), strict=True)
    return Utterance(
        waveform.astype(np.float32),
        opened[middle].astype(np.float32),
        width[middle].astype(np.float32),
        tuple(spans),
        emotion,
    )


# --- A mouth for a voice whose mouth nobody saw -----------------------------------------------------------------------

_EDGES = 80.0 * (7900.0 / 80.0) ** (np.arange(13) / 12)  # Hz
_LISTEN = 800  # samples heard for one frame, 50 ms
_FLOOR = 6.0  # nepers (of energy) under the loud parts where silence begins
SLIT = 0.06  # an estimated opening below it is silence or closed lips
_CALIBRATION = (160, 3.0)  # utterances, seconds each


def _loudness(waveform: NDArray[np.floating]) -> Array:
    """What the mouth is estimated from, [F, K]: log energies of 12 bands and in all, their neighbours and products.

    Energies are relative to the utterance's loud parts; half of its mean spectrum is removed, for voices are bright or
    dark. The last column is the level in all, 0 in silence to 1.
    """
    frames = round(len(waveform) / RATE * FPS)
    middle = ((np.arange(frames) + 0.5) * RATE / FPS).astype(np.int64)
    padded = np.pad(np.asarray(waveform, dtype=np.float64), _LISTEN)
    heard = padded[(middle + _LISTEN // 2)[:, None] + np.arange(_LISTEN)] * np.hanning(_LISTEN)
    power = np.abs(np.fft.rfft(heard, 1024, axis=1)) ** 2
    frequencies = np.fft.rfftfreq(1024, 1 / RATE)
    edges = zip(_EDGES[:-1], _EDGES[1:], strict=True)
    energy = np.stack([power[:, (frequencies >= a) & (frequencies < b)].sum(axis=1) for a, b in edges], axis=1)
    total = energy.sum(axis=1)
    loud = np.percentile(total, 95) + 1e-9
    level = np.log(energy / loud + np.exp(-_FLOOR)) + _FLOOR
    speaking = total > loud * np.exp(-4.0)
    if speaking.any():
        mean = level[speaking].mean(axis=0)
        level -= 0.5 * (mean - mean.mean())
    whole = np.log(total / loud + np.exp(-_FLOOR)) / _FLOOR + 1.0
    now = np.column_stack([level / _FLOOR, total / loud / _FLOOR, whole])
    around = np.pad(now, ((1, 1), (0, 0)), mode="edge")
    i, j = np.triu_indices(now.shape[1])
    return np.column_stack([around[:-2], now, around[2:], now[:, i] * now[:, j], np.ones(frames), whole])


@lru_cache(maxsize=1)
def _calibration() -> Array:
    """Ridge regression [K, 2] from sound to opening and width, on synthesised utterances, which know both."""
    rng = np.random.default_rng(0)
    count, seconds = _CALIBRATION
    spoken = [speak(sample_voice(rng), i % len(PROSODY), seconds, rng) for i in range(count)]
    heard = np.concatenate([_loudness(u.waveform) for u in spoken])
    seen = np.concatenate([np.column_stack([u.mouth_open, u.mouth_width]) for u in spoken])
    return np.linalg.solve(heard.T @ heard + np.eye(heard.shape[1]), heard.T @ seen)


def estimate_mouth(waveform: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How open and how wide the mouth of a speaker is, guessed from the sound alone.

    On held-out synthesised voices the guesses correlate 0.91 (opening) and 0.67 (width) with the truth. The first call
    of a process calibrates the estimate, which takes about three seconds.

    Args:
        waveform: [T], mono at 16 kHz, clean speech.

    Returns:
        mouth_open [F] in [0, 1] and mouth_width [F] in [-1, 1], F = round(30 T / 16000); closed in silence.

    Raises:
        AudioError: if the waveform is not one channel of at least 0.1 s of finite samples.
    """
    if waveform.ndim != 1 or len(waveform) < 0.1 * RATE or not np.isfinite(waveform).all():
        wanted = f"[T] finite samples, at least 0.1 s at {RATE} Hz"
        raise AudioError(f"a mouth is estimated from {wanted}, got shape {tuple(waveform.shape)}")
    heard = _loudness(waveform)
    opened, width = (heard @ _calibration()).T
    if np.abs(waveform).max() < 1e-3:  # nothing but noise: there are no loud parts to compare with
        opened, width = np.zeros_like(opened), np.zeros_like(width)
    opened = opened * np.clip((heard[:, -1] - 0.03) / 0.12, 0.0, 1.0)
    opened = np.where(opened < SLIT, 0.0, opened)
    return np.clip(opened, 0.0, 1.0).astype(np.float32), np.clip(width, -1.0, 1.0).astype(np.float32)


# --- espeak-ng --------------------------------------------------------------------------------------------------------

SENTENCES = {
    "en-us": (
        "Good morning, would you like to hear what happened on the bus today?",
        "My brother bought a blue umbrella, and by the evening it was gone.",
        "Paper boats float better than people think they might.",
        "We may move the big piano up to the balcony, if the rope holds.",
        "Oh, that is wonderful, I had almost given up hope!",
    ),
    "en-gb": (
        "The baker puts the bread out before five, and the whole street smells of it.",
        "Perhaps we ought to walk home by the harbour, since the moon is so bright.",
        "Nobody warned me about the muddy path behind the farm.",
        "Two small boys were feeding apples to a very patient pony.",
    ),
    "de": (
        "Am Abend bringt meine Mutter warme Suppe und ein Buch mit.",
        "Der alte Baum vor dem Haus blüht immer noch jedes Frühjahr.",
        "Ich habe heute Morgen beim Bäcker zwei Brötchen vergessen.",
        "Wo ist bloß die blaue Mappe mit den Bildern geblieben?",
    ),
    "fr": (
        "Mon ami habite une petite maison au bord de la mer.",
        "Demain matin nous prendrons le bateau pour voir le phare.",
        "Il pleut beaucoup, mais le marché reste ouvert jusqu'à midi.",
        "Pourquoi n'as-tu pas emporté ton parapluie vert ?",
    ),
    "es": (
        "La abuela prepara pan con miel para toda la familia.",
        "Mañana vamos a pasear por el puerto con mis primos.",
        "El perro del vecino duerme siempre bajo la mesa del patio.",
        "¿Quién ha dejado abierta la ventana de la cocina?",
    ),
    "it": (
        "La bambina ha perso una palla rossa sulla spiaggia.",
        "Domani mattina beviamo un buon caffè davanti al porto.",
        "Mio padre porta sempre il pane a casa prima di cena.",
        "Ma che bella sorpresa, non ti aspettavo così presto!",
    ),
}
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7")


def espeak_available() -> bool:
    """Whether the espeak-ng program is installed."""
    return shutil.which("espeak-ng") is not None


def espeak(
    voice_name: str,
    text: str,
    seconds: float | None = None,
    emotion: int = EMOTIONS.index("neutral"),
    pitch: int = 50,
    speed: int = 160,
    amplitude: int = 100,
) -> Utterance:
    """Text read aloud by espeak-ng, with an estimated mouth (`estimate_mouth`).

    Args:
        voice_name: language and variant, for example "en-us+f3" (`espeak-ng --voices`).
        text: what is read, in that language.
        seconds: cut, or filled with silence, to this length; None keeps espeak-ng's.
        emotion: 0 to 7; shifts pitch and speed (`PROSODY`), which is all that espeak-ng offers.
        pitch: 0 to 99.
        speed: words a minute, 80 to 450.
        amplitude: 0 to 200; above about 100 espeak-ng may clip.

    Raises:
        AudioError: if espeak-ng is not installed, does not know the voice, or says nothing.
    """
    if not 0 <= emotion < len(PROSODY):
        raise AudioError(f"a voice speaks with emotion 0 to {len(PROSODY) - 1}, got {emotion}")
    prosody = PROSODY[EMOTIONS[emotion]]
    pitch = int(np.clip(pitch + 60.0 * np.log2(prosody.pitch), 0, 99))
    speed = int(np.clip(speed * prosody.rate, 80, 450))
    options = ["-v", voice_name, "-p", str(pitch), "-s", str(speed), "-a", str(amplitude)]
    try:
        done = subprocess.run(
            ["espeak-ng", *options, "--stdin", "--stdout"], input=text.encode(), capture_output=True, timeout=60
        )
    except FileNotFoundError:
        raise AudioError("espeak-ng is not installed; install it, or use training.voices.speak instead") from None
    if done.returncode or len(done.stdout) <= 44:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise AudioError(f"espeak-ng said nothing with voice {voice_name!r}: {reason[0] if reason else 'empty text?'}")
    # espeak-ng does not know the length when it writes the 44 bytes of header, so a WAV reader would reject it.
    rate = int.from_bytes(done.stdout[24:28], "little")
    spoken = np.frombuffer(done.stdout[44 : len(done.stdout) // 2 * 2], dtype="<i2") / 32768.0
    waveform = np.clip(resample_poly(spoken, RATE, rate), -1.0, 1.0)
    length = len(waveform) if seconds is None else round(seconds * RATE)
    waveform = np.pad(waveform[:length], (0, max(0, length - len(waveform)))).astype(np.float32)
    opened, width = estimate_mouth(waveform)
    return Utterance(waveform, opened, width, (), emotion)


def random_espeak(seconds: float, rng: np.random.Generator, emotion: int = EMOTIONS.index("neutral")) -> Utterance:
    """`seconds` of a random espeak-ng voice in a random language, from sentences written for this.

    Raises:
        AudioError: if espeak-ng is not installed.
    """
    language = str(rng.choice(list(SENTENCES)))
    sentences = rng.permutation(SENTENCES[language])[: 1 + int(seconds // 2)]
    return espeak(
        f"{language}+{rng.choice(VARIANTS)}",
        " ".join(sentences),
        seconds,
        emotion,
        pitch=int(rng.integers(25, 80)),
        speed=int(rng.integers(130, 200)),
        amplitude=int(rng.integers(40, 110)),
    )


# --- The recordings the project ships ---------------------------------------------------------------------------------


def default_voice_recording() -> Utterance:
    """A woman's voice that no training run draws: 2.8 s happy, then 2.4 s neutral; `emotion` is the first one's."""
    rng = np.random.default_rng(RECORDING_SEED)
    voice = Voice(pitch=195.0, tract=1.12, breath=0.15, rate=0.97, loudness=0.09, brightness=0.5, bandwidth=1.0)
    first, second = (speak(voice, EMOTIONS.index(name), s, rng) for name, s in (("happy", 2.8), ("neutral", 2.4)))
    later = tuple((symbol, start + 2.8, end + 2.8) for symbol, start, end in second.phonemes)
    return Utterance(
        np.concatenate([first.waveform, second.waveform]),
        np.concatenate([first.mouth_open, second.mouth_open]),
        np.concatenate([first.mouth_width, second.mouth_width]),
        first.phonemes + later,
        first.emotion,
    )


def default_song() -> tuple[Utterance, NDArray[np.float32]]:
    """A man's voice that no training run draws, 6 s, and the quiet music [T] to lay under it.

    The music is a loop of four chords and a bass, half a second each, three times over: assets/song.flac is the sum.
    """
    voice = Voice(pitch=125.0, tract=0.97, breath=0.15, rate=0.95, loudness=0.09, brightness=0.5, bandwidth=1.0)
    spoken = speak(voice, EMOTIONS.index("happy"), 6.0, np.random.default_rng(SONG_SEED))
    time = np.arange(RATE // 2) / RATE
    swell = np.minimum(time / 0.01, 1.0) * np.exp(-2.5 * time) * np.minimum((0.5 - time) / 0.02, 1.0)
    chords = ((48, 64, 67, 72), (45, 60, 64, 69), (41, 60, 65, 69), (43, 59, 62, 67))  # C, A minor, F, G; bass first
    loop = []
    for bass, *notes in chords:
        chord = sum(_note(note, time) for note in notes) / 3 + 0.8 * _note(bass, time)
        loop.append(chord * swell)
    return spoken, (0.06 * np.tile(np.concatenate(loop), 3)).astype(np.float32)


def _note(key: int, time: Array) -> Array:
    """A soft tone; `key` counts semitones, 69 is 440 Hz."""
    phase = 2 * np.pi * 440.0 * 2 ** ((key - 69) / 12) * time
    return np.sin(phase) + 0.3 * np.sin(2 * phase) + 0.1 * np.sin(3 * phase)
