"""Clocks: seconds by named part on the device's own clock, seconds of a call, of a very short one, too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

Part = Callable[[str], AbstractContextManager]


def unmeasured(name: str) -> AbstractContextManager:
    """A `Part` that measures nothing."""
    return nullcontext()


class Parts:
    """Seconds by part: `with parts("decode"): ...`; parts may repeat and lie inside each other, each counts for itself.

    On CUDA parts are bounded by events in the stream, so that measuring never makes the host wait.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._cuda = torch.device(device).type == "cuda"
        self._spans: dict[str, list[tuple]] = {}

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._spans.setdefault(name, []).append((start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part, in the order the parts first ended."""
        if self._cuda:
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self._spans.items()}
        return {name: sum(b - a for a, b in spans) for name, spans in self._spans.items()}

    def counts(self) -> dict[str, int]:
        return {name: len(spans) for name, spans in self._spans.items()}

    @contextmanager
    def watching(self, modules: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Measures every forward pass of `modules`, given by the name of the part they belong to."""
        handles, running = [], []

        def before(module: nn.Module, given: tuple) -> None:
            running.append(self._now())

        def after(name: str) -> Callable:
            def hook(module: nn.Module, given: tuple, result: object) -> None:
                self._spans.setdefault(name, []).append((running.pop(), self._now()))

            return hook

        try:
            for name, watched in modules.items():
                for module in watched:
                    handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
            yield
        finally:
            for handle in handles:
                handle.remove()


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def per_call(run: Callable[[], object], device: torch.device | str = "cpu", least: float = 0.2) -> float:
    """Median seconds of a short call, measured for about `least` seconds; on CUDA with cold caches."""
    if torch.device(device).type == "cuda":
        try:
            from triton.testing import do_bench
        except ImportError:
            pass
        else:
            return do_bench(run, warmup=1e3 * least / 4, rep=1e3 * least, return_mode="median") / 1e3
    run()
    calls = max(1, min(1000, int(least / 5 / max(seconds_of(run, device), 1e-7))))

    def several() -> None:
        for _ in range(calls):
            run()

    return statistics.median(seconds_of(several, device) for _ in range(5)) / calls
