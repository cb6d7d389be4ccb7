"""Clips -> what training reads: VAE latents, speech features, emotions, face embedding, focus mask; and into shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.inputs.emotion import detect_emotion
from memo_core.inputs.speech import NEIGHBOURS, encode_audio
from memo_core.release import SAMPLE_RATE
from memo_core.sampling.vae import encode_frames
from memo_core.tensorfile import save_tensors

from .. import media
from ..shard_index import crop_scale
from ..shards import ShardWriter
from ..vae import load_vae
from .clip import alone
from .faces import face_analyzer
from .rows import Row
from .settings import Settings

RATE = SAMPLE_RATE
SAMPLES_PER_SHARD = 256
CHUNK = 16  # pictures encoded at once on a GPU
SPOOL = 256 * 2**20  # bytes


def encode(row: Row, settings: Settings) -> list[Row]:
    """Writes encoded/<key>.safetensors with the tensors that `training.shards` lists, or leaves it as it is."""
    return [row] if _path(row, settings).is_file() else alone(row, settings, Encoder(row, settings, at_once=True))


def _path(row: Row, settings: Settings) -> Path:
    return Path(settings.out, "encoded", f"{row.key}.safetensors")


class Encoder:
    """What `encode` reads; a `clip.Reader`.

    Args:
        at_once: pictures are encoded while they are read. Else they wait for `finish`, in memory or, from SPOOL bytes
            on, in a temporary file: 30 s of 512 pixels take 0.7 GB.
    """

    def __init__(self, row: Row, settings: Settings, at_once: bool) -> None:
        self._row, self._settings, self._source = row, settings, Path(settings.raw, row.source)
        self._rate = media.EvenRate(row.start, row.end, settings.fps)
        self._chunk: list[NDArray[np.uint8]] = []
        self._latents: list[Tensor] = []
        self._portrait: NDArray[np.uint8] | None = None  # the picture of the surest face
        self._spool = None if at_once else SpooledTemporaryFile(SPOOL)  # noqa: SIM115 -- until it is read

    @property
    def is_there(self) -> bool:
        """Whether an earlier run has encoded the clip."""
        return _path(self._row, self._settings).is_file()

    def push(self, time: float, picture: NDArray[np.uint8]) -> None:
        face_time = self._row.face_time
        if self._portrait is None and face_time is not None and time >= face_time - 0.5 / self._row.fps:
            self._portrait = picture
        self._take(self._rate.push(time, picture))

    def end(self) -> None:
        self._take(self._rate.finish())

    def _take(self, chosen: Iterator[NDArray[np.uint8]]) -> None:
        for picture in chosen:
            picture = media.cut(picture, self._row.box, self._settings.size)
            if self._spool is not None:
                self._spool.write(picture.tobytes())
            else:
                self._encode(picture)

    def _encode(self, picture: NDArray[np.uint8] | None = None) -> None:
        """A picture, with others; the last ones without one."""
        if picture is not None:
            self._chunk.append(picture)
        if len(self._chunk) == CHUNK or (picture is None and self._chunk):
            self._latents.append(_latents(_networks(self._settings.models, self._settings.device)[0], self._chunk))
            self._chunk = []

    def finish(self, row: Row) -> Row:
        path = _path(row, self._settings)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            save_tensors({name: tensor.contiguous() for name, tensor in self._tensors(row).items()}, path)
        return row

    @torch.no_grad()
    def _tensors(self, row: Row) -> dict[str, Tensor]:
        settings = self._settings
        _, speech, emotion_encoder, emotion_head = _networks(settings.models, settings.device)
        if self._spool is not None:
            self._spool.seek(0)
            shape = settings.size, settings.size, 3
            while data := self._spool.read(math.prod(shape)):
                self._encode(np.frombuffer(data, np.uint8).reshape(shape))
            self._spool.close()
        self._encode()
        tensors = {"latents": torch.cat(self._latents)}
        frames = len(tensors["latents"])
        start = row.start - row.delay
        waveform = media.sound(self._source, start, start + frames / settings.fps, RATE)[0]
        track = encode_audio(waveform, RATE, speech, settings.fps, context=None, window_frames=1)
        tensors["speech"] = track.embeddings[:frames, NEIGHBOURS].half()
        labels = detect_emotion(waveform, RATE, emotion_encoder, emotion_head, frames, settings.fps).labels
        tensors["emotion"] = labels.to(torch.uint8)
        if row.keypoints is not None and self._portrait is not None:
            tensors["face_embedding"] = _embedding(row, settings, self._portrait)
            tensors["focus"] = focus([row.eyes_box, row.mouth_box], settings.size // 8)
        return tensors


@torch.no_grad()
def _latents(vae: Any, pictures: list[NDArray[np.uint8]]) -> Tensor:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    # One after the other on a CPU, where more at once are no faster and change the last digits.
    at_once = CHUNK if vae.device.type == "cuda" else None
    return encode_frames(vae, pixels, at_once=at_once).cpu().half()


def _embedding(row: Row, settings: Settings, picture: NDArray[np.uint8]) -> Tensor:
    from memo_core.encoders.face import Face

    points = np.array(row.keypoints, np.float32).reshape(5, 2)
    face = Face(tuple(row.face_box), points, 1.0)
    return torch.from_numpy(face_analyzer(settings.models, settings.device).embed(picture, face))


def focus(boxes: Iterable[list[float]], side: int) -> Tensor:
    """How much of each latent lies in one of the boxes (left, top, right, bottom in [0, 1]): [side, side] half."""
    fine = torch.zeros(8 * side, 8 * side)
    for box in boxes:
        left, top, right, bottom = (round(8 * side * value) for value in box)
        fine[top:bottom, left:right] = 1
    return torch.nn.functional.adaptive_avg_pool2d(fine[None], side)[0].half()


@lru_cache(maxsize=1)
def _networks(models: str, device: str) -> tuple[Any, Any, Any, Any]:
    from memo_core.encoders.emotion2vec import Emotion2Vec
    from memo_core.encoders.emotion_head import EmotionHead
    from memo_core.encoders.speech import SpeechEncoder

    folder = Path(models)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32  # the latter is slow on a GPU
    return (
        load_vae(folder, device, dtype),
        SpeechEncoder.from_pretrained(folder / "wav2vec2", device=device),
        Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device),
        EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device),
    )


class Packer:
    """Moves encoded clips into shards, as they come. Only whole shards count: what was not in one is still encoded/."""

    def __init__(self, settings: Settings):
        self.folder = Path(settings.out, "shards")
        self.encoded = Path(settings.out, "encoded")
        self.fps = settings.fps
        self.writer = ShardWriter(self.folder, settings.encoders(), SAMPLES_PER_SHARD)
        self._added: list[Path] = []

    @property
    def keys(self) -> set[str]:
        """In shards, or about to be."""
        return self.writer.keys

    def keep(self, wanted: set[str]) -> None:
        """Takes samples of other keys out."""
        if not self.writer.keys <= wanted:
            self.close()
            self.writer.remove(self.writer.keys - wanted)

    def add(self, row: Row) -> Row:
        """The row, failed where its file in encoded/ is damaged, which is then deleted."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.encoded / f"{row.key}.safetensors"
        if row.key in self.keys:
            path.unlink(missing_ok=True)
            return row
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            said = f"{path.name} cannot be read: {error}. --retry encodes the clip again"
            return row.fail("encode", "damaged file", said, error=True)
        about = {name: value for name, value in row.to_json().items() if name not in ("done", "failure", "error")}
        about |= {"encoded_fps": self.fps, "video": row.identity, "crop_scale": crop_scale(row.box, row.looks)}
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
