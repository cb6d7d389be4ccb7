"""Denoises one window: from noise along the rectified flow, under conditions and a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.networks import Networks
from ..memory.stream import WindowMemory, guidance_row_of
from ..nets.conditions import Conditions, Prepared
from ..nets.diffusion_net import DiffusionNet
from ..nets.past import Memory, in_turn
from ..running import precision
from ..running.graphs import GraphedStep, Step
from ..running.parallel import run_in_parallel
from . import schedule, solvers
from .guidance import guidance_of
from .settings import Settings


class _Stopped(Exception):
    """`should_stop` said so."""


def sample_window(
    nets: Networks,
    noise: Tensor,
    conditions: Conditions,
    memory: Sequence[Memory] | None,
    settings: Settings,
    on_step: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    row_by_row: bool = False,
) -> Tensor | None:
    """Denoises one window along the rectified flow.

    Args:
        nets: the networks; the Diffusion Net is used.
        noise: [P, 4, F, h, w]: P videos at once, whose conditions have as many rows (with guidance first P
            unconditional ones, then P conditional ones).
        conditions: of the window, for every row.
        memory: of every temporal layer, for every row; None without a past.
        settings: steps, guidance and speed.
        on_step: called with the number of steps done.
        should_stop: asked before every step.
        row_by_row: with guidance, runs the unconditional and the conditional rows one after the other: half the working
            memory, and the same numbers up to rounding.

    Returns:
        Scaled latents [P, 4, F, h, w], float32; None if stopped.
    """
    net, guidance = nets.diffusion_net, guidance_of(settings)
    dtype = net.conv_in.weight.dtype
    sigmas = schedule.of(net.config, settings.steps)
    # All that is the same at every step, or known before the first one.
    shifts = net.time_shifts(torch.tensor(sigmas[:-1], device=noise.device) * 1000, dtype)
    whole_pass = _Pass(net, net.prepare(conditions), memory)
    whole: Step = whole_pass
    rows: list[Step] = [whole_pass.guidance_row(number) for number in (0, 1)] if guidance.rows == 2 else [whole_pass]
    options = getattr(nets, "options", None)  # networks in training have none
    on_host = isinstance(memory, WindowMemory) and memory.on_host
    if options and options.cuda_graphs and not on_host:
        with torch.cuda.device(noise.device):
            pool = torch.cuda.graph_pool_handle()
        whole, rows = GraphedStep(whole, pool), [GraphedStep(row, pool) for row in rows]
    in_parallel = bool(options and options.rows_on_threads) and not row_by_row

    def velocity(latents: Tensor, step: int) -> Tensor:
        if should_stop is not None and should_stop():
            raise _Stopped
        latents, shift = latents.to(precision.carried(dtype)), [shift[step : step + 1] for shift in shifts]
        if not guidance.both(sigmas[step]):
            answer = rows[-1](latents, shift)
        elif in_parallel or row_by_row:
            each = [partial(row, latents, shift) for row in rows]
            answer = guidance.combined(run_in_parallel(each) if in_parallel else [row() for row in each])
        else:
            answer = guidance.combined(whole(latents, shift).chunk(2))
        if on_step is not None:
            on_step(step + 1)
        return answer

    try:
        return solvers.SOLVERS[settings.speed.solver](velocity, noise.float(), sigmas)
    except _Stopped:
        return None


class _Pass:
    """A pass of the Diffusion Net over all rows of the batch, or over half of them, under a window's conditions."""

    def __init__(self, net: DiffusionNet, prepared: Prepared, memory: Sequence[Memory] | None):
        self.net, self.prepared, self.memory = net, prepared, memory

    def guidance_row(self, number: int) -> _Pass:
        memory = None if self.memory is None else guidance_row_of(self.memory, number)
        return _Pass(self.net, self.prepared.guidance_row(number), memory)

    def __call__(self, latents: Tensor, shift: list[Tensor]) -> Tensor:
        memory = None if self.memory is None else in_turn(self.memory)
        return self.net(latents, shift, self.prepared, memory).float()
