"""Labelled recordings and features for the tests of the emotion detector's training."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from training.emotion.labels import CLASSES
from training.emotion.readers import Clip
from training.emotion.train import EmotionConfig, split

SMALL = EmotionConfig(hidden_dim=32, steps=40, batch_size=32, learning_rate=2e-3, warmup=5)
TAGS = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n"


def tagged(folder: Path, *songs: str) -> Path:
    """Writes a list in MTG-Jamendo's form; songs are "artist path tag tag ..."."""
    lines = []
    for number, song in enumerate(songs):
        artist, path, *tags = song.split()
        tags = [tag if "---" in tag else f"mood/theme---{tag}" for tag in tags]
        lines.append("\t".join([f"track_{number:07}", artist, "album_000001", path, "30.0", *tags]))
    folder.mkdir(exist_ok=True)
    (folder / "autotagging_moodtheme.tsv").write_text(TAGS + "\n".join([*lines, ""]))
    return folder


def write_wav(path: Path, seconds: float = 0.5, seed: int = 0, level: float = 0.1, offset: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = level * np.random.default_rng(seed).standard_normal(round(seconds * 16000)).clip(-3, 3) + offset
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples * 10000).astype("<i2").tobytes())
    return path


def clusters(count: int = 240, width: int = 16, spread: float = 1.0) -> tuple[list[Clip], list[torch.Tensor]]:
    """Clips of two data sets of 4 speakers each, whose features lie around one point per class."""
    rng = torch.Generator().manual_seed(3)
    centres = torch.randn(8, width, generator=rng) * 2
    clips, features = [], []
    for i in range(count):
        emotion = i % 8
        clips.append(
            Clip(f"/d/{i}.wav", ("a", "b")[i % 2 if i < 200 else 0], CLASSES[emotion], emotion, f"s{i // 8 % 4}")
        )
        features.append(centres[emotion] + spread * torch.randn(1 + i % 2, width, generator=rng))
    return clips, features


def with_parts(clips: list[Clip], **options) -> list[Clip]:
    return [replace(clip, split=part) for clip, part in zip(clips, split(clips, **options))]
