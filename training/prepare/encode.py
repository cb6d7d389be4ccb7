"""Clips -> what training reads: VAE latents, speech features, emotions, face embedding, focus mask; and into shards."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.inputs.emotion import detect_emotion
from memo_core.inputs.speech import NEIGHBOURS, encode_audio
from memo_core.release import SAMPLE_RATE
from memo_core.sampling.vae import encode_frames
from memo_core.tensorfile import save_tensors

from .. import media
from ..shards import ShardWriter
from .faces import face_analyzer
from .rows import Row
from .settings import Settings

RATE = SAMPLE_RATE
SAMPLES_PER_SHARD = 256
CHUNK = 16  # pictures encoded at once


@torch.no_grad()
def encode(row: Row, settings: Settings) -> list[Row]:
    """Writes encoded/<key>.safetensors with the tensors that `training.shards` lists, or leaves it as it is."""
    path = Path(settings.out, "encoded", f"{row.key}.safetensors")
    if path.is_file():
        return [row]
    path.parent.mkdir(exist_ok=True)
    vae, speech, emotion_encoder, emotion_head = _networks(settings.models, settings.device)
    source = Path(settings.raw, row.source)
    latents, chunk = [], []
    for picture in media.at_rate(source, row.start, row.end, settings.fps, settings.max_pixels):
        chunk.append(media.cut(picture, row.box, settings.size))
        if len(chunk) == CHUNK:
            latents.append(_latents(vae, chunk))
            chunk = []
    if chunk:
        latents.append(_latents(vae, chunk))
    tensors = {"latents": torch.cat(latents)}
    frames = len(tensors["latents"])
    waveform = media.sound(source, row.start, row.start + frames / settings.fps, RATE)[0]
    track = encode_audio(waveform, RATE, speech, settings.fps, context=None, window_frames=1)
    tensors["speech"] = track.embeddings[:frames, NEIGHBOURS].half()
    labels = detect_emotion(waveform, RATE, emotion_encoder, emotion_head, frames, settings.fps).labels
    tensors["emotion"] = labels.to(torch.uint8)
    if row.keypoints is not None:
        tensors["face_embedding"] = _embedding(row, settings, source)
        tensors["focus"] = focus([row.eyes_box, row.mouth_box], settings.size // 8)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return [row]


def _latents(vae: Any, pictures: list[np.ndarray]) -> Tensor:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return encode_frames(vae, pixels).cpu().half()


def _embedding(row: Row, settings: Settings, source: Path) -> Tensor:
    from memo_core.encoders.face import Face

    step = 0.5 / row.fps
    _, picture = next(
        found
        for found in media.pictures(source, row.face_time, row.face_time + step, settings.max_pixels)
        if found[0] >= row.face_time - step
    )
    points = np.array(row.keypoints, np.float32).reshape(5, 2)
    return torch.from_numpy(face_analyzer(settings.models).embed(picture, Face(tuple(row.face_box), points, 1.0)))


def focus(boxes: Iterable[list[float]], side: int) -> Tensor:
    """How much of each latent lies in one of the boxes (left, top, right, bottom in [0, 1]): [side, side] half."""
    fine = torch.zeros(8 * side, 8 * side)
    for box in boxes:
        left, top, right, bottom = (round(8 * side * value) for value in box)
        fine[top:bottom, left:right] = 1
    return torch.nn.functional.adaptive_avg_pool2d(fine[None], side)[0].half()


@lru_cache(maxsize=1)
def _networks(models: str, device: str) -> tuple[Any, Any, Any, Any]:
    from diffusers import AutoencoderKL

    from memo_core.encoders.emotion2vec import Emotion2Vec
    from memo_core.encoders.emotion_head import EmotionHead
    from memo_core.encoders.speech import SpeechEncoder

    folder = Path(models)
    vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False, local_files_only=True)
    return (
        vae.float().eval().requires_grad_(False).to(device),
        SpeechEncoder.from_pretrained(folder / "wav2vec2", device=device),
        Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device),
        EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device),
    )


class Packer:
    """Moves encoded clips into shards, as they come. Only whole shards count: what was not in one is still encoded/.

    Args:
        wanted: keys that the shards may hold; others are taken out.
    """

    def __init__(self, settings: Settings, wanted: set[str]):
        self.folder = Path(settings.out, "shards")
        self.encoded = Path(settings.out, "encoded")
        self.encoders = settings.encoders()
        self.writer = ShardWriter(self.folder, self.encoders, SAMPLES_PER_SHARD)
        if not self.writer.keys <= wanted:
            self.writer.remove(self.writer.keys - wanted)
        self._added: list[Path] = []

    @property
    def keys(self) -> set[str]:
        """In shards, or about to be."""
        return self.writer.keys

    def add(self, row: Row) -> Row:
        """The row, failed where its file in encoded/ is damaged, which is then deleted."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.encoded / f"{row.key}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            said = f"{path.name} cannot be read: {error}. --retry encodes the clip again"
            return row.fail("encode", "damaged file", said, error=True)
        about = {name: value for name, value in row.to_json().items() if name not in ("done", "failure", "error")}
        self.writer.add(row.key, tensors, about)
        self._added.append(path)
        if len(self._added) >= SAMPLES_PER_SHARD:
            self.close()
        return row

    def close(self) -> None:
        self.writer.close()
        for path in self._added:
            path.unlink(missing_ok=True)
        self._added = []
