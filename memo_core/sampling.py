"""Sampling: one function denoises one window, a loop makes a clip and hands the memory on (MEMO sections 3 and 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from .audio import AudioTrack
from .checkpoint import Networks
from .clips import WINDOW
from .emotion import EmotionTrack
from .errors import SamplingError
from .memory import MemoryEntry, MemoryState, Sums, SumsCache
from .nets.audio_module import NULL_EMOTION
from .reference import Reference, tensors_digest
from .store import WindowStore

FACE_TOKEN_ROWS = ("released", "grouped")
WINDOW_VERSION = 1  # to be raised whenever the same inputs come to give another window: stored ones are then not found


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
    emotion: Tensor  # labels [B] or [B * 16], or class weights [B, 10] or [B * 16, 10]

    def rows(self) -> list[tuple[Conditions, int]]:
        """The unconditional and the conditional row by themselves, and how many rows of each are unconditional."""
        return [
            (
                Conditions(
                    reference=[feature[:0] for feature in self.reference] if unconditional else self.reference,
                    memory=[(kv[row], z[row]) for kv, z in self.memory],
                    face_tokens=self.face_tokens[row],
                    audio_tokens=self.audio_tokens[row],
                    emotion=self.emotion.chunk(2)[1 - unconditional],
                ),
                unconditional,
            )
            for row, unconditional in ((slice(0, 1), 1), (slice(1, 2), 0))
        ]


def sample_window(
    nets: Networks,
    noise: Tensor,
    conditions: Conditions,
    settings: Settings,
    on_step: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    row_by_row: bool = False,
) -> Tensor | None:
    """Denoises one window by Euler steps along the rectified flow.

    Args:
        noise: [1, 4, 16, h, w].
        on_step: called with the number of steps done.
        should_stop: asked before every step.
        row_by_row: with guidance, runs the two batch rows one after the other: half the working memory, and the same
            numbers up to rounding.

    Returns:
        Scaled latents [1, 4, 16, h, w], float32; None if stopped.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(settings.steps, device=noise.device)
    dtype = nets.diffusion_net.conv_in.weight.dtype
    latents = noise.float()
    passes = conditions.rows() if row_by_row and settings.guided else [(conditions, int(settings.guided))]
    for step, timestep in enumerate(scheduler.timesteps):
        if should_stop is not None and should_stop():
            return None
        velocity = torch.cat(
            [
                nets.diffusion_net(
                    latents.to(dtype).expand(len(given.face_tokens), -1, -1, -1, -1),
                    timestep[None],
                    reference=given.reference,
                    memory=given.memory,
                    face_tokens=given.face_tokens,
                    audio_tokens=given.audio_tokens,
                    emotion=given.emotion,
                    unconditional=unconditional,
                ).float()
                for given, unconditional in passes
            ]
        )
        if settings.guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + settings.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step + 1)
    return latents


@dataclass(frozen=True, eq=False)
class Window:
    """A finished window.

    Attributes:
        start: number of its first frame in the audio track.
        latents: [4, F, h, w] float32 on the CPU, scaled.
        memory: the state after it.
        stored: it was found in the store, not sampled.
    """

    start: int
    latents: Tensor
    memory: MemoryState
    stored: bool
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def frames(self) -> Tensor:
        """[F, 3, H, W] in [0, 1]; a stored window is decoded when this is first asked for."""
        return self.decode(self.latents)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowInputs:
    """All that one window is made from, and nothing else: equal inputs give equal windows."""

    start: int  # first frame
    frames: int  # 16, or less where the clip ends inside the window
    audio: Tensor  # [16, context, layers, channels]
    emotion: Tensor  # labels [1] or [16], or class weights [1, 10] or [16, 10]
    noise: Tensor | None  # [4, 16, h, w]; None for the seeded one
    memory: MemoryState  # that enters

    def key(self, context: str) -> str:
        """Content address: a hash of the inputs and of `context`, which names everything else that matters."""
        digest = hashlib.sha256(f"{context}|{self.start}|{self.frames}|{self.memory.digest}".encode())
        for tensor in (self.audio, self.emotion, self.noise):
            digest.update(b"seeded" if tensor is None else tensors_digest(tensor).encode() + str(tensor.dtype).encode())
        return digest.hexdigest()[:40]


