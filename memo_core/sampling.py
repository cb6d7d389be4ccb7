"""Sampling: one function denoises one window, a loop makes a clip and hands the memory on (MEMO sections 3 and 4.1).

past <- the portrait, held still                        before a video's first window
for every window of 16 frames:
    memory <- 0.9^16 memory + sums(past)                kernels/naive.py, equations 3 and 4
    x <- noise
    for every step, from sigma 1 to 0:                  solvers.py
        v <- unconditional + scale (conditional - unconditional), both by the Diffusion Net under
             portrait, sound, emotion and memory        kernels/naive.py, equation 2
        x <- x + (next sigma - sigma) v
    frames <- decode(x); past <- encode(frames)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import devices, precision, solvers, waiting
from .checkpoint import Networks
from .clips import WINDOW
from .errors import SamplingError
from .job import Job, Settings, WindowInputs
from .memory import FP8, MemoryEntry, MemoryState, Sums, SumsCache, half_of
from .nets.audio_module import NULL_EMOTION
from .nets.diffusion_net import DiffusionNet, WindowConditions
from .nets.memory_module import LazyMemory, Memory
from .optimise import GraphedStep
from .reference import Reference, tensors_digest
from .speed import name_of
from .store import WindowStore
from .threads import side_by_side

if TYPE_CHECKING:
    from .budget import Plan

WINDOW_VERSION = 3  # to be raised whenever the same inputs come to give another window: stored ones are then not found


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """All that one window is denoised under; batch rows are [unconditional, conditional], or the latter alone."""

    reference: list[Tensor]  # Reference Net features of the portrait per layer for the conditional rows, [P, K, N, C]:
    # K sets, which the frames see in turn
    memory: Sums | None
    face_tokens: Tensor  # [B, tokens, C]
    audio_tokens: Tensor  # [B, 16, tokens, C]
    emotion: Tensor  # labels [B] or [B * 16], or class weights [B, 10] or [B * 16, 10]


class _Stopped(Exception):
    """`should_stop` said so."""


def sample_window(
    nets: Networks,
    noise: Tensor,
    conditions: Conditions,
    settings: Settings,
    on_step: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    row_by_row: bool = False,
) -> Tensor | None:
    """Denoises one window along the rectified flow.

    Args:
        noise: [P, 4, 16, h, w]: P videos at once, whose conditions have as many rows (with guidance first P
            unconditional ones, then P conditional ones).
        on_step: called with the number of steps done.
        should_stop: asked before every step.
        row_by_row: with guidance, runs the unconditional and the conditional rows one after the other: half the working
            memory, and the same numbers up to rounding.

    Returns:
        Scaled latents [P, 4, 16, h, w], float32; None if stopped.
    """
    net, speed, guided = nets.diffusion_net, settings.speed, settings.guided
    dtype = net.conv_in.weight.dtype
    sigmas = solvers.sigmas(settings.steps)
    # All that is the same at every step, or known before the first one.
    shifts = net.time_shifts(torch.tensor(sigmas[:-1], device=noise.device) * 1000, dtype)
    given = net.prepare(
        reference=conditions.reference,
        face_tokens=conditions.face_tokens,
        audio_tokens=conditions.audio_tokens,
        emotion=conditions.emotion,
        frames=noise.shape[2],
    )
    whole = _Pass(net, given, conditions.memory)
    halves = [whole.half(number) for number in (0, 1)] if guided else [whole, whole]
    options = getattr(nets, "options", None)  # networks in training have none
    if options and options.cuda_graphs and not getattr(conditions.memory, "on_host", False):
        with torch.cuda.device(noise.device):
            pool = torch.cuda.graph_pool_handle()
        whole, *halves = (GraphedStep(step, pool) for step in (whole, *halves))
    beside = bool(options and options.rows_on_threads) and not row_by_row
    low, high = speed.guidance

    def velocity(latents: Tensor, step: int) -> Tensor:
        if should_stop is not None and should_stop():
            raise _Stopped
        latents, shift = latents.to(precision.carried(dtype)), [shift[step : step + 1] for shift in shifts]
        if not guided or not low <= sigmas[step] <= high:
            answer = halves[1](latents, shift)
        else:
            if beside or row_by_row:
                rows = [partial(half, latents, shift) for half in halves]
                both = side_by_side(rows) if beside else [row() for row in rows]
            else:
                both = whole(latents, shift).chunk(2)
            unconditional, conditional = both
            answer = unconditional + settings.guidance_scale * (conditional - unconditional)
        if on_step is not None:
            on_step(step + 1)
        return answer

    try:
        return solvers.SOLVERS[speed.solver](velocity, noise.float(), sigmas)
    except _Stopped:
        return None


class _Pass:
    """A pass of the Diffusion Net over all rows of the batch, or over half of them, under a window's conditions."""

    def __init__(self, net: DiffusionNet, given: WindowConditions, memory: list[LazyMemory] | None):
        self.net, self.given, self.memory = net, given, memory

    def half(self, number: int) -> _Pass:
        memory = None if self.memory is None else half_of(self.memory, number)
        return _Pass(self.net, self.given.half(number), memory)

    def __call__(self, latents: Tensor, shift: list[Tensor]) -> Tensor:
        return self.net(latents, shift, self.given, self.memory).float()


