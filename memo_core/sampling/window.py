"""Denoises one window."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.networks import Networks
from ..memory.stream import half_of
from ..nets.diffusion_net import DiffusionNet, WindowConditions
from ..nets.memory_module import LazyMemory
from ..running import precision
from ..running.graphs import GraphedStep
from ..running.parallel import side_by_side
from . import schedule
from .conditions import Conditions
from .settings import Settings
from .solvers import SOLVERS


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
    sigmas = schedule.sigmas(settings.steps)
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
        return SOLVERS[speed.solver](velocity, noise.float(), sigmas)
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
