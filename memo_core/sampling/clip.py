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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import devices
from ..checkpoint.networks import Networks
from ..errors import SamplingError
from ..memory.cache import MemoryCache
from ..memory.state import MemoryState
from ..running import offload
from .conditions import Conditioner
from .job import Job, WindowInputs
from .noise import window_noise
from .settings import Settings, name_of
from .store import WindowStore
from .vae import decode_latents, encode_frames
from .window import sample_window

if TYPE_CHECKING:
    from .plan import Plan


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


@contextmanager
def _naming_window(start: int) -> Iterator[None]:
    """A SamplingError raised inside says at which frame of the audio the window begins."""
    try:
        yield
    except SamplingError as error:
        raise SamplingError(f"in the window from frame {start} on {error}") from error


def count_stored(
    nets: Networks, job: Job, store: WindowStore | None, on_window: Callable[[], None] = lambda: None
) -> int:
    """How many windows of the job, from its first one on, are in the store; `on_window` is called before each."""
    if store is None:
        return 0
    job = job.checked(nets)
    conditioner, memory = Conditioner(nets, job.reference, job.settings, MemoryCache()), job.entering(nets)
    shape = (4, nets.window, *job.reference.latents.shape[2:])
    for index in range(job.windows):
        on_window()
        inputs = job.inputs(index, memory)
        found = _look_up(store, inputs.key(conditioner.address), inputs, shape, conditioner.past_dtype)
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
    cache: MemoryCache,
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
    conditioner, ready = Conditioner(nets, reference, settings, cache), False
    options = nets.options
    on_threads = options is not None and options.rows_on_threads
    shape = (4, nets.window, *reference.latents.shape[2:])
    for index in range(job.windows):
        inputs = job.inputs(index, memory)
        key = None if store is None else inputs.key(conditioner.address)
        found = None if store is None else _look_up(store, key, inputs, shape, conditioner.past_dtype)
        done, total = index * settings.steps, job.windows * settings.steps
        frames = None
        if found is not None:
            latents, past = found
            if on_progress is not None:
                on_progress(done + settings.steps, total)
        else:
            if not ready:
                _check_speed(settings, conditioner.device)
                plan, ready = plan() if callable(plan) else plan, True
                conditioner.plan = plan
                frames_at_once = None if plan is None else plan.vae_frames
            if plan is None or plan.reference_net_stays:
                for net in (nets.reference_net, nets.diffusion_net):
                    offload.enter(net, nets.device)
                    offload.forget(net)
            noise = window_noise(settings.seed, inputs.start, shape) if inputs.noise is None else inputs.noise
            latents = sample_window(
                nets,
                noise[None].to(conditioner.device),
                conditioner.conditions(inputs),
                conditioner.memory(inputs.memory),
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
                    f"{conditioner.dtype}; run them in float32 or bfloat16"
                )
            latents = latents[0].cpu()
            # Of a last window that is cut all frames are decoded where another number would be compiled anew.
            shown = latents if options is not None and options.compile else latents[:, : inputs.frames]
            latents = latents[:, : inputs.frames].contiguous()
            with _naming_window(inputs.start):
                frames = decode_latents(nets.vae, shown, nets.device, frames_at_once, on_threads)[: inputs.frames]
                # What the viewer sees, not the latents themselves, as released.
                past = encode_frames(nets.vae, frames * 2 - 1, nets.device, frames_at_once, on_threads).cpu()
                past = past.to(conditioner.past_dtype)
        memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest)  # checks it: before keeping
        if store is not None and found is None:
            store.put(key, {"latents": latents, "past": past})
        how = decode_stored or partial(decode_latents, nets.vae, device=nets.device, on_threads=on_threads)
        window = Window(inputs.start, latents, memory, found is not None, how)
        if frames is not None:
            window.__dict__["frames"] = frames.cpu()  # what the cached property would compute
        yield window
