"""Samples of a step, as pure functions of the seed and of their number.

Sample number p of a run (p counts on through all epochs) decides everything random about it: which clip, which window,
which noise, which conditions are dropped. So a run that was stopped goes on as if it had not been, and two processes
see what one process with twice the batch would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memo_core.inputs.speech import NEIGHBOURS
from memo_core.release import NULL_EMOTION, WINDOW

from . import losses
from .config import ConfigError, Drop, Stage
from .shards import ShardError, Shards
from .split import split, stable_hash


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of F frames, with P past windows of F frames before them where they are windows."""

    keys: tuple[str, ...]
    latents: Tensor  # [B, 4, F, h, w]
    portrait: Tensor  # [B, 4, h, w]
    face_embedding: Tensor  # [B, C]
    focus: Tensor  # [B, h, w]
    noise: Tensor  # as latents
    sigma: Tensor  # [B, F] noise levels
    no_reference: Tensor  # [B] bool
    past: Tensor | None = None  # [B, P * F, 4, h, w], oldest first
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
        window: frames that the networks denoise together.
        learned: keys of clips that the run has trained on before, which are not held out (`training.split`).

    Attributes:
        first: number of the sample with which the epochs of these clips begin; not 0 where a run went on with others.
        usable: numbers of the clips trained on; held_out: of those that are not.

    Raises:
        ShardError: if no clip is long enough, or the clips have no sound where the stage needs it. ConfigError:
            windows of another length than the networks'.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Stage,
        samples_together: int = 1,
        face_embedding: int = 512,
        window: int = WINDOW,
        learned: Collection[str] = (),
    ):
        self.shards, self.config, self.samples_together = Shards(folder), config, samples_together
        self.face_embedding, self.window, self.first = face_embedding, window, 0
        self.length = config.data.frames if config.data.single_frames else window
        if not config.data.single_frames and config.data.frames not in (WINDOW, window):
            raise ConfigError(
                f"data.frames={config.data.frames} is for single frames; a window has the networks' {window} frames: "
                "leave it out"
            )
        sides = split(self.shards, config.data.held_out, learned)
        self.usable, self.held_out = ([i for i in side if self._frames_of(i) >= self.length] for side in sides)
        if not self.usable:
            held_out = f"; {len(self.held_out)} that have are held out (data.held_out)" if self.held_out else ""
            raise ShardError(f"none of the {len(self.shards)} clips in {folder} has {self.length} frames{held_out}")
        names = self.shards.names(self.usable[0])
        if not config.data.single_frames and not {"speech", "emotion"} <= set(names):
            raise ShardError(f"clips in {folder} have {', '.join(names)}, but windows need speech and emotion")
        self._ends = torch.tensor([self._stretches(i) for i in self.usable]).cumsum(0)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self._ends[-1])

    def _frames_of(self, clip: int) -> int:
        return self.shards.samples[clip].frames

    def _stretches(self, clip: int) -> int:
        """How often a clip comes in an epoch; each time a window begins in another stretch of it."""
        return max(1, self._frames_of(clip) // self.window) if self.config.data.by_length else 1

    def clip(self, number: int) -> tuple[int, int]:
        """Which clip sample `number` is cut from, and which stretch of it. Within an epoch all differ."""
        epoch, place = divmod(number - self.first, len(self))
        drawn = int(_permutation(self.config.seed, epoch, len(self))[place])
        index = int(torch.searchsorted(self._ends, drawn, right=True))
        return self.usable[index], drawn - (int(self._ends[index - 1]) if index else 0)

    def __getitem__(self, number: int) -> Batch:
        """Sample `number` as a batch of one."""
        clip, stretch = self.clip(number)
        return self._sample(clip, stretch, number, _generator(self.config.seed, "sample", number))

    def _sample(self, clip: int, stretch: int, number: int, generator: torch.Generator) -> Batch:
        if self.config.data.single_frames:
            return self._frames(clip, generator)
        starts, parts = self._frames_of(clip) - self.length + 1, self._stretches(clip)
        low, high = stretch * starts // parts, (stretch + 1) * starts // parts
        return self._window(clip, (low, high), number, generator)

    def _common(self, clip: int, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What frames and windows have in common; `rows` are the frames of the sample."""
        names, frames = self.shards.names(clip), self._frames_of(clip)
        first, last = int(rows.min()), int(rows.max())
        if last - first < 2 * len(rows):
            latents = self.shards.read(clip, "latents", slice(first, last + 1))[rows - first]
        else:
            latents = torch.cat([self.shards.read(clip, "latents", slice(int(r), int(r) + 1)) for r in rows])
        # Any frame of the clip shows who it is.
        shown = set(rows.tolist()) if self.config.data.portrait_outside else set()
        others = [row for row in range(frames) if row not in shown] or [0]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        if "portrait" in names:
            portrait = self.shards.read(clip, "portrait")
        else:
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
        config = self.config
        rows = torch.randperm(self._frames_of(clip), generator=generator)[: self.length]
        return Batch(
            keys=(self.shards.samples[clip].key,),
            **self._common(clip, rows, generator),
            sigma=losses.draw_sigma(len(rows), config.loss, generator)[None],
            no_reference=_chance(config.drop.reference, generator) | _chance(config.drop.all, generator),
        )

    def _window(self, clip: int, starts: tuple[int, int], number: int, generator: torch.Generator) -> Batch:
        """A window that begins at one of the frames `starts`, the second not included."""
        config, frames, length = self.config, self._frames_of(clip), self.length
        drop = config.drop
        choice = torch.randint(
            len(config.data.past_windows),
            (),
            generator=_generator(config.seed, "past", number // self.samples_together),
        )
        most = config.data.past_windows[int(choice)]
        first = starts[0] + int(torch.randint(starts[1] - starts[0], (), generator=generator))
        common = self._common(clip, torch.arange(first, first + length), generator)

        portrait = common["portrait"][0]
        known = min(most, first // length)
        if known == 0 or bool(_chance(config.data.start_ratio, generator)):
            known, past = 1, portrait.expand(length, -1, -1, -1)  # a video begins with the portrait as its past
        else:
            past = self.shards.read(clip, "latents", slice(first - known * length, first)).float()
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
        past = torch.cat([torch.zeros((most - known) * length, *past.shape[1:]), past])
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


class HeldOut(TrainingSet):
    """The clips of a training set that it holds out, with nothing dropped: sample `number` is always the same.

    In the order of a hash of their keys, so that most stay where they are when clips are added.
    """

    def __init__(self, of: TrainingSet):
        vars(self).update(vars(of))
        drop, data = Drop(emotion=0.0, reference=0.0, audio=0.0, past=0.0), replace(of.config.data, by_length=False)
        self.config, self.samples_together = replace(of.config, drop=drop, data=data), 1
        self.usable = sorted(of.held_out, key=lambda clip: stable_hash(self.shards.samples[clip].key))

    def __len__(self) -> int:
        return len(self.usable)

    def clip(self, number: int) -> tuple[int, int]:
        """Which clip sample `number` is cut from: anywhere in it."""
        return self.usable[number % len(self)], 0

    def __getitem__(self, number: int) -> Batch:
        """Sample `number` as a batch of one."""
        clip, stretch = self.clip(number)
        purpose = f"held out {self.shards.samples[clip].key}"
        return self._sample(clip, stretch, number, _generator(self.config.seed, purpose, number // len(self)))


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
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "epoch", epoch))


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    # Hashed, because torch's generator reads only 32 bits and neighbouring seeds should have nothing in common.
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _chance(probability: float, generator: torch.Generator) -> Tensor:
    """bool [1], true with this probability."""
    return torch.rand(1, generator=generator) < probability
