"""Samples of a step, as pure functions of the seed and of their number.

Sample number p of a run (p counts on through all epochs) decides everything random about it: which clip, which window,
which noise, which conditions are dropped. So a run that was stopped goes on as if it had not been, and two processes
see what one process with twice the batch would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memo_core.inputs.speech import NEIGHBOURS
from memo_core.release import NULL_EMOTION, WINDOW

from . import losses
from .config import Stage
from .shards import ShardError, Shards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of F frames, with P past windows of 16 frames before them where they are windows."""

    keys: tuple[str, ...]
    latents: Tensor  # [B, 4, F, h, w]
    portrait: Tensor  # [B, 4, h, w]
    face_embedding: Tensor  # [B, C]
    focus: Tensor  # [B, h, w]
    noise: Tensor  # as latents
    sigma: Tensor  # [B, F] noise levels
    no_reference: Tensor  # [B] bool
    past: Tensor | None = None  # [B, P * 16, 4, h, w], oldest first
    past_windows: Tensor | None = None  # [B] how many of the P past windows count: 0 to P
    audio: Tensor | None = None  # [B, F, 5, L, C]
    no_audio: Tensor | None = None  # [B] bool
    emotion: Tensor | None = None  # [B] labels, 9 where dropped

    def to(self, device: torch.device) -> Batch:
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """As torch's DataLoader asks: from there the copy to a GPU does not wait."""
        pinned = {
            item.name: value.pin_memory()
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **pinned)

    def without_damaged(self) -> tuple[Batch, Tensor]:
        """The batch with zeros in place of samples that hold NaN or infinite numbers, and which [B] these are."""
        damaged = torch.zeros(len(self.keys), dtype=torch.bool, device=self.latents.device)
        given = {
            item.name: value
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor) and value.is_floating_point()
        }
        for value in given.values():
            damaged |= ~torch.isfinite(value).reshape(len(value), -1).all(dim=1)
        cleared = {k: v.masked_fill(damaged.view(-1, *[1] * (v.ndim - 1)), 0) for k, v in given.items()}
        return replace(self, **cleared), damaged


