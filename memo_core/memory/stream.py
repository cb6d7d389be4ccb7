"""The memory that a window sees, brought from the host layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..nets.memory_module import LazyMemory
from .sums import LayerSums


class Sums(Sequence):
    """The memory that a window sees: per memory layer, in execution order, the pair (kv, z), or, where that takes
    bringing or restoring, a function of no arguments that does it when the layer is reached.

    On a CUDA device the next two layers come from the host while one is used, and the first of the next pass while this
    one ends, into buffers that take turns and that all rows share.
    """

    def __init__(self, layers: list[LayerSums], rows: slice = slice(None), room: _Room | None = None):
        self._layers, self._rows = layers, rows
        self._on_host = [layer for layer in layers if layer.on_host]
        if room is None and self._on_host and self._on_host[0].device.type == "cuda":
            room = _Room(max(layer.room(slice(None)) for layer in self._on_host), self._on_host[0].device)
        self._room = room

    def rows(self, rows: slice) -> Sums:
        """The same memory for these batch rows alone."""
        return Sums(self._layers, rows, self._room)

    def half(self, number: int) -> Sums:
        """For the batch's first half (0) or its second (1)."""
        rows = len(self._layers[0].z) // 2
        return self.rows(slice(number * rows, (number + 1) * rows))

    @property
    def on_host(self) -> bool:
        """Whether any layer's lie in host memory."""
        return bool(self._on_host)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> LazyMemory:
        layer = self._layers[index]
        if layer.whole:
            return layer.bring(self._rows)
        if layer.on_host and self._room is not None:
            return partial(self._take, self._on_host.index(layer))
        return partial(layer.bring, self._rows)

    def _take(self, place: int) -> tuple[Tensor, Tensor]:
        room, rows, layer = self._room, (self._rows.start, self._rows.stop), self._on_host[place]
        if place == 0:
            room.passed(rows)
        parts = room.take((rows, place), partial(self._bring, rows, place))
        for _ in range(AHEAD):
            place += 1
            if place == len(self._on_host):
                rows, place = room.next_rows(rows), 0
            room.start((rows, place), partial(self._bring, rows, place))
        return layer.restore(*parts, self._rows)

    def _bring(self, rows: _Rows, place: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return self._on_host[place].bring(slice(*rows), buffer)


AHEAD = 2  # layers that come while one is used: a module's two layers follow each other fast
_Rows = tuple[Any, Any]  # first and end of a slice, which has no hash before Python 3.12
_Key = tuple[_Rows, int]  # rows, and the layer's place among those on the host
_Parts = tuple[Tensor, Tensor]


class _Room:
    """Where layers come to from the host: the buffers, the stream that fills them, and what is on its way.

    A buffer is filled again AHEAD + 1 copies later at the earliest, behind all work that was on the computing stream by
    then: its reader is among that, because a layer is read before the next one is taken.

    Args:
        size: bytes of a buffer.
    """

    def __init__(self, size: int, device: torch.device):
        self.stream, self._device = torch.cuda.Stream(device), device
        with torch.inference_mode(False):  # so that they can be filled in and outside of it
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(AHEAD + 1)]
        for buffer in self.buffers:
            buffer.record_stream(self.stream)  # an interrupted pass lets go of them while a copy is under way
        self._coming: dict[_Key, tuple[int, _Parts, Any]] = {}  # the copy's number, what it makes, when it is done
        self._copies, self._taken = 0, -1  # how many were begun; the number of the last one that was taken
        self._followed: dict[_Rows, _Rows] = {}  # which rows came after which
        self._before: _Rows | None = None

    def passed(self, rows: _Rows) -> None:
        """A pass over these rows begins."""
        if self._before is not None:
            self._followed[self._before] = rows
        self._before = rows

    def next_rows(self, rows: _Rows) -> _Rows:
        """What the pass after one over these rows is likely to be: as last time."""
        return self._followed.get(rows, rows)

    def start(self, key: _Key, bring: Callable[[Tensor], _Parts]) -> None:
        """Begins to bring a layer, unless it is on its way, or its buffer is still to be read."""
        if key not in self._coming and self._copies <= self._taken + AHEAD:
            self._copy(key, bring)

    def _copy(self, key: _Key, bring: Callable[[Tensor], _Parts]) -> None:
        buffer = self.buffers[self._copies % len(self.buffers)]
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            parts, ready = bring(buffer), torch.cuda.Event()
            ready.record(self.stream)
        self._coming[key] = self._copies, parts, ready
        self._copies += 1

    def take(self, key: _Key, bring: Callable[[Tensor], _Parts]) -> _Parts:
        """A layer, for what is put on the computing stream from now on until the next one is taken."""
        if key not in self._coming:  # another pass than was guessed, or one after an interrupted one
            self._copy(key, bring)
        self._taken, parts, ready = self._coming.pop(key)
        self._coming = {k: coming for k, coming in self._coming.items() if coming[0] > self._taken}
        torch.cuda.current_stream(self._device).wait_event(ready)
        return parts


def half_of(memory: Sequence[Any], number: int) -> Sequence[Any]:
    """Sums for the first half of the batch (0) or the second (1): of `Sums`, or of a list of such items."""
    if isinstance(memory, Sums):
        return memory.half(number)
    return [partial(_half, item, number) if callable(item) else _half(item, number) for item in memory]


def _half(item: Any, number: int) -> tuple[Tensor, Tensor]:
    kv, z = item() if callable(item) else item
    return kv.chunk(2)[number], z.chunk(2)[number]
