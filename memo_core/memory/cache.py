"""The memory of the last state used, resident."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..nets.temporal import TemporalAttention
from . import recurrence
from .state import MemoryEntry, MemoryState
from .stream import WindowMemory
from .sums import LayerMemory

# Each temporal layer with its keys and values of one window of past frames, as `DiffusionNet.past` gives them.
PastOfEntry = Callable[[MemoryEntry], Iterable[tuple[TemporalAttention, Tensor, Tensor]]]


class MemoryCache:
    """What the layers remember of the last state used: going on from it costs one window, rebuilding it 6 to 12 where
    layers remember all the past, and as many as hold their frames where they do not.

    At released sizes the sums are gigabytes, so there is one copy of them, which each call brings up to date in place.
    A cached result has the same bits as a rebuilt one, because both add the windows in the same order (Horner's
    scheme).
    """

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._layers: list[LayerMemory] = []

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def device_bytes(self) -> int:
        """Those of them on the device."""
        return sum(layer.nbytes for layer in self._layers if not layer.on_host)

    def clear(self) -> None:
        """Lets go of everything."""
        self._key, self._layers = (), []

    @torch.inference_mode()  # always, so that what was made inside the mode can be updated wherever it is used next
    def memory_of(
        self,
        state: MemoryState,
        context: str,
        past_of: PastOfEntry,
        *,
        frames: int | None = None,
        dtype: torch.dtype | None = None,
        on_device: int | None = None,
        announce: Callable[[list[MemoryEntry]], None] | None = None,
    ) -> WindowMemory:
        """The memory of `state`; valid until the next call.

        Args:
            context: whatever else it depends on (guidance, dtype, device).
            past_of: keys and values of one entry's frames, layer by layer.
            frames: how many past frames the layers look at, at most (`DiffusionNet.past_frames`).
            dtype: what kv is kept in (`LayerMemory`); None for the networks' own.
            on_device: how many temporal layers, in execution order, keep theirs on the device, the others in host
                memory; None for all. It changes no bits.
            announce: called with all entries that `past_of` will be asked for, before it is.
        """

        def on_host(place: int) -> bool:
            return on_device is not None and place >= on_device

        entries = recurrence.needed(state.entries, frames)
        steps = recurrence.steps(entries)
        keys = [f"{context}|{dtype}"] + [f"{factor:.9g}*+{entry.digest}" for factor, entry in steps]
        done = len(self._key)
        if done > 1 and self._key == tuple(keys[:done]):
            layers = self._layers
        else:
            done, layers = 1, []
        self.clear()  # while they change: an interrupt must not leave half of a sum behind
        for place, kept in enumerate(layers):
            kept.move(on_host(place))
        if announce is not None:
            announce([entry for _, entry in steps[done - 1 :]])
        for factor, entry in steps[done - 1 :]:
            if not layers:
                layers = [
                    LayerMemory(
                        *recurrence.joined(layer.carries, None, 0.0, key, value), dtype, on_host(place), layer.carries
                    )
                    for place, (layer, key, value) in enumerate(past_of(entry))
                ]
                continue
            for kept, (layer, key, value) in zip(layers, past_of(entry), strict=True):
                kept.store(*recurrence.joined(layer.carries, kept.fetch(), factor, key, value))
        last = entries[-1].weight
        if last == 1.0:
            self._key, self._layers = tuple(keys), layers
        else:  # in place: there is room for one copy; the next call builds it anew
            for kept in layers:
                kept.fade(last)
        return WindowMemory(layers)
