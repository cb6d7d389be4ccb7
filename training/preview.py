"""Pictures of what a run has learned so far: samples beside the truth, under the same conditions."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from memo_core.memory.stream import WindowMemory
from memo_core.memory.sums import LayerMemory
from memo_core.nets.conditions import Conditions
from memo_core.release import NULL_EMOTION
from memo_core.sampling.settings import Settings
from memo_core.sampling.vae import decode_latents
from memo_core.sampling.window import sample_window

from . import run
from .batches import Batch, TrainingSet, collate
from .config import Drop
from .nets import Nets
from .objectives.flow import memory_of_modules
from .vae import load_vae

STEPS = 10
SHOWN = 4  # frames of a window


_vae = lru_cache(maxsize=1)(load_vae)


def picture(nets: Nets, data: TrainingSet, encoders: Path) -> Tensor:
    """uint8 [3, H, W]: in each row the portrait, true frames, and sampled ones; always of the same samples."""
    device = next(nets.parameters()).device
    settings = Settings(steps=STEPS, guidance_scale=data.config.engine.guidance)
    pictures = []
    for batch in _samples(data):
        batch = batch.to(device)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(7)).to(device)
        sampled = sample(nets, batch, noise, settings)[0]
        shown = torch.linspace(0, sampled.shape[1] - 1, min(SHOWN, sampled.shape[1])).round().long()
        row = torch.cat([batch.portrait[0][:, None], batch.latents[0][:, shown], sampled[:, shown]], dim=1)
        pictures.append(decode_latents(_vae(encoders), row.cpu()))
    return run.sheet((torch.cat(pictures) * 255).round().to(torch.uint8), len(pictures[0]))


def sample(nets: Nets, batch: Batch, noise: Tensor, settings: Settings) -> Tensor:
    """Latents [1, 4, F, h, w] under the conditions of a batch of one, in less memory than a step of training takes:
    with guidance row by row.
    """
    conditions, memory = conditions_of(nets, batch, settings.guided)
    torch.clear_autocast_cache()  # weights in half precision of networks that have done their part
    return sample_window(nets, noise, conditions, memory, settings, row_by_row=True)


def _samples(data: TrainingSet) -> list[Batch]:
    """The first samples of the run, with nothing dropped."""
    undropped = copy.copy(data)
    undropped.config = replace(data.config, drop=Drop(emotion=0.0, reference=0.0, audio=0.0, past=0.0))
    return [collate([undropped[number]]) for number in range(data.config.engine.samples)]


def conditions_of(nets: Nets, batch: Batch, guided: bool) -> tuple[Conditions, WindowMemory | None]:
    """What a batch of one is sampled under; with guidance an unconditional row before it, as sampling has it."""
    tokens = nets.image_proj(batch.face_embedding)
    reference = nets.reference_net(batch.portrait, tokens)
    audio, emotion, past, windows = batch.audio, batch.emotion, batch.past, batch.past_windows
    audio = None if audio is None else nets.audio_proj(audio)
    if guided:
        tokens = torch.cat([nets.image_proj(torch.zeros_like(batch.face_embedding)), tokens])
        if audio is not None:
            audio = torch.cat([torch.zeros_like(audio), audio])
            emotion = torch.cat([torch.full_like(emotion, NULL_EMOTION), emotion])
    conditions = Conditions(
        reference=reference,
        face_tokens=tokens,
        audio_tokens=audio,
        emotion=emotion,
        frames=batch.latents.shape[2],
    )
    return conditions, None if audio is None else _memory(nets, past, tokens, windows)


def _memory(nets: Nets, past: Tensor, tokens: Tensor, windows: Tensor) -> WindowMemory:
    """Of a past under each row of face tokens: made row by row, kept in host memory. At released sizes the sums are
    gigabytes, for which a training step leaves no room.
    """
    each = [
        [(kv.cpu(), z.cpu()) for module in memory_of_modules(nets, past, row, windows) for kv, z in module()]
        for row in tokens.split(1)
    ]
    layers = []
    while each[0]:
        kv, z = (torch.cat(parts).to(past.device) for parts in zip(*[row.pop(0) for row in each], strict=True))
        layers.append(LayerMemory(kv, z, on_host=True))
    return WindowMemory(layers)