@dataclass(frozen=True, eq=False)
class Window:
    """A finished window.

    Attributes:
        start: number of its first frame in the audio track.
        latents: [4, F, h, w] float32 on the CPU, scaled.
        memory: the state after it.
        stored: it was found in the store, not sampled.
        decode: latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1].
    """

    start: int
    latents: Tensor
    memory: MemoryState
    stored: bool
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def frames(self) -> Tensor:
        """[F, 3, H, W] in [0, 1] on the CPU; a stored window is decoded when this is first asked for."""
        with _naming_window(self.start):
            return self.decode(self.latents).cpu()


class Sampler:
    """Samples windows of one portrait with one checkpoint; keeps what does not change between them.

    Attributes:
        plan: where sums lie, and whether the Reference Net and the Diffusion Net take turns on the device; None: all is
            there.
    """

    def __init__(self, nets: Networks, reference: Reference, settings: Settings, cache: SumsCache):
        self.nets, self.reference, self.settings, self.cache = nets, reference, settings, cache
        self.plan: Plan | None = None
        self.device, self.dtype = nets.device, nets.diffusion_net.conv_in.weight.dtype
        self.past_dtype = precision.remembered(self.dtype)  # of what later windows remember
        self._reference_features: list[Tensor] | None = None
        self._coming: list[MemoryEntry] = []  # to be asked for
        self._seen: dict[str, list[Tensor]] = {}  # what the Reference Net has seen of some of them, by digest

    @cached_property
    def _tokens(self) -> Tensor:
        return self._face_tokens(self.reference.face_embedding)

    def _face_tokens(self, embedding: Tensor) -> Tensor:
        """[1, 512] -> [2, tokens, C]: unconditional, conditional."""
        return self.nets.image_proj(torch.cat([torch.zeros_like(embedding), embedding]).to(self.device, self.dtype))

    # Rows of the Reference Net. In the released code they are, with guidance, [reference, 16 past frames] twice, and
    # row r reads the unconditional face tokens if r is even.
    def _token_row(self, row: int, conditional: bool) -> int:
        """Which row of the face tokens such a row reads: 0 for the unconditional one."""
        if not self.settings.guided:
            return 1
        return row % 2 if self.settings.face_token_rows == "released" else int(conditional)

    def reference_features(self) -> list[Tensor]:
        """Features of the portrait for the conditional row, [1, K, N, C] per layer."""
        if self._reference_features is None:
            # The released code tiles the rows (0 and 17) of its two portraits over the frames, so that frames see them
            # in turn.
            alternate = self.settings.guided and self.settings.face_token_rows == "released"
            tokens = self._tokens[[row % 2 for row in (0, 1 + WINDOW)]] if alternate else self._tokens[1:]
            latents = self.reference.latents.to(self.device, self.dtype).expand(len(tokens), -1, -1, -1)
            self._reference_features = [feature[None] for feature in self._look(latents, tokens)]
        return self._reference_features

    def _look(self, latents: Tensor, tokens: Tensor) -> list[Tensor]:
        """The Reference Net's features of pictures."""
        with self._reading():
            return self.nets.reference_net(latents, tokens)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The Reference Net's turn, where the nets take turns."""
        if self.plan is None or self.plan.reference_net_stays:
            yield
            return
        waiting.leave(self.nets.diffusion_net)
        try:
            waiting.enter(self.nets.reference_net, self.device)
            yield
        finally:
            waiting.leave(self.nets.reference_net)
            waiting.enter(self.nets.diffusion_net, self.device)

    def look_ahead(self, entries: list[MemoryEntry]) -> None:
        """Says which windows `entry_sums` will be asked for next: where the nets take turns, the Reference Net looks at
        several in one, and what it sees of the later ones waits in host memory."""
        self._coming, self._seen = list(entries), {}

    def _features(self, entry: MemoryEntry) -> list[Tensor]:
        several = 1 if self.plan is None else self.plan.windows_a_turn
        if entry.digest not in self._seen and several > 1:
            first = next((i for i, coming in enumerate(self._coming) if coming.digest == entry.digest), 0)
            together = self._coming[first : first + several]
            if len(together) > 1:
                with self._reading():
                    for other in together:
                        features = self.nets.reference_net(*self._seen_of(other)[:2])
                        self._seen[other.digest] = [feature.cpu() for feature in features]
        seen = self._seen.pop(entry.digest, None)
        if seen is None:
            return self._look(*self._seen_of(entry)[:2])
        return [feature.to(self.device) for feature in seen]

    def entry_sums(
        self, entry: MemoryEntry, into: Iterator[tuple[Memory, float]] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What one remembered window adds to the memory, layer by layer, for every batch row; `into` as for
        `DiffusionNet.memory_sums`."""
        frames, _, height, width = entry.latents.shape
        features, rows = self._features(entry), self._seen_of(entry)[2]
        return self.nets.diffusion_net.memory_sums(features, height, width, frames, rows, into)

    def _seen_of(self, entry: MemoryEntry) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the Reference Net reads of a remembered window: latents and face tokens, and which of these rows each
        frame's is, where some are alike."""
        frames = len(entry.latents)
        still = bool((entry.latents == entry.latents[:1]).all())  # the portrait, held still before a video begins
        wanted = [
            (0 if still else frame, self._token_row(b * (1 + WINDOW) + 1 + frame, bool(b)))
            for b in range(2 if self.settings.guided else 1)
            for frame in range(frames)
        ]
        distinct = list(dict.fromkeys(wanted))  # a frame with the same tokens is looked at once
        which, token_rows = zip(*distinct)
        rows = None
        if len(distinct) < len(wanted):
            rows = torch.tensor([distinct.index(row) for row in wanted], device=self.device)
        latents = entry.latents[list(which)].to(self.device, self.dtype)
        return latents, self._face_tokens(entry.face_embedding)[list(token_rows)], rows

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
            memory=self.cache.sums(
                inputs.memory,
                context,
                self.entry_sums,
                FP8 if settings.speed.fp8_sums else None,
                None if self.plan is None else self.plan.sums_on_device,
                self.look_ahead,
            ),
            face_tokens=face,
            audio_tokens=tokens,
            emotion=emotion,
        )

    @cached_property
    def address(self) -> str:
        """What windows of this sampler share, for `WindowInputs.key`."""
        reference = tensors_digest(self.reference.latents, self.reference.face_embedding)
        dtype = f"{self.dtype} {precision.VERSION}" if self.dtype in precision.HALF else f"{self.dtype}"
        return f"{WINDOW_VERSION}|{self.nets.digest}|{dtype}|{self.device.type}|{reference}|{self.settings.address}"