class Sampler:
    """Samples windows of one portrait with one checkpoint; keeps what does not change between them."""

    def __init__(self, nets: Networks, reference: Reference, settings: Settings, cache: SumsCache):
        self.nets, self.reference, self.settings, self.cache = nets, reference, settings, cache
        self.device, self.dtype = nets.device, nets.diffusion_net.conv_in.weight.dtype
        self._reference_features: list[Tensor] | None = None

    @cached_property
    def _tokens(self) -> Tensor:
        return self._face_tokens(self.reference.face_embedding)

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

    def conditions(self, inputs: WindowInputs) -> Conditions:
        tokens = self.nets.audio_proj(inputs.audio[None].to(self.device, self.dtype))
        emotion = inputs.emotion.to(self.device)
        face = self._tokens[1:]
        if self.settings.guided:
            tokens = torch.cat([torch.zeros_like(tokens), tokens])
            emotion = torch.cat([_null(emotion), emotion])
            face = self._tokens
        settings = self.settings
        context = f"{self.nets.digest}|{self.dtype}|{self.device}|{settings.guided}|{settings.face_token_rows}"
        return Conditions(
            reference=self.reference_features(),
            memory=self.cache.sums(inputs.memory, context, self.entry_sums),
            face_tokens=face,
            audio_tokens=tokens,
            emotion=emotion,
        )

    @cached_property
    def address(self) -> str:
        """What windows of this sampler share, for `WindowInputs.key`."""
        reference = tensors_digest(self.reference.latents, self.reference.face_embedding)
        return f"{WINDOW_VERSION}|{self.nets.digest}|{self.dtype}|{self.device.type}|{reference}|{self.settings}"


def _null(emotion: Tensor) -> Tensor:
    """The null emotion in the form of `emotion`: labels, or class weights [..., 10]."""
    if not emotion.is_floating_point():
        return torch.full_like(emotion, NULL_EMOTION)
    null = torch.zeros_like(emotion)
    null[..., NULL_EMOTION] = 1
    return null


