"""The training set: toon performances as the Diffusion Net sees them (latents, speech features, labels), in shards.

Making the set is a job of its own because the VAE and the speech encoder are frozen by then: rendering and encoding
once is cheaper than at every step.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from memo_core.checkpoint.digest import weights_digest
from memo_core.encoders.speech import SpeechEncoder
from memo_core.nets.weights import WEIGHTS
from memo_core.sampling.vae import encode_frames as encode_means

from .. import run
from ..shards import ShardWriter
from ..vae import load_vae
from . import heads, sizes
from .speech import utterance
from .vae import random_motions

KINDS = ("faces", "clips")
CLIPS, CLIP_FRAMES = 1000, 64  # 64: three past windows and the present one
SPOKEN_SECONDS = 4.0  # a clip is cut from a longer utterance, as a window is from a recording
FACES, FACE_FRAMES = 2000, 8
REAL_SHARE = 0.15  # of espeak-ng's voices, where it is installed
SEED = 1 << 20  # evaluation has another; that two of their many streams coincide is beyond chance


@torch.no_grad()
def encode_frames(vae, frames: Tensor) -> Tensor:
    """uint8 [F, 3, H, W] -> scaled VAE means [F, 4, h, w], half precision."""
    with torch.autocast("cpu", torch.bfloat16):
        return encode_means(vae, run.to_signed(frames)).half()


def focus(identity: heads.Identity, size: int) -> Tensor:
    """How much of each latent covers mouth, eyes or brows, [size, size] in [0, 1]."""
    inside = ~heads.mask_outside_mouth_and_eyes(identity, sizes.IMAGE_SIZE)
    return F.adaptive_avg_pool2d(inside.float()[None], size)[0].half()


@torch.no_grad()
def make_clip(vae, speech: SpeechEncoder, rng: np.random.Generator) -> dict[str, Tensor]:
    """One performance: latents [64, 4, h, w], portrait [4, h, w], speech [64, L, C], emotion [64], focus [h, w]."""
    identity = heads.sample_identity(rng)
    spoken = utterance(SPOKEN_SECONDS, rng, REAL_SHARE)
    motion = heads.perform(spoken, spoken.emotion, rng)
    start = int(rng.integers(len(motion) - CLIP_FRAMES + 1))
    frames = heads.render(identity, torch.cat([heads.neutral_motion()[None], motion[start : start + CLIP_FRAMES]]))
    latents = encode_frames(vae, frames)
    waveform = torch.as_tensor(spoken.waveform)[None]
    hidden = speech(F.layer_norm(waveform, waveform.shape[-1:]), len(motion))
    return {
        "latents": latents[1:],
        "portrait": latents[0],
        "speech": hidden[start : start + CLIP_FRAMES].half(),
        "emotion": torch.full((CLIP_FRAMES,), spoken.emotion, dtype=torch.uint8),
        "focus": focus(identity, latents.shape[-1]),
    }


@torch.no_grad()
def make_face(vae, rng: np.random.Generator) -> dict[str, Tensor]:
    """One face in unrelated poses: latents [8, 4, h, w], portrait [4, h, w]."""
    frames = heads.render(
        heads.sample_identity(rng), torch.cat([heads.neutral_motion()[None], random_motions(FACE_FRAMES, rng)])
    )
    latents = encode_frames(vae, frames)
    return {"latents": latents[1:], "portrait": latents[0]}


@lru_cache(maxsize=1)
def encoders(checkpoint: Path) -> tuple[Any, SpeechEncoder]:
    """The trained VAE and speech encoder, frozen."""
    return load_vae(checkpoint), SpeechEncoder.from_pretrained(checkpoint / "wav2vec2")


def make_sample(checkpoint: Path, kind: str, number: int) -> tuple[str, dict[str, Tensor]]:
    """Clip or face number `number`, always the same."""
    vae, speech = encoders(checkpoint)
    rng = np.random.default_rng([SEED, KINDS.index(kind), number])
    return f"{kind}-{number:05d}", make_clip(vae, speech, rng) if kind == "clips" else make_face(vae, rng)


def make(folder: Path, clips: int = CLIPS, faces: int = FACES) -> None:
    """Writes the samples that are still missing into `data/faces` and `data/clips`."""
    for kind, count in zip(KINDS, (faces, clips)):
        make_shards(folder / "data" / kind, folder / "checkpoint", kind, count)


def make_shards(folder: Path, checkpoint: Path, kind: str, count: int) -> None:
    """Writes the samples of a kind that are still missing, one process a processor."""
    spawn = multiprocessing.get_context("spawn")  # a forked process would hang in torch's threads
    with (
        ShardWriter(folder, made_by(checkpoint), samples_per_shard=100) as writer,
        ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        numbers = [n for n in range(count) if f"{kind}-{n:05d}" not in writer.keys]
        made = pool.map(partial(make_sample, checkpoint, kind), numbers)
        for key, tensors in tqdm(made, total=len(numbers), desc=kind):
            writer.add(key, tensors)


def made_by(checkpoint: Path) -> dict[str, str]:
    """Digests of the encoders, so that samples of other ones are noticed."""
    files = {"vae": checkpoint / "vae" / WEIGHTS, "speech": checkpoint / "wav2vec2" / "model.safetensors"}
    return {name: weights_digest(load_file(path))[:16] for name, path in files.items()}
