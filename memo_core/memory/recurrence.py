"""The one place of the recurrence over windows: M <- gamma^F M + (what a window of F frames adds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from ..nets.past import Memory, Recurrence
from ..release import DECAY


class _Entry(Protocol):
    @property
    def latents(self) -> Tensor: ...
    @property
    def weight(self) -> float: ...


Entry = TypeVar("Entry", bound=_Entry)


def faded(frames: float) -> float:
    """What a memory is multiplied by while so many frames pass: gamma^F."""
    return DECAY**frames


def joined(carries: Recurrence, memory: Memory | None, factor: float, key: Tensor, value: Tensor) -> Memory:
    """A layer's memory after one more window of past frames, in place of the one before.

    Args:
        carries: how the layer's goes on.
        memory: before; None for none.
        factor: by which that fades.
        key, value: [B, F, N, H, D] of the window.
    """
    if memory is None:
        return carries.of_window(key, value)
    return carries.update(memory, factor, key, value)


def steps(entries: Sequence[Entry]) -> list[tuple[float, Entry]]:
    """Each entry with the factor by which the running memory fades before it is added (Horner's scheme on their
    weights); the last one's weight is left out.
    """
    weights = [entry.weight for entry in entries]
    ratios = [0.0] + [before / after for before, after in zip(weights, weights[1:])]
    return list(zip((float(f"{ratio:.9g}") for ratio in ratios), entries, strict=True))


def needed(entries: Sequence[Entry], frames: int | None) -> Sequence[Entry]:
    """The last entries that together hold so many frames; None: all of them."""
    if frames is None:
        return entries
    found = 0
    for place in range(len(entries) - 1, -1, -1):
        found += len(entries[place].latents)
        if found >= frames:
            return entries[place:]
    return entries
