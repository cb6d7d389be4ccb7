"""The memory that a window sees, fetched from the host layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from ..nets.past import Memory
from .sums import LayerMemory


class WindowMemory(Sequence[Memory]):
    """The memory that a window sees: per temporal layer, in execution order, a pair on the device, in full, fetched or
    restored when it is asked for.

    On a CUDA device the next two layers come from the host while one is used, and the first of the next pass while this
    one ends, into buffers that take turns and that all rows share.
    """

    def __init__(self, layers: list[LayerMemory], rows: slice = slice(None), buffers: _Buffers | None = None):
        self._layers, self._rows = layers, rows
        self._on_host = [layer for layer in layers if layer.on_host]
        if buffers is None and self._on_host and self._on_host[0].device.type == "cuda":
            size = max(layer.buffer_bytes(slice(None)) for layer in self._on_host)
            buffers = _Buffers(size, self._on_host[0].device)
        self._buffers = buffers

    def rows(self, rows: slice) -> WindowMemory:
        """The same memory for these batch rows alone."""
        return WindowMemory(self._layers, rows, self._buffers)

    def guidance_row(self, number: int) -> WindowMemory:
        """For the batch's first half (0) or its second (1)."""
        rows = len(self._layers[0].z) // 2
        return self.rows(slice(number * rows, (number + 1) * rows))

    @property
    def on_host(self) -> bool:
        """Whether any layer's lie in host memory."""
        return bool(self._on_host)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Memory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Memory]: ...
    def __getitem__(self, index: int | slice) -> Memory | Sequence[Memory]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        layer = self._layers[index]
        if layer.on_host and self._buffers is not None:
            return self._take(self._on_host.index(layer), self._buffers)
        return layer.fetch(self._rows)

    def _take(self, place: int, buffers: _Buffers) -> Memory:
        rows, layer = (self._rows.start, self._rows.stop), self._on_host[place]
        if place == 0:
            buffers.passed(rows)
        parts = buffers.take((rows, place), partial(self._fetch, rows, place))
        for _ in range(AHEAD):
            place += 1
            if place == len(self._on_host):
                rows, place = buffers.next_rows(rows), 0
            buffers.start((rows, place), partial(self._fetch, rows, place))
        return layer.restore(*parts, self._rows)

    def _fetch(self, rows: _Rows, place: int, buffer: Tensor) -> Memory:
        return self._on_host[place].fetch(slice(*rows), buffer)


AHEAD = 2  # layers that come while one is used: a module's two layers follow each other fast
_Rows = tuple[Any, Any]  # first and end of a slice, which has no hash before Python 3.12
_Key = tuple[_Rows, int]  # rows, and the layer's place among those on the host


class _Buffers:
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
        self._coming: dict[_Key, tuple[int, Memory, Any]] = {}  # the copy's number, what it makes, when it is done
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

    def start(self, key: _Key, fetch: Callable[[Tensor], Memory]) -> None:
        """Begins to fetch a layer, unless it is on its way, or its buffer is still to be read."""
        if key not in self._coming and self._copies <= self._taken + AHEAD:
            self._copy(key, fetch)

    def _copy(self, key: _Key, fetch: Callable[[Tensor], Memory]) -> None:
        buffer = self.buffers[self._copies % len(self.buffers)]
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            parts, ready = fetch(buffer), torch.cuda.Event()
            ready.record(self.stream)
        self._coming[key] = self._copies, parts, ready
        self._copies += 1

    def take(self, key: _Key, fetch: Callable[[Tensor], Memory]) -> Memory:
        """A layer, for what is put on the computing stream from now on until the next one is taken."""
        if key not in self._coming:  # another pass than was guessed, or one after an interrupted one
            self._copy(key, fetch)
        self._taken, parts, ready = self._coming.pop(key)
        self._coming = {k: coming for k, coming in self._coming.items() if coming[0] > self._taken}
        torch.cuda.current_stream(self._device).wait_event(ready)
        return parts


def guidance_row_of(memory: Sequence[Memory], number: int) -> Sequence[Memory]:
    """The memory of the batch's first half (0) or its second (1)."""
    if isinstance(memory, WindowMemory):
        return memory.guidance_row(number)
    return [(kv.chunk(2)[number], z.chunk(2)[number]) for kv, z in memory]
