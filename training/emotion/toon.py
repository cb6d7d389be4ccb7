"""Small emotional data sets of toon voices, each with labels of its own, to see the detector's training at work."""

from __future__ import annotations

import csv
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memo_core.files import replace_whole
from memo_core.release import EMOTIONS

from ..toon import voices

_SEED = 5_000_000  # no other toon job draws these voices


@dataclass(frozen=True)
class ToonSet:
    """What a set calls its emotions, which class the voice speaks each of them in, and how it was recorded."""

    name: str
    language: str
    labels: dict[str, str]  # own label -> class or drop, as in datasets.yaml
    spoken: dict[str, str]  # own label -> emotion of the voice
    speakers: int
    per_label: int  # utterances of each speaker and label
    noise: float  # relative to the voice


SETS = {
    "toon_full": ToonSet(
        "all eight, clean",
        "English",
        {name: name for name in EMOTIONS[:8]},
        {name: name for name in EMOTIONS[:8]},
        speakers=24,
        per_label=2,
        noise=0.0,
    ),
    "toon_four": ToonSet(
        "four emotions, German labels",
        "German",
        {"Wut": "angry", "Freude": "happy", "Trauer": "sad", "sachlich": "neutral"},
        {"Wut": "angry", "Freude": "happy", "Trauer": "sad", "sachlich": "neutral"},
        speakers=16,
        per_label=3,
        noise=0.05,
    ),
    "toon_codes": ToonSet(
        "three-letter labels, noisy",
        "English",
        {
            "ANG": "angry",
            "DIS": "disgusted",
            "FEA": "fearful",
            "HAP": "happy",
            "SUR": "surprised",
            "BOR": "other",
            "XXX": "drop",
        },
        {
            "ANG": "angry",
            "DIS": "disgusted",
            "FEA": "fearful",
            "HAP": "happy",
            "SUR": "surprised",
            "BOR": "other",
            "XXX": "neutral",
        },
        speakers=16,
        per_label=2,
        noise=0.2,
    ),
}


def make_toon_sets(folder: Path, seed: int = 0, share: float = 1.0) -> tuple[Path, Path]:
    """Speaks the sets into `folder` as 16-bit wav files of 2 to 5 s; what is there already stays.

    Args:
        folder: gets a folder per set, clips.csv and tables.yaml.
        seed: of the voices.
        share: of the speakers, at least 2; less for a test.

    Returns:
        the list of clips and the label tables, for `prepare --csv ... --tables ...`.
    """
    import yaml

    rows = []
    for number, (key, toon) in enumerate(SETS.items()):
        for speaker in range(max(2, round(toon.speakers * share))):
            place = (_SEED + seed, number, speaker)
            voice = voices.sample_voice(np.random.default_rng(place))
            for index, (label, emotion) in enumerate(toon.spoken.items()):
                for take in range(toon.per_label):
                    path = folder / key / f"{speaker:02d}_{label}_{take}.wav"
                    rows.append([path.relative_to(folder).as_posix(), label, f"{speaker:02d}", key])
                    if not path.exists():
                        rng = np.random.default_rng((*place, index, take))
                        said = voices.speak(voice, EMOTIONS.index(emotion), rng.uniform(2.0, 5.0), rng).waveform
                        said = said + toon.noise * said.std() * rng.standard_normal(len(said))
                        _write_wav(path, said)
    with open(folder / "clips.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "label", "speaker", "dataset"], *rows])
    tables = {key: {"name": t.name, "language": t.language, "labels": t.labels} for key, t in SETS.items()}
    (folder / "tables.yaml").write_text(yaml.safe_dump(tables, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return folder / "clips.csv", folder / "tables.yaml"


def _write_wav(path: Path, waveform: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(voices.RATE)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