class TrainingSet(Dataset):
    """Samples by their number in the run.

    Args:
        folder: of shards.
        config: of the stage.
        samples_together: of all processes in one micro-step; they have equally many past windows.
        face_embedding: width of the face embedding, for clips that come without one.

    Raises:
        ShardError: if no clip is long enough, or the clips have no sound where the stage needs it.
    """

    def __init__(self, folder: Path | str, config: Stage, samples_together: int = 1, face_embedding: int = 512):
        self.shards, self.config, self.samples_together = Shards(folder), config, samples_together
        self.face_embedding = face_embedding
        self.usable = [i for i, sample in enumerate(self.shards.samples) if sample.frames >= config.data.frames]
        if not self.usable:
            raise ShardError(f"none of the {len(self.shards)} clips in {folder} has {config.data.frames} frames")
        names = self.shards.names(self.usable[0])
        if not config.data.single_frames and not {"speech", "emotion"} <= set(names):
            raise ShardError(f"clips in {folder} have {', '.join(names)}, but windows need speech and emotion")

    def __len__(self) -> int:
        return len(self.usable)

    def clip(self, number: int) -> int:
        """Which clip sample `number` is cut from. Within an epoch (as many samples as there are clips) all differ."""
        epoch, place = divmod(number, len(self.usable))
        return self.usable[_permutation(self.config.seed, epoch, len(self.usable))[place]]

    def __getitem__(self, number: int) -> Batch:
        """Sample `number` as a batch of one."""
        clip = self.clip(number)
        generator = _generator(self.config.seed, "sample", number)
        return (
            self._frames(clip, generator) if self.config.data.single_frames else self._window(clip, number, generator)
        )

    def _common(self, clip: int, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What frames and windows have in common; `rows` are the frames of the sample."""
        names, frames = self.shards.names(clip), self.shards.samples[clip].frames
        first, last = int(rows.min()), int(rows.max())
        if last - first < 2 * len(rows):
            latents = self.shards.read(clip, "latents", slice(first, last + 1))[rows - first]
        else:
            latents = torch.cat([self.shards.read(clip, "latents", slice(int(r), int(r) + 1)) for r in rows])
        other = int(torch.randint(frames, (), generator=generator))
        if "portrait" in names:
            portrait = self.shards.read(clip, "portrait")
        else:  # any frame of the clip shows who it is
            portrait = self.shards.read(clip, "latents", slice(other, other + 1))[0]
        if "face_embedding" in names:
            face = self.shards.read(clip, "face_embedding").float()
        else:
            face = torch.zeros(self.face_embedding)
        size = tuple(portrait.shape[-2:])
        focus = self.shards.read(clip, "focus").float() if "focus" in names else torch.zeros(size)
        clean = latents.float().transpose(0, 1)
        return {
            "latents": clean[None],
            "portrait": portrait.float()[None],
            "face_embedding": face[None],
            "focus": focus[None],
            "noise": torch.randn(clean.shape, generator=generator)[None],
        }

    def _frames(self, clip: int, generator: torch.Generator) -> Batch:
        config, frames = self.config, self.shards.samples[clip].frames
        rows = torch.randperm(frames, generator=generator)[: config.data.frames]
        return Batch(
            keys=(self.shards.samples[clip].key,),
            **self._common(clip, rows, generator),
            sigma=losses.draw_sigma(len(rows), config.loss, generator)[None],
            no_reference=_chance(config.drop.reference, generator) | _chance(config.drop.all, generator),
        )

    def _window(self, clip: int, number: int, generator: torch.Generator) -> Batch:
        config, frames = self.config, self.shards.samples[clip].frames
        length, drop = config.data.frames, config.drop
        choice = torch.randint(
            len(config.data.past_windows),
            (),
            generator=_generator(config.seed, "past", number // self.samples_together),
        )
        most = config.data.past_windows[int(choice)]
        first = int(torch.randint(frames - length + 1, (), generator=generator))
        common = self._common(clip, torch.arange(first, first + length), generator)

        portrait = common["portrait"][0]
        known = min(most, first // WINDOW)
        if known == 0 or bool(_chance(config.data.start_ratio, generator)):
            known, past = 1, portrait.expand(WINDOW, -1, -1, -1)  # a video begins with the portrait as its past
        else:
            past = self.shards.read(clip, "latents", slice(first - known * WINDOW, first)).float()
        now = torch.arange(first, first + length)[:, None] + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1)
        begin, end = max(0, first - NEIGHBOURS), min(frames, first + length + NEIGHBOURS)
        speech = self.shards.read(clip, "speech", slice(begin, end)).float()
        audio = speech[now.clamp(0, frames - 1) - begin]
        labels = self.shards.read(clip, "emotion", slice(first, first + length)).long()
        if labels.max() >= NULL_EMOTION:
            raise ShardError(f"clip {clip} has the emotion {int(labels.max())}; labels are 0 to {NULL_EMOTION - 1}")
        emotion = labels.mode().values[None]
        sigma = losses.draw_sigma(1, config.loss, generator)
        # All are drawn, whatever the others say, so that one probability does not change what the others decide.
        all_of_it = _chance(drop.all, generator)
        no_reference = _chance(drop.reference, generator) | all_of_it
        no_audio = _chance(drop.audio, generator) | all_of_it
        no_emotion = _chance(drop.emotion, generator) | all_of_it
        no_past = _chance(drop.past, generator)
        # Last, because their number is not always the same.
        noise = torch.rand((), generator=generator) * torch.randn(past.shape, generator=generator)
        past = past + config.data.past_noise * noise
        # Windows that are not there stand at the front and count for nothing.
        past = torch.cat([torch.zeros((most - known) * WINDOW, *past.shape[1:]), past])
        return Batch(
            keys=(self.shards.samples[clip].key,),
            **common,
            sigma=sigma.expand(1, length),
            no_reference=no_reference,
            past=past[None],
            past_windows=torch.tensor([known]) * ~no_past,
            audio=audio[None],
            no_audio=no_audio,
            emotion=emotion.masked_fill(no_emotion, NULL_EMOTION),
        )


def collate(samples: list[Batch]) -> Batch:
    """Batches of one -> one batch."""
    joined = {}
    for item in fields(Batch):
        values = [getattr(sample, item.name) for sample in samples]
        if item.name == "keys":
            joined["keys"] = tuple(key for value in values for key in value)
        elif values[0] is not None:
            joined[item.name] = torch.cat(values)
    return Batch(**joined)


def loader(dataset: TrainingSet, batch: int, first_step: int, rank: int = 0, processes: int = 1) -> Iterator[Batch]:
    """Endless batches of this process, from a micro-step on; read by `config.data.workers` other processes."""
    workers = dataset.config.data.workers
    return iter(
        DataLoader(
            dataset,
            batch_sampler=_Numbers(batch, first_step, rank, processes),
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # a forked process would hang in torch's threads
            prefetch_factor=4 if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: else it would take a number from the run's
        )
    )


class _Numbers:
    """Numbers of the samples of one process, micro-step after micro-step."""

    def __init__(self, batch: int, first_step: int, rank: int, processes: int):
        self.batch, self.first_step, self.rank, self.processes = batch, first_step, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            first = (step * self.processes + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            step += 1


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=_generator(seed, "epoch", epoch)).tolist()


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    # Hashed, because torch's generator reads only 32 bits and neighbouring seeds should have nothing in common.
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _chance(probability: float, generator: torch.Generator) -> Tensor:
    """bool [1], true with this probability."""
    return torch.rand(1, generator=generator) < probability
