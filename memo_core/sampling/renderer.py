"""Renderer: whatever makes windows of a job, one after the other, handing the memory on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..errors import SamplingError
from ..memory.state import MemoryState
from .job import Job
from .plan import Plan
from .store import WindowStore

Planned = Plan | Callable[[], Plan | None] | None


@dataclass(frozen=True, eq=False)
class Window:
    """A finished window.

    Attributes:
        start: number of its first frame in the audio track.
        latents: [4, F, h, w] float32 on the CPU, scaled.
        memory: the state after it.
        stored: it was found in the store, not made.
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
        with naming_window(self.start):
            return self.decode(self.latents).cpu()

    @property
    def decoded(self) -> Tensor | None:
        """The frames where they are there already."""
        return self.__dict__.get("frames")

    def with_frames(self, frames: Tensor) -> Window:
        """This window, whose frames are known."""
        self.__dict__["frames"] = frames
        return self


class Renderer(Protocol):
    """Makes windows. `MemoPipeline`, the store and the nodes know no more of it than this."""

    def count_stored(self, job: Job, store: WindowStore | None, on_window: Callable[[], None]) -> int:
        """How many windows of the job, from its first one on, need not be made; `on_window` is called before each."""
        ...

    def windows(
        self,
        job: Job,
        *,
        store: WindowStore | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        plan: Planned = None,
    ) -> Iterator[Window]:
        """The job's windows, in order.

        Args:
            job: what is made.
            store: where finished windows are kept, and looked for before they are made.
            on_progress: called as (steps done, steps in all).
            should_stop: asked before every step; when true, ends after the last finished window.
            plan: what waits in host memory and what is done piece by piece; None: nothing is. A function is called
                before the first window that is not in the store.

        Raises:
            SamplingError, MemoryStateError: as `Job.checked`, or the networks gave NaN or infinite values.
        """
        ...


@contextmanager
def naming_window(start: int) -> Iterator[None]:
    """A SamplingError raised inside says at which frame of the audio the window begins."""
    try:
        yield
    except SamplingError as error:
        raise SamplingError(f"in the window from frame {start} on {error}") from error
