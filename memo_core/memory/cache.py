"""The resident sums of the last state used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from ..nets.memory_module import Memory
from .state import MemoryEntry, MemoryState
from .stream import Sums
from .sums import LayerSums


class SumsCache:
    """The resident sums of the last state used: going on from it costs one window, rebuilding them 6 to 12.

    At released sizes they are gigabytes, so there is one copy of them, which each call brings up to date in place. A
    cached result has the same bits as a rebuilt one, because both add the windows in the same order (Horner's scheme).
    """

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._layers: list[LayerSums] = []

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    @property
    def device_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers if not layer.on_host)

    def clear(self) -> None:
        self._key, self._layers = (), []

    @torch.inference_mode()  # always, so that what was made inside the mode can be updated wherever it is used next
    def sums(
        self,
        state: MemoryState,
        context: str,
        of_entry: Callable[[MemoryEntry, Iterator[tuple[Memory, float]] | None], Iterable[Memory]],
        dtype: torch.dtype | None = None,
        on_device: int | None = None,
        look: Callable[[list[MemoryEntry]], None] | None = None,
    ) -> Sums:
        """The memory of `state`; valid until the next call.

        Args:
            context: whatever else the sums depend on (guidance, dtype, device).
            of_entry: sums of one entry at weight 1, layer by layer. Its second argument, if it is not None, gives per
                layer a memory and a factor: then it multiplies that memory by the factor and adds to it, in place.
            dtype: what kv is kept in (`LayerSums`); None for the networks' own.
            on_device: how many memory layers, in execution order, keep theirs on the device, the others in host memory;
                None for all. It changes no bits.
            look: called with all entries that `of_entry` will be asked for, before it is.
        """

        def on_host(place: int) -> bool:
            return on_device is not None and place >= on_device

        steps = _horner(state.entries)
        keys = [f"{context}|{dtype}"] + [f"{factor:.9g}*+{entry.digest}" for factor, entry in steps]
        done = len(self._key)
        if done > 1 and self._key == tuple(keys[:done]):
            layers = self._layers
        else:
            done, layers = 1, []
        self.clear()  # while they change: an interrupt must not leave half of a sum behind
        for place, layer in enumerate(layers):
            layer.move(on_host(place))
        if look is not None:
            look([entry for _, entry in steps[done - 1 :]])
        for factor, entry in steps[done - 1 :]:
            if not layers:
                pairs = enumerate(of_entry(entry, None))
                layers = [LayerSums(*pair, dtype, on_host(place)) for place, pair in pairs]
                continue
            before = ((layer.bring(), factor) for layer in layers)
            for layer, pair in zip(layers, of_entry(entry, before), strict=True):
                layer.keep(*pair)
        last = state.entries[-1].weight
        if last == 1.0:
            self._key, self._layers = tuple(keys), layers
        else:  # in place: there is room for one copy; the next call builds it anew
            for layer in layers:
                layer.fade(last)
        return Sums(layers)


def _horner(entries: tuple[MemoryEntry, ...]) -> list[tuple[float, MemoryEntry]]:
    """Factors by which the running sum is multiplied before each entry is added; the last weight is left out."""
    weights = [entry.weight for entry in entries]
    ratios = [0.0] + [before / after for before, after in zip(weights, weights[1:])]
    return list(zip((float(f"{ratio:.9g}") for ratio in ratios), entries))
