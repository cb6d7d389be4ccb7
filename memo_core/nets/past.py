"""What a temporal layer carries from the past, and how it goes on from window to window.

Whatever it is, it is a pair of tensors, batch axis first: so rows of it, its bytes and its place in memory are
everyone's business, and only these functions are the layer's own. Control flows one way: the Diffusion Net hands out
keys and values of past frames (`DiffusionNet.past`), whoever keeps the memory applies the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels

Memory = tuple[Tensor, Tensor]
# The memory that one temporal module sees: called when the module is reached, gives its layers' pairs in their order.
MemoryOfModule = Callable[[], Iterable[Memory]]


class Recurrence(Protocol):
    """How a layer's memory is made of past windows.

    Attributes:
        frames: how many past frames it holds, whatever their windows; None: all, each fading with age.
    """

    frames: int | None

    def of_window(self, key: Tensor, value: Tensor) -> Memory:
        """What one window of past frames adds: key, value [B, F, N, H, D], oldest first."""
        ...

    def add(self, memory: Memory, factor: float, window: Memory) -> Memory:
        """The memory, faded by `factor`, with one more window: M <- factor M + window. For training: new tensors."""
        ...

    def update(self, memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
        """The same of a window's keys and values, in place of the old memory where that can be."""
        ...

    def fade(self, memory: Memory, factor: float) -> Memory:
        """The memory as if frames had passed and nothing been added; in place."""
        ...


class LinearSums:
    """Sums of linear attention (MEMO section 4.1): kv [B, N, H, D, D] and z [B, N, H, D], of all the past."""

    frames: int | None = None

    def of_window(self, key: Tensor, value: Tensor) -> Memory:
        """Sums over the window (`kernels.naive.memory_sums`)."""
        return kernels.memory_sums(key, value)

    def add(self, memory: Memory, factor: float, window: Memory) -> Memory:
        """M <- factor M + window."""
        kv, z = memory
        return kv * factor + window[0], z * factor + window[1]

    def update(self, memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
        """The same in one pass, in place."""
        return kernels.update_memory(memory, factor, key, value)

    def fade(self, memory: Memory, factor: float) -> Memory:
        """Both parts, in place."""
        kv, z = memory
        return kv.mul_(factor), z.mul_(factor)


class LastFrames:
    """Keys and values of the last `frames` frames, side by side, [B, N, H, f, 2 D], and which of them there are,
    [B, N, H, f] of 1 and 0; f is less while the past is shorter.

    They do not fade: weights of a state say only which windows there are. Of blended states it holds the last frames of
    the heavier one, and after silence the frames before it, as long as the state has an entry.
    """

    def __init__(self, frames: int):
        self.frames: int | None = frames

    def of_window(self, key: Tensor, value: Tensor) -> Memory:
        """Of the window's last frames."""
        pairs = torch.cat([key, value], dim=-1)[:, -self._most :].permute(0, 2, 3, 1, 4)
        return pairs.contiguous(), pairs.new_ones(pairs.shape[:-1])

    def add(self, memory: Memory, factor: float, window: Memory) -> Memory:
        """The last of both."""
        pairs = torch.cat([memory[0], window[0]], dim=-2)[..., -self._most :, :]
        there = torch.cat([memory[1], window[1]], dim=-1)[..., -self._most :]
        return pairs.contiguous(), there.contiguous()

    def update(self, memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
        """The last of both."""
        return self.add(memory, factor, self.of_window(key, value))

    def fade(self, memory: Memory, factor: float) -> Memory:
        """As it was."""
        return memory

    @property
    def _most(self) -> int:
        assert self.frames is not None
        return self.frames


def rows_of(memory: Memory, rows: slice) -> Memory:
    """The memory of these batch rows alone; views."""
    return memory[0][rows], memory[1][rows]


def in_turn(layers: Iterable[Memory]) -> Iterator[MemoryOfModule]:
    """Of memory layer by layer what a net asks for module by module, once and in order: each takes as many as it has
    layers. For a pass that computes nothing again.
    """
    remaining = iter(layers)

    def taken() -> Iterable[Memory]:
        return remaining

    while True:
        yield taken
