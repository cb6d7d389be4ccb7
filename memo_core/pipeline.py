"""MemoPipeline: the five calls that turn a portrait and a voice into a talking clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, emotion
from .audio import AudioTrack, encode_audio
from .checkpoint import Networks
from .clips import WINDOW, Clip
from .emotion import EmotionTrack
from .errors import PortraitError
from .face import FaceAnalyzer, prepare_portrait
from .memory import MemoryState, SumsCache
from .reference import Reference
from .sampling import Settings, Window, decode, encode, sample_windows

FACE_EMBEDDING_DIM = 512


class MemoPipeline:
    """A loaded checkpoint and the calls on it. None of them changes its arguments.

    Create with `from_pretrained`.

    Args:
        nets: the networks.
    """

    def __init__(self, nets: Networks):
        self.nets = nets
        self._sums = SumsCache()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] = "toon", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> MemoPipeline:
        """Loads a folder in the released layout, or an embedded checkpoint by name ("toon").

        Raises:
            CheckpointError: names the files or the first ten keys that do not fit.
        """
        return cls(checkpoint.load(path, device, dtype))

    @property
    def device(self) -> torch.device:
        return self.nets.diffusion_net.conv_in.weight.device

    def encode_audio(
        self, waveform: Tensor | np.ndarray, sample_rate: int, fps: float = 30, context: float | str | None = "auto"
    ) -> AudioTrack:
        """Speech features for every video frame; see `audio.encode_audio`.

        Args:
            waveform: [T] or [channels, T], any rate.
            context: None encodes the whole recording at once, as released; a number encodes chunks with that many seconds of
                context on either side; "auto" is None up to 60 s and chunks above.
        """
        return encode_audio(waveform, sample_rate, self.nets.speech_encoder, fps=fps, context=context, window_frames=WINDOW)

    def detect_emotion(
        self, waveform: Tensor | np.ndarray, sample_rate: int, num_padded_frames: int, fps: float = 30
    ) -> EmotionTrack:
        """Emotion label of every video frame; see `emotion.detect_emotion`."""
        return emotion.detect_emotion(
            waveform, sample_rate, self.nets.emotion_encoder, self.nets.emotion_head, num_padded_frames, fps
        )

    @torch.no_grad()
    def encode_reference(
        self,
        image,
        face_embedding: Tensor | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        crop: str = "none",
        face_index: int | None = None,
        no_face: str = "warn",
    ) -> Reference:
        """The portrait as the networks see it.

        Args:
            image: float [3, H, W] in [-1, 1], uint8 [H, W, 3], or a PIL image.
            face_embedding: [512] or [1, 512]; None embeds the face with the checkpoint's face models, or zeros without them.
            size: side or (height, width) of the video in multiples of 64; None keeps a tensor's size, and takes the size the
                checkpoint was trained at for a picture.
            crop: "face" crops to the face with a margin, "none" to the middle.
            face_index: which face, from left to right; None takes the largest.
            no_face: "warn" goes on with a zero embedding, "error" raises.

        Raises:
            PortraitError: wrong shape, range or size (names the nearest allowed sizes), or no face where one was demanded.
        """
        if size is None:
            is_tensor = isinstance(image, Tensor)
            size = tuple(image.shape[-2:]) if is_tensor else self.default_size
        analyzer = None if face_embedding is not None else FaceAnalyzer.from_folder(self.nets.folder)
        portrait = prepare_portrait(
            image, size, crop=crop, face_index=face_index, analyzer=analyzer, no_face=no_face if face_embedding is None else "warn"
        )
        embedding = portrait.face_embedding if face_embedding is None else torch.as_tensor(face_embedding).float().reshape(1, -1)
        if embedding.shape != (1, FACE_EMBEDDING_DIM):
            raise PortraitError(f"a face embedding has {FACE_EMBEDDING_DIM} numbers, received {embedding.shape[1]}")
        return Reference(portrait.pixels, encode(self.nets.vae, portrait.pixels[None]).cpu(), embedding)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width the checkpoint was trained at."""
        side = 8 * self.nets.sample_size
        return side, side

    def sample_windows(
        self,
        ref: Reference,
        audio: AudioTrack,
        emotion: EmotionTrack | None = None,
        memory: MemoryState | None = None,
        *,
        start: int = 0,
        num_frames: int | None = None,
        steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        noise: Tensor | None = None,
        emotion_per: str = "window",
        face_token_rows: str = "released",
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Window]:
        """As `sample_clip`, but hands over each window of frames as soon as it is finished; constant memory at any length."""
        settings = Settings(
            steps=steps, guidance_scale=guidance_scale, seed=seed, emotion_per=emotion_per, face_token_rows=face_token_rows
        )
        return sample_windows(
            self.nets, ref, audio, emotion, MemoryState.empty() if memory is None else memory, settings=settings,
            cache=self._sums, start=start, num_frames=num_frames, noise=noise, on_progress=on_progress, should_stop=should_stop,
        )

    def sample_clip(
        self,
        ref: Reference,
        audio: AudioTrack,
        emotion: EmotionTrack | None = None,
        memory: MemoryState | None = None,
        **options,
    ) -> tuple[Clip, MemoryState]:
        """Samples frames [start, start + num_frames) of the audio.

        Args:
            ref, audio, emotion: from the three calls above; without an emotion track the null emotion is used.
            memory: what came before; None is a new video.
            start, num_frames: in frames; None for up to the audio's end.
            steps, guidance_scale, seed, emotion_per, face_token_rows: see `sampling.Settings`.
            noise: [windows, 4, 16, h, w] instead of the seeded noise.
            on_progress: called as (steps done, steps in all).
            should_stop: asked before every step; when true, the clip ends after the last finished window.

        Returns:
            The clip, and the memory to go on with.

        Raises:
            SamplingError: arguments out of range. MemoryStateError: a memory of another checkpoint or reference.
        """
        memory = MemoryState.empty() if memory is None else memory
        latents = [torch.zeros(4, 0, *ref.latents.shape[2:])]
        wanted = options.get("num_frames")
        start = options.get("start", 0)
        wanted = audio.num_frames - start if wanted is None else wanted
        for window in self.sample_windows(ref, audio, emotion, memory, **options):
            latents.append(window.latents)
            memory = window.memory
        clip_latents = torch.cat(latents, dim=1)
        clip = Clip(
            latents=clip_latents,
            start=start,
            fps=audio.fps,
            decode=lambda window: self.decode(window),
            stopped=clip_latents.shape[1] < wanted,
        )
        return clip, memory

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1]."""
        return decode(self.nets.vae, latents)
