"""Drawn clips of which some are spoilt on purpose, and held-out windows at chosen noise levels: what is judged here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memo_core.checkpoint.layout import find
from training import batches
from training.config import Data, Drop, Loss, Stage
from training.shards import Shards, ShardWriter
from training.toon.data import make_shards

CLIPS, HELD_OUT = 240, 40  # to train with, and after them those to judge
KINDS = ("sound", "frozen", "crop")  # sound of another clip; a still picture; a crop that lies beside the face


def draw(folder: Path) -> Shards:
    """All clips, encoded by assets/toon; drawn where they are not there yet."""
    make_shards(folder, find("toon"), "clips", CLIPS + HELD_OUT)
    return Shards(folder)


def spoil(clip: dict[str, Tensor], kind: str, other: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """A clip spoilt in one way; `other` is another clip."""
    latents = clip["latents"]
    if kind == "sound":
        return clip | {name: other[name] for name in ("speech", "emotion")}
    if kind == "frozen":
        frame = int(rng.integers(len(latents)))
        return clip | {"latents": latents[frame : frame + 1].expand_as(latents).contiguous()}
    size = latents.shape[-1]
    aside, down = (int(x) * size // 4 for x in rng.choice([-1, 1], 2))
    across, along = ((torch.arange(size) + shift).clamp(0, size - 1) for shift in (aside, down))
    return clip | {"latents": latents[:, :, along][..., across].contiguous()}


def write(folder: Path, clips: Shards, numbers: range, spoilt: dict[int, str], seed: int) -> Path:
    """Shards of some of the clips, of which `spoilt` (number to kind) are spoilt. What is there already stays."""
    with ShardWriter(folder, clips.encoders, samples_per_shard=len(numbers)) as writer:
        for number in numbers:
            key = clips.samples[number].key
            if key in writer.keys:
                continue
            tensors = _whole(clips, number)
            if number in spoilt:
                other = numbers[(number - numbers.start + 1) % len(numbers)]
                tensors = spoil(tensors, spoilt[number], _whole(clips, other), np.random.default_rng([seed, number]))
            writer.add(key, tensors)
    return folder


def _whole(clips: Shards, number: int) -> dict[str, Tensor]:
    return {name: clips.read(number, name) for name in clips.names(number)}


def windows(folder: Path, sigmas: list[list[float]], batch: int = 4) -> Iterator[batches.Batch]:
    """Windows of a folder's clips with nothing taken away, under the noise levels of each of `sigmas`, in its order.
    The same clips, windows and noise for the same `sigmas`, however the clips are spoilt.
    """
    nothing = Drop(emotion=0.0, reference=0.0, audio=0.0, past=0.0)
    held_out = batches.TrainingSet(folder, Stage(name="held-out", steps=1, data=Data(), drop=nothing, loss=Loss()))
    numbered = [(row * len(held_out) + i, s) for row, levels in enumerate(sigmas) for i, s in enumerate(levels)]
    for first in range(0, len(numbered), batch):
        samples = [
            replace(sample, sigma=torch.full_like(sample.sigma, sigma))
            for sample, sigma in ((held_out[number], sigma) for number, sigma in numbered[first : first + batch])
        ]
        yield batches.collate(samples)
