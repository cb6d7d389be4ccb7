"""A window's steps as one recorded CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2  # steps before a graph is captured


# --- CUDA graphs ------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, list[Tensor]], Tensor]  # latents and time shifts -> velocity


class GraphedStep:
    """A step of one window that is recorded once and then replayed: the host launches one graph, not every kernel.

    The first calls run as they are, to warm up what chooses kernels and makes workspaces. The next is captured, and it
    and all later ones replay that, with latents and shifts copied into the graph's own. Everything else that the step
    reads, the window's conditions among it, must stay where it is: a new window takes a new one. Capturing waits for
    the device, and first gives back what the graphs of earlier windows held.

    Args:
        step: on a CUDA device. It must neither ask the device for a number nor read what waits in host memory.
        pool: from `torch.cuda.graph_pool_handle`; graphs of one pool, which are replayed one after the other and whose
            answers are copied at once, share what they compute in.
    """

    def __init__(self, step: Step, pool: Any = None):
        self._step, self._pool, self._warm_up = step, pool, WARM_UP
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, latents: Tensor, shifts: list[Tensor]) -> Tensor:
        """The velocity, a new tensor, of latents and shifts in the shapes of the first call."""
        if self._warm_up:
            self._warm_up -= 1
            return self._aside(latents, shifts)
        if self._graph is None:
            self._graph = self._capture(latents, shifts)
        for mine, given in zip((self._latents, *self._shifts), (latents, *shifts)):
            mine.copy_(given)
        self._graph.replay()
        return self._velocity.clone()  # the next replay writes over it

    def _aside(self, latents: Tensor, shifts: list[Tensor]) -> Tensor:
        """On another stream, as capturing asks of a warm-up."""
        current = torch.cuda.current_stream(latents.device)
        self._stream = self._stream or torch.cuda.Stream(latents.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            velocity = self._step(latents, shifts)
        current.wait_stream(self._stream)
        velocity.record_stream(current)
        return velocity

    def _capture(self, latents: Tensor, shifts: list[Tensor]) -> torch.cuda.CUDAGraph:
        self._latents, self._shifts = latents.clone(), [shift.clone() for shift in shifts]
        graph = torch.cuda.CUDAGraph()
        device, stream = latents.device, self._stream
        # The device's own stream, and the device's: torch captures on a stream of the *current* device otherwise, and a
        # graph of another card stays empty without a word.
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # what the warm-up used lies with its stream, where nothing else finds it
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                self._velocity = self._step(self._latents, self._shifts)
        return graph
