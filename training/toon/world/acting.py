"""How a face moves while it says something with an emotion: motion tracks for `drawing.render`.

Mouth opening and width are the utterance's; the emotion sets corners, brows and lids; the head moves by itself, lively
or calm in phases that differ by clip and hardly follow the voice, so that a part of the motion has to be remembered
instead of heard. Hair and earrings swing after the head.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .drawing import LIMITS, MOTION, RELAXED_LIDS

FPS = 30


class SpokenMouth(Protocol):
    """What a performance needs to know of an utterance (`training.toon.voices.Utterance` has it)."""

    @property
    def mouth_open(self) -> np.ndarray | Tensor:
        """[F] in [0, 1], at 30 frames a second."""

    @property
    def mouth_width(self) -> np.ndarray | Tensor:
        """[F] in [-1, 1], at 30 frames a second."""


SIGNATURE = ("mouth_corners", "brow_raise", "brow_slant", "lids")
"""The motion parameters that an emotion sets; their means over a few seconds tell the emotions apart."""

SIGNATURES: tuple[tuple[float, ...], ...] = (
    # corners, raise, slant, lids
    (-0.45, -0.75, -0.95, 0.76),  # angry: knitted brows
    (-0.90, -0.35, -0.35, 0.44),  # disgusted: narrow eyes, mouth drawn down
    (-0.50, 0.65, 0.85, 1.00),  # fearful: wide eyes under lifted, worried brows
    (0.95, 0.30, 0.15, 0.74),  # happy: a smile
    (0.05, 0.00, 0.00, 0.80),  # neutral
    (0.50, 0.40, -0.65, 0.48),  # other: sly, a smile under lowered lids
    (-0.75, -0.10, 0.95, 0.50),  # sad: heavy lids, worried brows, mouth drawn down
    (0.10, 1.00, 0.05, 1.00),  # surprised: brows as high as they go
)
"""Mean of each of SIGNATURE by emotion: the first eight of `memo_core.release.EMOTIONS`, in their order."""

# Degrees: how each emotion carries the head, (pitch, roll).
CARRIAGE = ((-5.0, 0.0), (2.0, 4.0), (3.0, -3.0), (2.0, 2.0), (0.0, 0.0), (-2.0, 5.0), (-7.0, -4.0), (4.0, 0.0))
BLINK_LIDS = np.array([0.45, 0.05, 0.0, 0.25, 0.6, 0.9])  # factor on the lids, frame by frame
BLINKS_PER_SECOND = (0.35, 0.30, 0.30, 0.45, 0.45, 0.35, 0.40, 0.25)
CALM, LIVELY = 0.25, 1.0  # how much the head moves in either kind of phase
SWING_SECONDS, SWING_DAMPING = 0.55, 0.22  # period of what hangs, share of critical damping


def _smooth(values: np.ndarray, seconds: float) -> np.ndarray:
    """Smooth [F] with a Hann window so long, holding its ends."""
    window = np.hanning(2 * max(1, round(seconds * FPS / 2)) + 3)
    half = len(window) // 2
    return np.convolve(np.pad(values, half, mode="edge"), window / window.sum(), mode="valid")


def _drift(rng: np.random.Generator, frames: int, seconds: float) -> np.ndarray:
    """Smooth noise [F] about 0 that mostly stays within [-1, 1] and changes over so many seconds."""
    spacing = seconds * FPS
    knots = rng.uniform(-1.0, 1.0, math.ceil(frames / spacing) + 3)
    at = rng.uniform(0.0, 1.0) + np.arange(frames) / spacing
    return _smooth(np.interp(at, np.arange(len(knots)), knots), seconds)


def _phases(rng: np.random.Generator, frames: int) -> np.ndarray:
    """How lively the head is, [F]: phases of 1.5 to 5 s, calm or lively, more of one kind in some clips."""
    lively, found, at = rng.uniform(0.15, 0.85), np.zeros(frames), 0
    while at < frames:
        length = round(rng.uniform(1.5, 5.0) * FPS)
        found[at : at + length] = LIVELY if rng.random() < lively else CALM
        at += length
    return _smooth(found, 0.8)


def head_motion(frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Turns, nods, tilts and small shifts of a head that nobody tells what to do, by name, [F] each."""
    energy = _phases(rng, frames)
    # Turns are steps to a place that is held for a while, as people look about; some slow drift on top.
    place, at = np.zeros(frames), 0
    while at < frames:
        hold = round(rng.uniform(0.7, 3.0) * FPS)
        place[at : at + hold] = rng.uniform(-1.0, 1.0)
        at += hold
    yaw = 20.0 * energy * _smooth(place, 0.5) + 4.0 * _drift(rng, frames, 1.5)
    # Nods: bursts of a few quick beats.
    nods, at = np.zeros(frames), int(rng.integers(3 * FPS))
    while at < frames:
        beats, period = int(rng.integers(1, 4)), rng.uniform(0.35, 0.7)
        length = round(beats * period * FPS)
        time = np.arange(min(length, frames - at)) / FPS
        nods[at : at + length] = -np.sin(2 * np.pi * time / period) * np.sin(np.pi * time / (beats * period))
        at += length + round(rng.uniform(1.0, 5.0) * FPS)
    pitch = 7.0 * energy * nods + 5.0 * energy * _drift(rng, frames, 1.8)
    roll = 9.0 * energy * _drift(rng, frames, 1.6) + 1.5 * _drift(rng, frames, 0.9)
    breath = np.sin(2 * np.pi * (np.arange(frames) / FPS / rng.uniform(3.0, 4.5) + rng.uniform()))
    return {
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
        "shift_x": 0.10 * yaw + 3.0 * energy * _drift(rng, frames, 1.7),
        "shift_y": -0.08 * pitch + 0.6 * breath + 1.2 * energy * _drift(rng, frames, 2.0),
    }