def _null(emotion: Tensor) -> Tensor:
    """The null emotion in the form of `emotion`: labels, or class weights [..., 10]."""
    if not emotion.is_floating_point():
        return torch.full_like(emotion, NULL_EMOTION)
    null = torch.zeros_like(emotion)
    null[..., NULL_EMOTION] = 1
    return null


def few_frames(height: int, width: int) -> int:
    """Frames that go through the VAE at once where no plan says: one at 512 x 512, as released, more where they are
    small."""
    return max(1, min(WINDOW, 512 * 512 // (height * width)))


@torch.no_grad()
def decode(
    vae, latents: Tensor, device: torch.device | None = None, at_once: int | None = None, on_threads: bool = False
) -> Tensor:
    """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1], computed on `device` (None: where the VAE is),
    `at_once` frames at once (None: `few_frames`); with `on_threads`, on a CPU, half of these on each of two threads,
    the same but for rounding.

    Raises:
        SamplingError: the VAE gave NaN or infinite values; names the frames.
    """
    dtype = vae.decoder.conv_in.weight.dtype  # the two halves of a VAE may differ (`precision`)
    latents = latents.transpose(0, 1).to(device or vae.device, dtype) / vae.config.scaling_factor
    at_once = at_once or few_frames(8 * latents.shape[2], 8 * latents.shape[3])
    frames = _in_pieces(lambda piece: vae.decode(piece, return_dict=False)[0], latents, at_once, on_threads)
    _check_pictures(frames, "decoding", dtype)  # before the clamp, which would make white of what is infinite
    return (frames.float() / 2 + 0.5).clamp(0, 1)


def encode(
    vae, frames: Tensor, device: torch.device | None = None, at_once: int | None = None, on_threads: bool = False
) -> Tensor:
    """Frames [F, 3, H, W] in [-1, 1] -> scaled VAE means [F, 4, h, w], float32, computed as by `decode`.

    Raises:
        SamplingError: as `decode`.
    """
    dtype = vae.encoder.conv_in.weight.dtype
    frames = frames.to(device or vae.device, dtype)
    at_once = at_once or few_frames(*frames.shape[2:])
    means = _in_pieces(lambda piece: vae.encode(piece, return_dict=False)[0].mean, frames, at_once, on_threads)
    _check_pictures(means, "encoding", dtype)
    return means.float() * vae.config.scaling_factor


def _in_pieces(run: Callable[[Tensor], Tensor], frames: Tensor, at_once: int, on_threads: bool) -> Tensor:
    """A network on frames [F, ...], so many at once."""
    if frames.device.type != "cpu" or at_once < 2 or not on_threads:
        return torch.cat([run(piece) for piece in frames.split(at_once)])
    pieces = frames.split(at_once // 2)
    pairs = [pieces[first : first + 2] for first in range(0, len(pieces), 2)]
    return torch.cat([out for pair in pairs for out in side_by_side([partial(run, piece) for piece in pair])])


def _check_pictures(pictures: Tensor, doing: str, dtype: torch.dtype) -> None:
    """SamplingError if what the VAE made of frames [F, ...] is not finite."""
    if bool(torch.isfinite(pictures).all()):
        return
    bad = (~torch.isfinite(pictures)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    which = f"frame {bad[0]}" if len(bad) == 1 else f"{len(bad)} frames, {bad[0]} to {bad[-1]},"
    remedy = "a weight or a latent is out of range: use an undamaged checkpoint"
    if dtype == torch.float16:  # at most 65504, which the released VAE is known to exceed
        remedy = "the released VAE overflows in float16: use float32 or bfloat16"
    elif dtype == torch.bfloat16:
        remedy += ", or float32"
    raise SamplingError(
        f"the VAE gave NaN or infinite values in {dtype} when {doing} {which} of {len(pictures)} (counted from 0): "
        f"{remedy}"
    )


@contextmanager
def _naming_window(start: int) -> Iterator[None]:
    """A SamplingError raised inside says at which frame of the audio the window begins."""
    try:
        yield
    except SamplingError as error:
        raise SamplingError(f"in the window from frame {start} on {error}") from error


def window_noise(seed: int, first_frame: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a window, the same on every device: it depends on the seed and the window's place in the audio alone."""
    # Hashed, because torch's generator reads only 32 bits: seeds that differ above them give different noise, too.
    digest = hashlib.sha256(f"{seed} {first_frame}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(shape, generator=generator)


def count_stored(
    nets: Networks, job: Job, store: WindowStore | None, on_window: Callable[[], None] = lambda: None
) -> int:
    """How many windows of the job, from its first one on, are in the store; `on_window` is called before each."""
    if store is None:
        return 0
    job = job.checked(nets)
    sampler, memory = Sampler(nets, job.reference, job.settings, SumsCache()), job.entering(nets)
    shape = (4, WINDOW, *job.reference.latents.shape[2:])
    for index in range(job.windows):
        on_window()
        inputs = job.inputs(index, memory)
        found = _look_up(store, inputs.key(sampler.address), inputs, shape, sampler.past_dtype)
        if found is None:
            return index
        memory = memory.push(found[1], job.reference.face_embedding, nets.digest, job.reference.digest)
    return job.windows


def _look_up(
    store: WindowStore, key: str, inputs: WindowInputs, shape: tuple[int, ...], past_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Latents and past of a stored window; None where there is none, or not one that could be meant."""
    found = store.get(key) or {}
    latents, past = found.get("latents"), found.get("past")
    channels, _, height, width = shape
    if latents is None or past is None or (latents.dtype, past.dtype) != (torch.float32, past_dtype):
        return None
    if tuple(latents.shape) != (channels, inputs.frames, height, width) or past.shape != latents.transpose(0, 1).shape:
        return None
    return (latents, past) if bool(torch.isfinite(latents).all() and torch.isfinite(past).all()) else None


def _check_speed(settings: Settings, device: torch.device) -> None:
    """SamplingError where the device cannot keep what the speed wants it to."""
    if settings.speed.fp8_sums and not devices.of(device).fp8:
        raise SamplingError(
            f"speed {name_of(settings.speed)!r} keeps the memory's sums in 8-bit floats, which {device.type} has not: "
            "choose speed 'exact'"
        )


@torch.no_grad()
def sample_windows(
    nets: Networks,
    job: Job,
    *,
    cache: SumsCache,
    store: WindowStore | None = None,
    decode_stored: Callable[[Tensor], Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    plan: Plan | Callable[[], Plan | None] | None = None,
) -> Iterator[Window]:
    """Samples the job window by window, handing the memory on.

    Args:
        store: where finished windows are kept, and looked for before they are sampled.
        decode_stored: decodes windows that come from there; None: as those that are sampled.
        on_progress: called as (steps done, steps in all).
        should_stop: asked before every step; when true, ends after the last finished window.
        plan: what waits in host memory and what is done piece by piece; None: nothing is. A function is called before
            the first window that is not in the store.

    Raises:
        SamplingError, MemoryStateError: as `Job.checked`; the device has no 8-bit floats and `speed` wants them; the
            networks or the VAE gave NaN or infinite values.
    """
    job = job.checked(nets)
    settings, reference, memory = job.settings, job.reference, job.entering(nets)
    sampler, ready = Sampler(nets, reference, settings, cache), False
    options = nets.options
    on_threads = options is not None and options.rows_on_threads
    shape = (4, WINDOW, *reference.latents.shape[2:])
    for index in range(job.windows):
        inputs = job.inputs(index, memory)
        key = None if store is None else inputs.key(sampler.address)
        found = None if store is None else _look_up(store, key, inputs, shape, sampler.past_dtype)
        done, total = index * settings.steps, job.windows * settings.steps
        frames = None
        if found is not None:
            latents, past = found
            if on_progress is not None:
                on_progress(done + settings.steps, total)
        else:
            if not ready:
                _check_speed(settings, sampler.device)
                plan, ready = plan() if callable(plan) else plan, True
                sampler.plan = plan
                frames_at_once = None if plan is None else plan.vae_frames
            if plan is None or plan.reference_net_stays:
                for net in (nets.reference_net, nets.diffusion_net):
                    waiting.enter(net, nets.device)
                    waiting.forget(net)
            noise = window_noise(settings.seed, inputs.start, shape) if inputs.noise is None else inputs.noise
            latents = sample_window(
                nets,
                noise[None].to(sampler.device),
                sampler.conditions(inputs),
                settings,
                on_step=None if on_progress is None else lambda step: on_progress(done + step, total),
                should_stop=should_stop,
                row_by_row=plan is not None and plan.row_by_row,
            )
            if latents is None:
                return
            if not torch.isfinite(latents).all():
                raise SamplingError(
                    f"in the window from frame {inputs.start} on the networks gave NaN or infinite values in "
                    f"{sampler.dtype}; run them in float32 or bfloat16"
                )
            latents = latents[0].cpu()
            # Of a last window that is cut all frames are decoded where another number would be compiled anew.
            shown = latents if options is not None and options.compile else latents[:, : inputs.frames]
            latents = latents[:, : inputs.frames].contiguous()
            with _naming_window(inputs.start):
                frames = decode(nets.vae, shown, nets.device, frames_at_once, on_threads)[: inputs.frames]
                # What the viewer sees, not the latents themselves, as released.
                past = encode(nets.vae, frames * 2 - 1, nets.device, frames_at_once, on_threads).cpu()
                past = past.to(sampler.past_dtype)
        memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest)  # checks it: before keeping
        if store is not None and found is None:
            store.put(key, {"latents": latents, "past": past})
        how = decode_stored or partial(decode, nets.vae, device=nets.device, on_threads=on_threads)
        window = Window(inputs.start, latents, memory, found is not None, how)
        if frames is not None:
            window.__dict__["frames"] = frames.cpu()  # what the cached property would compute
        yield window
