"""Sampling a clip: windows denoised one after the other, the memory handed on (MEMO sections 3 and 4.1).

past <- the portrait, held still                        before a video's first window
for every window of F frames:
    memory <- 0.9^F memory + sums(past)                 memory/recurrence.py; kernels/naive.py, equations 2 and 3
    x <- noise                                          noise.py
    for every step, from sigma 1 to 0:                  schedule.py, solvers.py
        v <- unconditional + scale (conditional - unconditional), both by the Diffusion Net under
             portrait, sound, emotion and memory        guidance.py, conditions.py; kernels/naive.py, equation 4
        x <- x + (next sigma - sigma) v
    frames <- decode(x); past <- encode(frames)         vae.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import devices
from ..checkpoint.networks import Networks
from ..errors import SamplingError
from ..memory.cache import MemoryCache
from ..running import offload
from .conditions import Conditioner
from .job import Job, WindowInputs
from .noise import window_noise
from .renderer import Planned, Window, naming_window
from .settings import Settings, name_of
from .store import WindowStore
from .vae import decode_latents, encode_frames
from .window import sample_window


class DiffusionRenderer:
    """MEMO's own renderer (`renderer.Renderer`).

    Args:
        nets: the networks.
        cache: the resident memory of the last state used.
        decode_stored: decodes windows that come from a store; None: as those that are sampled.
    """

    def __init__(self, nets: Networks, cache: MemoryCache, decode_stored: Callable[[Tensor], Tensor] | None = None):
        self.nets, self.cache = nets, cache
        options = nets.options
        self._on_threads = options is not None and options.rows_on_threads
        self._whole_windows = options is not None and options.compile
        decode = partial(decode_latents, nets.vae, device=nets.device, on_threads=self._on_threads)
        self._decode_stored = decode_stored or decode

    def count_stored(self, job: Job, store: WindowStore | None, on_window: Callable[[], None] = lambda: None) -> int:
        """See `Renderer`."""
        if store is None:
            return 0
        job = job.checked(self.nets)
        conditioner, memory = (
            Conditioner(self.nets, job.reference, job.settings, MemoryCache()),
            job.entering(self.nets),
        )
        for index in range(job.windows):
            on_window()
            inputs = job.inputs(index, memory)
            found = self._look_up(store, inputs.key(conditioner.address), inputs, job, conditioner.past_dtype)
            if found is None:
                return index
            memory = memory.push(found[1], job.reference.face_embedding, self.nets.digest, job.reference.digest)
        return job.windows

    @torch.no_grad()
    def windows(
        self,
        job: Job,
        *,
        store: WindowStore | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        plan: Planned = None,
    ) -> Iterator[Window]:
        """See `Renderer`; SamplingError also where the device has no 8-bit floats and the job's speed wants them."""
        nets, job = self.nets, job.checked(self.nets)
        reference, memory, steps = job.reference, job.entering(nets), job.settings.steps
        conditioner, ready = Conditioner(nets, reference, job.settings, self.cache), False
        for index in range(job.windows):
            inputs = job.inputs(index, memory)
            key = "" if store is None else inputs.key(conditioner.address)
            found = None if store is None else self._look_up(store, key, inputs, job, conditioner.past_dtype)
            report = None
            if on_progress is not None:
                report = partial(_report, on_progress, index * steps, job.windows * steps)
            frames = None
            if found is not None:
                latents, past = found
                if report is not None:
                    report(steps)
            else:
                if not ready:
                    _check_speed(job.settings, conditioner.device)
                    conditioner.plan, ready = plan() if callable(plan) else plan, True
                sampled = self._sample(conditioner, inputs, report, should_stop)
                if sampled is None:
                    return
                latents, frames, past = sampled
            # Checks what was made: before it is kept.
            memory = memory.push(past, reference.face_embedding, nets.digest, reference.digest)
            if store is not None and found is None:
                store.put(key, {"latents": latents, "past": past})
            window = Window(inputs.start, latents, memory, found is not None, self._decode_stored)
            yield window if frames is None else window.with_frames(frames)

    def _sample(
        self,
        conditioner: Conditioner,
        inputs: WindowInputs,
        on_step: Callable[[int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Latents, frames and past of a window; None if stopped."""
        nets, plan, settings = self.nets, conditioner.plan, conditioner.settings
        if plan is None or plan.reference_net_stays:
            for net in (nets.reference_net, nets.diffusion_net):
                offload.to_device(net, nets.device)
                offload.free_host_copy(net)
        shape = (4, nets.window, *conditioner.reference.latents.shape[2:])
        noise = window_noise(settings.seed, inputs.start, shape) if inputs.noise is None else inputs.noise
        made = sample_window(
            nets,
            noise[None].to(conditioner.device),
            conditioner.conditions(inputs),
            conditioner.memory(inputs.memory),
            settings,
            on_step=on_step,
            should_stop=should_stop,
            row_by_row=plan is not None and plan.row_by_row,
        )
        if made is None:
            return None
        if not torch.isfinite(made).all():
            raise SamplingError(
                f"in the window from frame {inputs.start} on the networks gave NaN or infinite values in "
                f"{conditioner.dtype}; run them in float32 or bfloat16"
            )
        made = made[0].cpu()
        # Of a last window that is cut all frames are decoded where another number would be compiled anew.
        shown = made if self._whole_windows else made[:, : inputs.frames]
        latents = made[:, : inputs.frames].contiguous()
        at_once = None if plan is None else plan.vae_frames
        with naming_window(inputs.start):
            frames = decode_latents(nets.vae, shown, nets.device, at_once, self._on_threads)[: inputs.frames]
            # What the viewer sees, not the latents themselves, as released.
            past = encode_frames(nets.vae, frames * 2 - 1, nets.device, at_once, self._on_threads).cpu()
        return latents, frames.cpu(), past.to(conditioner.past_dtype)

    def _look_up(
        self, store: WindowStore, key: str, inputs: WindowInputs, job: Job, past_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Latents and past of a stored window; None where there is none, or not one that could be meant."""
        found = store.get(key) or {}
        latents, past = found.get("latents"), found.get("past")
        if latents is None or past is None or (latents.dtype, past.dtype) != (torch.float32, past_dtype):
            return None
        wanted = (4, inputs.frames, *job.reference.latents.shape[2:])
        if tuple(latents.shape) != wanted or past.shape != latents.transpose(0, 1).shape:
            return None
        return (latents, past) if bool(torch.isfinite(latents).all() and torch.isfinite(past).all()) else None


def _report(on_progress: Callable[[int, int], None], done: int, total: int, step: int) -> None:
    on_progress(done + step, total)


def _check_speed(settings: Settings, device: torch.device) -> None:
    """SamplingError where the device cannot keep what the speed wants it to."""
    if settings.speed.fp8_sums and not devices.of(device).fp8:
        raise SamplingError(
            f"speed {name_of(settings.speed)!r} keeps the memory's sums in 8-bit floats, which {device.type} has not: "
            "choose speed 'exact'"
        )