def swing(track: dict[str, np.ndarray]) -> np.ndarray:
    """Where hair and earrings hang, [F] in [-1, 1]: a damped pendulum that the head drags along."""
    frames = len(track["yaw"])
    # Where the ends would hang at rest under a tilted head, and how the head moves sideways, as at the ears.
    rest = -0.035 * track["roll"]
    moved = np.gradient(np.gradient(0.6 * track["yaw"] + track["shift_x"] + 0.5 * track["roll"])) * FPS**2
    omega, found = 2 * np.pi / SWING_SECONDS, np.zeros(frames)
    place, speed, steps = rest[0], 0.0, 8
    for frame in range(frames):
        for _ in range(steps):  # small steps: stiff against a frame's length
            pull = -(omega**2) * (place - rest[frame]) - 2 * SWING_DAMPING * omega * speed - 0.045 * moved[frame]
            speed += pull / (FPS * steps)
            place += speed / (FPS * steps)
        found[frame] = place
    return np.tanh(found)


def perform(utterance: SpokenMouth, emotion: int, rng: np.random.Generator) -> Tensor:
    """The face of somebody who says `utterance` with an emotion.

    Args:
        utterance: what is said, F frames of it.
        emotion: 0 to 7, an index into `memo_core.release.EMOTIONS`.
        rng: the same state gives the same performance.

    Returns:
        motion [F, 14] float32, columns and ranges as in `drawing.MOTION`.

    Raises:
        ValueError: `emotion` has no signature, or the utterance's tracks are empty or differ in length.
    """
    if not 0 <= emotion < len(SIGNATURES):
        raise ValueError(f"emotion must be 0 to {len(SIGNATURES) - 1}, received {emotion}")
    mouth_open = np.asarray(utterance.mouth_open, dtype=np.float64)
    mouth_width = np.asarray(utterance.mouth_width, dtype=np.float64)
    frames = len(mouth_open)
    if frames == 0 or mouth_width.shape != mouth_open.shape:
        raise ValueError(f"mouth_open {mouth_open.shape} and mouth_width {mouth_width.shape} must be equal, not empty")

    energy = _smooth(mouth_open, 0.4)
    energy = energy - energy.mean()
    strength = rng.uniform(0.85, 1.0)
    track = {
        name: strength * value + rng.uniform(-0.05, 0.05) + 0.05 * _drift(rng, frames, 0.8)
        for name, value in zip(SIGNATURE, SIGNATURES[emotion], strict=True)
    }
    # Wide or narrow eyes are as far from the relaxed eye as the emotion is strong.
    track["lids"] += (1.0 - strength) * RELAXED_LIDS
    track["brow_raise"] += 0.25 * energy
    track |= head_motion(frames, rng)
    pitch, roll = CARRIAGE[emotion]
    track["pitch"] += strength * pitch - 3.0 * energy
    track["roll"] += strength * roll * rng.choice((-1.0, 1.0))

    # Glances: quick steps, held, back to the viewer about half of the time. Turned away, eyes come half back.
    glance, at = np.zeros((2, frames)), 0
    while at < frames:
        hold = round(rng.uniform(0.5, 1.6) * FPS)
        if rng.random() < 0.5:
            glance[:, at : at + hold] = rng.uniform((-0.8, -0.4), (0.8, 0.5))[:, None]
        at += hold
    track["gaze_x"] = _smooth(glance[0], 0.07) - 0.018 * track["yaw"]
    track["gaze_y"] = _smooth(glance[1], 0.07) + 0.015 * track["pitch"]

    # Blinks multiply the lids; at most one in half a second.
    shut, at = np.ones(frames), int(rng.integers(FPS))
    while at < frames:
        length = min(len(BLINK_LIDS), frames - at)
        shut[at : at + length] = BLINK_LIDS[:length]
        at += FPS // 2 + round(rng.exponential(1.0 / BLINKS_PER_SECOND[emotion]) * FPS)
    track["lids"] = np.clip(track["lids"], 0.0, 1.0) * shut
    track["mouth_open"], track["mouth_width"] = mouth_open, mouth_width
    for name in ("yaw", "pitch", "roll", "shift_x", "shift_y"):
        track[name] = np.clip(track[name], *LIMITS[name])
    track["swing"] = swing(track)
    motion = np.stack([np.clip(track[name], *LIMITS[name]) for name in MOTION], axis=1)
    return torch.from_numpy(motion.astype(np.float32))
