"""Job: what is to be sampled and how, checked, and cut into windows, each with all that it is made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.networks import Networks
from ..checks import shown, whole
from ..errors import SamplingError
from ..inputs.emotion import EmotionTrack
from ..inputs.reference import Reference
from ..inputs.speech import AudioTrack
from ..memory.state import MemoryState
from ..release import NULL_EMOTION, WINDOW
from ..running import precision
from ..tensorfile import tensors_digest
from .settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be sampled: frames [start, start + num_frames) of `audio`, spoken by `reference`.

    Attributes:
        reference, audio, emotion: what is shown, heard and felt; no emotion is the null emotion.
        memory: what came before.
        settings: how to sample.
        start: first frame, at any phase; windows begin at start, start + F, ...
        num_frames: how many, from 1; up to the end of the audio at most.
        noise: [windows, 4, F, h, w] instead of the seeded noise.
        window: frames of a window, F, filled in by `checked`.
    """

    reference: Reference
    audio: AudioTrack
    emotion: EmotionTrack | None
    memory: MemoryState
    settings: Settings
    num_frames: int
    start: int = 0
    noise: Tensor | None = None
    window: int = WINDOW

    def checked(self, nets: Networks) -> Job:
        """The job with its number of frames filled in.

        Raises:
            SamplingError: arguments out of range or of the wrong shape. MemoryStateError: a memory of another
                checkpoint or reference.
        """
        kinds: tuple[tuple[str, Any, Any], ...] = (
            ("reference", self.reference, Reference),
            ("audio", self.audio, AudioTrack),
            ("emotion", self.emotion, (EmotionTrack, type(None))),
            ("memory", self.memory, MemoryState),
            ("settings", self.settings, Settings),
            ("noise", self.noise, (Tensor, type(None))),
        )
        for name, value, kind in kinds:
            if not isinstance(value, kind):
                name_of_kind = (kind[0] if isinstance(kind, tuple) else kind).__name__
                raise SamplingError(f"{name} must be of type {name_of_kind}, received {shown(value)}")
        features = nets.audio_proj.proj1.in_features
        start, num_frames = _check_span(self.audio, self.emotion, self.start, self.num_frames, features)
        wanted = [-(-num_frames // nets.window), 4, nets.window, *self.reference.latents.shape[2:]]
        if self.noise is not None and list(self.noise.shape) != wanted:
            raise SamplingError(f"noise must be {wanted} for {wanted[0]} windows, received {list(self.noise.shape)}")
        floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if self.noise is not None and self.noise.dtype not in floats:
            raise SamplingError(f"noise must hold floating-point numbers, received {self.noise.dtype}")
        if self.noise is not None and not torch.isfinite(self.noise).all():
            raise SamplingError("noise holds NaN or infinite values")
        check_memory(self.memory, nets, self.reference)
        settings = self.settings.for_checkpoint(nets.diffusion_net.config)
        return replace(self, settings=settings, start=start, num_frames=num_frames, window=nets.window)

    @property
    def windows(self) -> int:
        """How many windows it has."""
        return -(-self.num_frames // self.window)

    def entering(self, nets: Networks) -> MemoryState:
        """The memory that enters the first window: before a video's first one the past is the portrait, held still."""
        if not self.memory.is_empty:
            return self.memory
        dtype = precision.remembered(nets.diffusion_net.conv_in.weight.dtype)
        past = self.reference.latents.expand(self.window, -1, -1, -1).to(dtype)
        return self.memory.push(past, self.reference.face_embedding, nets.digest, self.reference.digest, windows=0)

    def inputs(self, index: int, memory: MemoryState) -> WindowInputs:
        """What window `index` is made from, when `memory` enters it."""
        first = self.start + index * self.window
        frames = torch.arange(first, first + self.window)
        heard = frames.clamp_max(self.audio.num_padded_frames - 1)
        if self.emotion is None:
            emotion = torch.tensor([NULL_EMOTION])
        else:
            emotion = self.emotion.conditioning(heard, self.settings.emotion_per)
        return WindowInputs(
            start=first,
            frames=min(self.window, self.start + self.num_frames - first),
            audio=self.audio.embeddings[heard],
            emotion=emotion,
            noise=None if self.noise is None else self.noise[index],
            memory=memory,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowInputs:
    """All that one window is made from, and nothing else: equal inputs give equal windows."""

    start: int  # first frame
    frames: int  # F, those of a window, or less where the clip ends inside it
    audio: Tensor  # [F, context, layers, channels]
    emotion: Tensor  # labels [1] or [F], or class weights [1, 10] or [F, 10]
    noise: Tensor | None  # [4, F, h, w]; None for the seeded one
    memory: MemoryState  # that enters

    def key(self, context: str) -> str:
        """Content address: a hash of the inputs and of `context`, which names everything else that matters."""
        # Not the memory's own digest: that knows its horizon, too, which only matters once it is reached.
        past = "|".join(f"{entry.digest}:{entry.weight:.12g}" for entry in self.memory.entries)
        digest = hashlib.sha256(f"{context}|{self.start}|{self.frames}|{past}".encode())
        for tensor in (self.audio, self.emotion, self.noise):
            digest.update(b"seeded" if tensor is None else tensors_digest(tensor).encode() + str(tensor.dtype).encode())
        return digest.hexdigest()[:40]


def check_memory(memory: MemoryState, nets: Networks, reference: Reference) -> None:
    """Raises MemoryStateError where a memory was made by another checkpoint or from another reference, or does not fit
    them.
    """
    memory.require(nets.digest, reference.digest)
    memory.require_size(reference.latents.shape[1:], nets.image_proj.proj.in_features)


def _check_span(
    audio: AudioTrack, emotion: EmotionTrack | None, start: int, num_frames: int, features: int
) -> tuple[int, int]:
    """First frame and number of frames to sample; SamplingError where the arguments do not fit each other."""
    first = whole(start, 0, audio.num_frames - 1)
    if first is None:
        raise SamplingError(
            f"start must be a frame from 0 to {audio.num_frames - 1} (the audio's last), received {shown(start)}"
        )
    left = audio.num_frames - first
    count = whole(num_frames, 1, left)
    if count is None:
        raise SamplingError(
            f"num_frames must be from 1 to {left} (from frame {first} to the audio's end), received {shown(num_frames)}"
        )
    if audio.embeddings[0].numel() != features:
        raise SamplingError(
            f"the checkpoint reads {features} speech features per frame, the audio track has "
            f"{list(audio.embeddings.shape[1:])}: encode the audio with the same checkpoint"
        )
    if emotion is not None and len(emotion.labels) < audio.num_frames:
        raise SamplingError(
            f"the emotion track has {len(emotion.labels)} frames, the audio {audio.num_frames}: "
            "make both from one recording"
        )
    return first, count
