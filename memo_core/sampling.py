"""Sampling: one function denoises one window, a loop makes a clip and hands the memory on (MEMO sections 3 and 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .audio import AudioTrack
from .checkpoint import Networks
from .clips import WINDOW
from .emotion import EmotionTrack
from .errors import SamplingError
from .memory import MemoryEntry, MemoryState, Sums, SumsCache
from .nets.audio_module import NULL_EMOTION
from .reference import Reference

FACE_TOKEN_ROWS = ("released", "grouped")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to sample.

    Attributes:
        steps: Euler steps of the rectified flow, at least 1.
        guidance_scale: classifier-free guidance; 1 samples without it, in half the time.
        seed: of the noise; each window draws from (seed, number of its first frame).
        emotion_per: "window" gives every frame of a window the most frequent label, as released; "frame" its own.
        face_token_rows: with guidance the released code hands the two sets of face tokens to the Reference Net's rows
            in turn ("released"); "grouped" gives each batch row its own.
    """

    steps: int = 20
    guidance_scale: float = 3.5
    seed: int = 42
    emotion_per: str = "window"
    face_token_rows: str = "released"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise SamplingError(f"steps must be a whole number from 1 to 1000, received {self.steps!r}")
        if not isinstance(self.guidance_scale, (int, float)) or not 1 <= self.guidance_scale <= 100:
            raise SamplingError(f"guidance_scale must be from 1 (no guidance) to 100, received {self.guidance_scale!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise SamplingError(f"seed must be a whole number from 0 to 2^64 - 1, received {self.seed!r}")
        if self.emotion_per not in ("window", "frame"):
            raise SamplingError(f"emotion_per must be 'window' or 'frame', received {self.emotion_per!r}")
        if self.face_token_rows not in FACE_TOKEN_ROWS:
            raise SamplingError(f"face_token_rows must be one of {FACE_TOKEN_ROWS}, received {self.face_token_rows!r}")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """All that one window is denoised under; batch rows are [unconditional, conditional], or the latter alone."""

    reference: list[Tensor]  # Reference Net features of the portrait per layer, [F or 1, N, C] for the conditional row
    memory: Sums
    face_tokens: Tensor  # [B, tokens, C]
    audio_tokens: Tensor  # [B, 16, tokens, C]
    emotion: Tensor  # [B] or [B * 16]


def sample_window(
    nets: Networks,
    noise: Tensor,
    conditions: Conditions,
    settings: Settings,
    on_step: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor | None:
    """Denoises one window by Euler steps along the rectified flow.

    Args:
        noise: [1, 4, 16, h, w].
        on_step: called with the number of steps done.
        should_stop: asked before every step.

    Returns:
        Scaled latents [1, 4, 16, h, w], float32; None if stopped.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(settings.steps, device=noise.device)
    dtype = nets.diffusion_net.conv_in.weight.dtype
    latents = noise.float()
    rows = 2 if settings.guided else 1
    for step, timestep in enumerate(scheduler.timesteps):
        if should_stop is not None and should_stop():
            return None
        velocity = nets.diffusion_net(
            latents.to(dtype).expand(rows, -1, -1, -1, -1),
            timestep[None],
            reference=conditions.reference,
            memory=conditions.memory,
            face_tokens=conditions.face_tokens,
            audio_tokens=conditions.audio_tokens,
            emotion=conditions.emotion,
            unconditional=rows - 1,
        ).float()
        if settings.guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + settings.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step + 1)
    return latents


@dataclass(frozen=True, eq=False)
class Window:
    """A finished window: `latents` [4, F, h, w], `frames` [F, 3, H, W] in [0, 1], and the memory after it."""

    start: int
    latents: Tensor
    frames: Tensor
    memory: MemoryState


class Sampler:
    """Samples windows of one portrait with one checkpoint; keeps what does not change between them."""

    def __init__(self, nets: Networks, reference: Reference, settings: Settings, cache: SumsCache):
        self.nets, self.reference, self.settings, self.cache = nets, reference, settings, cache
        weight = nets.diffusion_net.conv_in.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._tokens = self._face_tokens(reference.face_embedding)
        self._reference_features: list[Tensor] | None = None

    def _face_tokens(self, embedding: Tensor) -> Tensor:
        """[1, 512] -> [2, tokens, C]: unconditional, conditional."""
        return self.nets.image_proj(torch.cat([torch.zeros_like(embedding), embedding]).to(self.device, self.dtype))

    # Rows of the Reference Net. In the released code they are, with guidance, [reference, 16 past frames] twice, and
    # row r reads the unconditional face tokens if r is even. `row` below is r.
    def _token_rows(self, tokens: Tensor, rows: list[int], conditional: list[bool]) -> Tensor:
        if not self.settings.guided:
            return tokens[1:].expand(len(rows), -1, -1)
        if self.settings.face_token_rows == "released":
            return tokens[[row % 2 for row in rows]]
        return tokens[[int(flag) for flag in conditional]]

    def reference_features(self) -> list[Tensor]:
        """Features of the portrait for the conditional row, one set per frame where they differ between frames."""
        if self._reference_features is None:
            latents = self.reference.latents.to(self.device, self.dtype)
            if self.settings.guided and self.settings.face_token_rows == "released":
                # The released code tiles the rows (0 and 17) of its two portraits over the frames, so frames see them
                # in turn.
                tokens = self._token_rows(self._tokens, [0, 1 + WINDOW], [False, True])
                pair = self.nets.reference_net(latents.expand(2, -1, -1, -1), tokens)
                self._reference_features = [feature.repeat(WINDOW // 2, 1, 1) for feature in pair]
            else:
                self._reference_features = self.nets.reference_net(latents, self._tokens[1:])
        return self._reference_features

    def entry_sums(self, entry: MemoryEntry) -> Iterator[tuple[Tensor, Tensor]]:
        """What one remembered window adds to the memory, layer by layer, for every batch row."""
        frames, _, height, width = entry.latents.shape
        latents = entry.latents.to(self.device, self.dtype)
        batch = 2 if self.settings.guided else 1
        rows = [b * (1 + WINDOW) + 1 + j for b in range(batch) for j in range(frames)]
        conditional = [bool(b) for b in range(batch) for _ in range(frames)]
        tokens = self._token_rows(self._face_tokens(entry.face_embedding), rows, conditional)
        features = self.nets.reference_net(latents.repeat(batch, 1, 1, 1), tokens)
        return self.nets.diffusion_net.memory_sums(features, height, width, frames)

    def conditions(self, audio: Tensor, emotion: Tensor, memory: MemoryState) -> Conditions:
        """
        Args:
            audio: [16, context, layers, channels] embeddings of the window's frames.
            emotion: [16] labels.
            memory: state that enters the window, with a past.
        """
        tokens = self.nets.audio_proj(audio[None].to(self.device, self.dtype))
        emotion = emotion.to(self.device)
        if self.settings.emotion_per == "window":
            emotion = emotion.mode().values[None]
        face = self._tokens[1:]
        if self.settings.guided:
            tokens = torch.cat([torch.zeros_like(tokens), tokens])
            emotion = torch.cat([torch.full_like(emotion, NULL_EMOTION), emotion])
            face = self._tokens
        settings = self.settings
        context = f"{self.nets.digest}|{self.dtype}|{self.device}|{settings.guided}|{settings.face_token_rows}"
        return Conditions(
            reference=self.reference_features(),
            memory=self.cache.sums(memory, context, self.entry_sums),
            face_tokens=face,
            audio_tokens=tokens,
            emotion=emotion,
        )


def _chunk(height: int, width: int) -> int:
    """Frames that go through the VAE at once: one at 512 x 512, as released, more where they are small."""
    return max(1, min(WINDOW, 512 * 512 // (height * width)))


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1]."""
    latents = latents.transpose(0, 1).to(vae.device, vae.dtype) / vae.config.scaling_factor
    chunks = latents.split(_chunk(8 * latents.shape[2], 8 * latents.shape[3]))
    frames = torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
    return (frames.float() / 2 + 0.5).clamp(0, 1)


def encode(vae, frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W] in [-1, 1] -> scaled VAE means [F, 4, h, w], float32."""
    chunks = frames.to(vae.device, vae.dtype).split(_chunk(*frames.shape[2:]))
    means = torch.cat([vae.encode(chunk, return_dict=False)[0].mean for chunk in chunks])
    return means.float() * vae.config.scaling_factor


def window_noise(seed: int, first_frame: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a window, the same on every device: it depends on the seed and the window's place in the audio alone."""
    # Hashed, because torch's generator reads only 32 bits: seeds that differ above them give different noise, too.
    digest = hashlib.sha256(f"{seed} {first_frame}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def sample_windows(
    nets: Networks,
    reference: Reference,
    audio: AudioTrack,
    emotion: EmotionTrack | None,
    memory: MemoryState,
    *,
    settings: Settings,
    cache: SumsCache,
    start: int = 0,
    num_frames: int | None = None,
    noise: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Window]:
    """Samples frames [start, start + num_frames) window by window, handing the memory on.

    Args:
        start: first frame, at any phase; windows begin at start, start + 16, ...
        num_frames: None for up to the end of the audio.
        noise: [windows, 4, 16, h, w] instead of the seeded noise.
        on_progress: called as (steps done, steps in all).
        should_stop: asked before every step; when true, ends after the last finished window.

    Raises:
        SamplingError: arguments out of range or of the wrong shape. MemoryStateError: a memory of another checkpoint or
            reference.
    """
    num_frames = _check_span(audio, emotion, start, num_frames, nets.audio_proj.proj1.in_features)
    height, width = reference.latents.shape[2:]
    windows = -(-num_frames // WINDOW)
    shape = (4, WINDOW, height, width)
    if noise is not None and tuple(noise.shape) != (windows, *shape):
        raise SamplingError(f"noise must be {[windows, *shape]} for {windows} windows, received {list(noise.shape)}")
    if noise is not None and not torch.isfinite(noise).all():
        raise SamplingError("noise holds NaN or infinite values")
    memory.require(nets.digest, reference.digest)
    sampler = Sampler(nets, reference, settings, cache)
    if memory.is_empty:  # before the first window the past is the portrait, held still
        past = reference.latents.expand(WINDOW, -1, -1, -1)
        memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest, windows=0)
    labels = torch.full((audio.num_padded_frames,), NULL_EMOTION) if emotion is None else emotion.labels
    for index in range(windows):
        first = start + index * WINDOW
        heard = torch.arange(first, first + WINDOW).clamp_max(audio.num_padded_frames - 1)
        conditions = sampler.conditions(audio.embeddings[heard], labels[heard.clamp_max(len(labels) - 1)], memory)
        start_noise = noise[index] if noise is not None else window_noise(settings.seed, first, shape)
        done = index * settings.steps
        latents = sample_window(
            nets,
            start_noise[None].to(sampler.device),
            conditions,
            settings,
            on_step=None if on_progress is None else lambda step: on_progress(done + step, windows * settings.steps),
            should_stop=should_stop,
        )
        if latents is None:
            return
        if not torch.isfinite(latents).all():
            raise SamplingError(
                f"the networks gave NaN or infinite values in {sampler.dtype}; run them in float32 or bfloat16"
            )
        latents = latents[0, :, : start + num_frames - first]
        frames = decode(nets.vae, latents)
        past = encode(nets.vae, frames * 2 - 1)  # what the viewer sees, not the latents themselves, as released
        memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest)
        yield Window(first, latents.cpu().contiguous(), frames.cpu(), memory)


def _check_span(
    audio: AudioTrack, emotion: EmotionTrack | None, start: int, num_frames: int | None, features: int
) -> int:
    """Number of frames to sample; SamplingError where the arguments do not fit each other."""
    if not isinstance(start, int) or not 0 <= start < audio.num_frames:
        raise SamplingError(
            f"start must be a frame from 0 to {audio.num_frames - 1} (the audio's last), received {start!r}"
        )
    left = audio.num_frames - start
    if num_frames is None:
        num_frames = left
    if not isinstance(num_frames, int) or not 1 <= num_frames <= left:
        raise SamplingError(
            f"num_frames must be from 1 to {left} (from frame {start} to the audio's end), received {num_frames!r}"
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
    return num_frames