def vae_batch(height: int, width: int) -> int:
    """Frames that go through the VAE at once: one at 512 x 512, as released, more where they are small."""
    return max(1, min(WINDOW, 512 * 512 // (height * width)))


@torch.no_grad()
def decode(vae, latents: Tensor, device: torch.device | None = None) -> Tensor:
    """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1], computed on `device` (None: where the VAE is)."""
    latents = latents.transpose(0, 1).to(device or vae.device, vae.dtype) / vae.config.scaling_factor
    chunks = latents.split(vae_batch(8 * latents.shape[2], 8 * latents.shape[3]))
    frames = torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
    return (frames.float() / 2 + 0.5).clamp(0, 1)


def encode(vae, frames: Tensor, device: torch.device | None = None) -> Tensor:
    """Frames [F, 3, H, W] in [-1, 1] -> scaled VAE means [F, 4, h, w], float32, computed on `device`."""
    chunks = frames.to(device or vae.device, vae.dtype).split(vae_batch(*frames.shape[2:]))
    means = torch.cat([vae.encode(chunk, return_dict=False)[0].mean for chunk in chunks])
    return means.float() * vae.config.scaling_factor


def window_noise(seed: int, first_frame: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a window, the same on every device: it depends on the seed and the window's place in the audio alone."""
    # Hashed, because torch's generator reads only 32 bits: seeds that differ above them give different noise, too.
    digest = hashlib.sha256(f"{seed} {first_frame}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be sampled: frames [start, start + num_frames) of `audio`, spoken by `reference`.

    Attributes:
        reference, audio, emotion: what is shown, heard and felt; no emotion is the null emotion.
        memory: what came before.
        settings: how to sample.
        start: first frame, at any phase; windows begin at start, start + 16, ...
        num_frames: None for up to the end of the audio.
        noise: [windows, 4, 16, h, w] instead of the seeded noise.
    """

    reference: Reference
    audio: AudioTrack
    emotion: EmotionTrack | None
    memory: MemoryState
    settings: Settings
    start: int = 0
    num_frames: int | None = None
    noise: Tensor | None = None

    def checked(self, nets: Networks) -> Job:
        """The job with its number of frames filled in.

        Raises:
            SamplingError: arguments out of range or of the wrong shape. MemoryStateError: a memory of another
                checkpoint or reference.
        """
        features = nets.audio_proj.proj1.in_features
        num_frames = _check_span(self.audio, self.emotion, self.start, self.num_frames, features)
        wanted = [-(-num_frames // WINDOW), 4, WINDOW, *self.reference.latents.shape[2:]]
        if self.noise is not None and list(self.noise.shape) != wanted:
            raise SamplingError(f"noise must be {wanted} for {wanted[0]} windows, received {list(self.noise.shape)}")
        if self.noise is not None and not torch.isfinite(self.noise).all():
            raise SamplingError("noise holds NaN or infinite values")
        self.memory.require(nets.digest, self.reference.digest)
        return replace(self, num_frames=num_frames)

    @property
    def windows(self) -> int:
        return -(-self.num_frames // WINDOW)

    def entering(self, nets: Networks) -> MemoryState:
        """The memory that enters the first window: before a video's first one the past is the portrait, held still."""
        if not self.memory.is_empty:
            return self.memory
        past = self.reference.latents.expand(WINDOW, -1, -1, -1)
        return self.memory.push(past, self.reference.face_embedding, nets.digest, self.reference.digest, windows=0)

    def inputs(self, index: int, memory: MemoryState) -> WindowInputs:
        """What window `index` is made from, when `memory` enters it."""
        first = self.start + index * WINDOW
        frames = torch.arange(first, first + WINDOW)
        heard = frames.clamp_max(self.audio.num_padded_frames - 1)
        if self.emotion is None:
            emotion = torch.tensor([NULL_EMOTION])
        else:
            emotion = self.emotion.conditioning(heard, self.settings.emotion_per)
        return WindowInputs(
            start=first,
            frames=min(WINDOW, self.start + self.num_frames - first),
            audio=self.audio.embeddings[heard],
            emotion=emotion,
            noise=None if self.noise is None else self.noise[index],
            memory=memory,
        )


def count_stored(nets: Networks, job: Job, store: WindowStore | None) -> int:
    """How many windows of the job, from its first one on, are in the store."""
    if store is None:
        return 0
    job = job.checked(nets)
    sampler, memory = Sampler(nets, job.reference, job.settings, SumsCache()), job.entering(nets)
    for index in range(job.windows):
        found = store.get(job.inputs(index, memory).key(sampler.address))
        if found is None:
            return index
        memory = memory.push(found["past"], job.reference.face_embedding, nets.digest, job.reference.digest)
    return job.windows


@torch.no_grad()
def sample_windows(
    nets: Networks,
    job: Job,
    *,
    cache: SumsCache,
    store: WindowStore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    row_by_row: bool = False,
) -> Iterator[Window]:
    """Samples the job window by window, handing the memory on.

    Args:
        store: where finished windows are kept, and looked for before they are sampled.
        on_progress: called as (steps done, steps in all).
        should_stop: asked before every step; when true, ends after the last finished window.
        row_by_row: see `sample_window`.

    Raises:
        SamplingError, MemoryStateError: as `Job.checked`.
    """
    job = job.checked(nets)
    settings, reference, memory = job.settings, job.reference, job.entering(nets)
    sampler = Sampler(nets, reference, settings, cache)
    shape = (4, WINDOW, *reference.latents.shape[2:])
    for index in range(job.windows):
        inputs = job.inputs(index, memory)
        key = None if store is None else inputs.key(sampler.address)
        found = None if store is None else store.get(key)
        done, total = index * settings.steps, job.windows * settings.steps
        frames = None
        if found is not None:
            latents, past = found["latents"], found["past"]
            if on_progress is not None:
                on_progress(done + settings.steps, total)
        else:
            noise = window_noise(settings.seed, inputs.start, shape) if inputs.noise is None else inputs.noise
            latents = sample_window(
                nets,
                noise[None].to(sampler.device),
                sampler.conditions(inputs),
                settings,
                on_step=None if on_progress is None else lambda step: on_progress(done + step, total),
                should_stop=should_stop,
                row_by_row=row_by_row,
            )
            if latents is None:
                return
            if not torch.isfinite(latents).all():
                raise SamplingError(
                    f"the networks gave NaN or infinite values in {sampler.dtype}; run them in float32 or bfloat16"
                )
            latents = latents[0, :, : inputs.frames].cpu().contiguous()
            frames = decode(nets.vae, latents, nets.device)
            # What the viewer sees, not the latents themselves, as released.
            past = encode(nets.vae, frames * 2 - 1, nets.device).cpu()
            if store is not None:
                store.put(key, {"latents": latents, "past": past})
        memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest)
        window = Window(inputs.start, latents, memory, found is not None, partial(decode, nets.vae, device=nets.device))
        if frames is not None:
            window.__dict__["frames"] = frames.cpu()  # what the cached property would compute
        yield window


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
