"""The training set: toon performances as the Diffusion Net sees them (latents, speech features, labels), in shards.

Making the set is a job of its own because the VAE and the speech encoder are frozen by then: rendering and encoding
once is cheaper than at every step. Shards are written atomically, so an interrupted run goes on with the next one.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from memo_core import sampling
from memo_core.audio import NEIGHBOURS
from memo_core.clips import WINDOW
from memo_core.nets.speech_encoder import SpeechEncoder

from .. import run
from . import heads, sizes
from .speech import utterance
from .vae import random_motions

CLIPS, CLIP_FRAMES = 1000, 64  # 64: three past windows and the present one
SPOKEN_SECONDS = 4.0  # a clip is cut from a longer utterance, as a window is from a recording
FACES, FACE_FRAMES = 2000, 8
SHARD_CLIPS, SHARD_FACES = 40, 200
REAL_SHARE = 0.15  # of espeak-ng's voices, where it is installed
SEED = 1 << 20  # evaluation has another; that two of their many streams coincide is beyond chance


@torch.no_grad()
def encode(vae, frames: Tensor) -> Tensor:
    """uint8 [F, 3, H, W] -> scaled VAE means [F, 4, h, w], half precision."""
    with torch.autocast("cpu", torch.bfloat16):
        return sampling.encode(vae, run.to_signed(frames)).half()


def focus(identity: heads.Identity, size: int) -> Tensor:
    """How much of each latent covers mouth, eyes or brows, [size, size] in [0, 1]."""
    inside = ~heads.mask_outside_mouth_and_eyes(identity, sizes.IMAGE_SIZE)
    return F.adaptive_avg_pool2d(inside.float()[None], size)[0].half()


@torch.no_grad()
def make_clip(vae, speech: SpeechEncoder, rng: np.random.Generator) -> dict[str, Tensor]:
    """One performance: latents [64, 4, h, w], portrait [4, h, w], speech [64, L, C], emotion [], focus [h, w]."""
    identity = heads.sample_identity(rng)
    spoken = utterance(SPOKEN_SECONDS, rng, REAL_SHARE)
    motion = heads.perform(spoken, spoken.emotion, rng)
    start = int(rng.integers(len(motion) - CLIP_FRAMES + 1))
    frames = heads.render(identity, torch.cat([heads.neutral_motion()[None], motion[start : start + CLIP_FRAMES]]))
    latents = encode(vae, frames)
    waveform = torch.as_tensor(spoken.waveform)[None]
    hidden = speech(F.layer_norm(waveform, waveform.shape[-1:]), len(motion))
    return {
        "latents": latents[1:],
        "portrait": latents[0],
        "speech": hidden[start : start + CLIP_FRAMES].half(),
        "emotion": torch.tensor(spoken.emotion),
        "focus": focus(identity, latents.shape[-1]),
    }


@torch.no_grad()
def make_face(vae, rng: np.random.Generator) -> dict[str, Tensor]:
    """One face in unrelated poses: latents [8, 4, h, w], portrait [4, h, w]."""
    frames = heads.render(
        heads.sample_identity(rng), torch.cat([heads.neutral_motion()[None], random_motions(FACE_FRAMES, rng)])
    )
    latents = encode(vae, frames)
    return {"latents": latents[1:], "portrait": latents[0]}


@lru_cache(maxsize=1)
def encoders(checkpoint: Path) -> tuple[Any, SpeechEncoder]:
    """The trained VAE and speech encoder, frozen."""
    from diffusers import AutoencoderKL

    vae = (
        AutoencoderKL.from_pretrained(checkpoint / "vae", low_cpu_mem_usage=False).float().eval().requires_grad_(False)
    )
    return vae, SpeechEncoder.from_pretrained(checkpoint / "wav2vec2")


def make_shard(folder: Path, name: str, count: int, seed: list[int]) -> None:
    """Writes `<folder>/data/<name>.safetensors`, whole or not at all."""
    path = folder / "data" / f"{name}.safetensors"
    if path.exists():
        return
    vae, speech = encoders(folder / "checkpoint")
    rng = np.random.default_rng(seed)
    items = [make_clip(vae, speech, rng) if name.startswith("clips") else make_face(vae, rng) for _ in range(count)]
    temporary = path.with_suffix(".tmp")
    save_file({key: torch.stack([item[key] for item in items]).contiguous() for key in items[0]}, temporary)
    os.replace(temporary, path)


def make(folder: Path) -> None:
    """Writes the shards that are still missing, one process for each processor."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    jobs = [(f"faces_{i:03d}", SHARD_FACES, [SEED, 0, i]) for i in range(FACES // SHARD_FACES)]
    jobs += [(f"clips_{i:03d}", SHARD_CLIPS, [SEED, 1, i]) for i in range(CLIPS // SHARD_CLIPS)]
    spawn = multiprocessing.get_context("spawn")  # a forked process would hang in torch's threads
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(make_shard, folder, *job) for job in jobs]
        for done in tqdm(as_completed(running), total=len(running), desc="data"):
            done.result()


def read(folder: Path, kind: str) -> dict[str, Tensor]:
    """All shards of a kind ("clips" or "faces") in memory, joined along their first axis."""
    paths = sorted(folder.glob(f"{kind}_*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {kind} in {folder}: run `python -m training toon --stage data` first")
    shards = [load_file(path) for path in paths]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on: B samples of F frames, and P past windows of 16 frames before them."""

    latents: Tensor  # [B, 4, F, h, w]
    portrait: Tensor  # [B, 4, h, w]
    focus: Tensor  # [B, h, w]
    past: Tensor | None = None  # [B, P * 16, 4, h, w]
    audio: Tensor | None = None  # [B, F, 5, L, C]
    emotion: Tensor | None = None  # [B]


def draw_faces(faces: dict[str, Tensor], count: int, frames: int, generator: torch.Generator) -> Batch:
    """Random faces in a few random poses each."""
    rows = torch.randint(len(faces["portrait"]), (count,), generator=generator)
    poses = torch.rand(count, faces["latents"].shape[1], generator=generator).argsort(dim=1)[:, :frames]
    portrait = faces["portrait"][rows].float()
    return Batch(
        latents=faces["latents"][rows[:, None], poses].float().transpose(1, 2),
        portrait=portrait,
        focus=torch.zeros(count, *portrait.shape[-2:]),
    )


def draw_windows(
    clips: dict[str, Tensor], count: int, frames: int, past_windows: int, generator: torch.Generator
) -> Batch:
    """Random windows of `frames` frames with the `past_windows` windows of 16 frames before them."""
    rows = torch.randint(len(clips["emotion"]), (count,), generator=generator)
    before = WINDOW * past_windows
    first = torch.randint(before, clips["latents"].shape[1] - frames + 1, (count,), generator=generator)
    now = first[:, None] + torch.arange(frames)
    then = first[:, None] + torch.arange(-before, 0)
    neighbours = now[..., None] + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1)
    return Batch(
        latents=clips["latents"][rows[:, None], now].float().transpose(1, 2),
        portrait=clips["portrait"][rows].float(),
        focus=clips["focus"][rows].float(),
        past=clips["latents"][rows[:, None], then].float(),
        audio=clips["speech"][rows[:, None, None], neighbours.clamp(0, clips["speech"].shape[1] - 1)].float(),
        emotion=clips["emotion"][rows],
    )
