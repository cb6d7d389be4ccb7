"""Small videos for tests of what reads videos."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from memo_core.video.write import VideoWriter
from training.toon import heads, voices

SIZE = 128


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float = 25, sound: np.ndarray | None = None) -> Path:
    frames = list(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, fps, None if sound is None else voices.RATE) as writer:
        if sound is not None:
            writer.write_audio(sound)
        for frame in frames:
            writer.write_frames(frame)
    return path


def plain(*levels: float, count: int = 16, size: int = SIZE) -> list[np.ndarray]:
    """Frames of one colour."""
    return [np.broadcast_to(np.array(levels, np.uint8), (size, size, 3))] * count


def talk(
    path: Path, seed: int, seconds: float = 0.8, size: int = SIZE, noise: float = 0, count: int | None = None
) -> Path:
    """A toon head that talks, 30 fps, with its voice."""
    rng = np.random.default_rng(seed)
    spoken = voices.speak(voices.sample_voice(rng), 4, seconds, rng)
    frames = heads.render(heads.sample_identity(rng), heads.perform(spoken, 4, rng), size)[:count].permute(0, 2, 3, 1)
    noisy = frames.numpy() + rng.normal(0, noise, frames.shape)
    return write_video(path, noisy.clip(0, 255).astype(np.uint8), voices.FPS, spoken.waveform)
