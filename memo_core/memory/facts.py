"""What a memory state is, in plain facts and without torch: what is allowed, its digest, its description."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..checks import number, shown, whole
from ..errors import MemoryStateError
from ..release import LONGEST_WINDOW
from ..tensorfile import is_finite, tensors_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

FORGOTTEN = 1e-9  # weight below which an entry is dropped
_MAX_WEIGHT = 1e3  # a window just seen weighs 1


def check_shapes(latents: Sequence[int], face_embedding: Sequence[int]) -> None:
    """MemoryStateError unless these are the shapes of an entry's tensors."""
    shape = list(latents)
    if len(shape) != 4 or not 0 < shape[0] <= LONGEST_WINDOW or shape[1] != 4 or 0 in shape:
        raise MemoryStateError(
            f"an entry's latents are [F, 4, h, w] with F from 1 to {LONGEST_WINDOW}, received {shape}"
        )
    if tuple(face_embedding) != (1, 512):
        raise MemoryStateError(f"an entry's face embedding is [1, 512], received {list(face_embedding)}")


def check_finite(*tensors: Tensor | NDArray[Any]) -> None:
    """MemoryStateError unless all values of an entry are finite."""
    if not all(is_finite(values) for values in tensors):
        raise MemoryStateError("an entry holds NaN or infinite values")


def check_weight(weight: Any) -> float:
    """An entry's weight as a float; MemoryStateError for what is none."""
    checked = number(weight, 0, _MAX_WEIGHT)
    if not checked:
        raise MemoryStateError(f"an entry's weight is above 0 and at most {_MAX_WEIGHT:g}, received {shown(weight)}")
    return checked


@dataclass(frozen=True)
class EntryFacts:
    """One window of past frames: shape of its latents [F, 4, h, w], digest, weight, and bytes of its tensors."""

    shape: tuple[int, ...]
    digest: str
    weight: float
    nbytes: int

    @classmethod
    def of_arrays(cls, latents: NDArray[Any], face_embedding: NDArray[Any], weight: Any) -> EntryFacts:
        """Of the arrays in a file; MemoryStateError for values that no entry has."""
        check_shapes(latents.shape, face_embedding.shape)
        check_finite(latents, face_embedding)
        nbytes = latents.nbytes + face_embedding.nbytes
        return cls(latents.shape, tensors_digest(latents, face_embedding), check_weight(weight), nbytes)


@dataclass(frozen=True)
class StateFacts:
    """A memory state but for its tensors; see `MemoryState` for the fields.

    Raises:
        MemoryStateError: a value that no state has.
    """

    entries: tuple[EntryFacts, ...]
    horizon: int | None
    windows: int
    model: str
    reference: str
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.horizon is not None:
            horizon = whole(self.horizon, 1)
            if horizon is None:
                raise MemoryStateError(
                    f"horizon must be None (all of the past) or a whole number from 1, received {shown(self.horizon)}"
                )
            object.__setattr__(self, "horizon", horizon)
        windows = whole(self.windows)
        if windows is None:
            raise MemoryStateError(f"windows must be a whole number from 0, received {shown(self.windows)}")
        object.__setattr__(self, "windows", windows)
        for name, text in (("model", self.model), ("reference", self.reference)):
            if not isinstance(text, str) or len(text) > 200 or not text.isprintable():
                raise MemoryStateError(f"a memory's {name} is the digest of one, received {shown(text)}")
        sizes = {entry.shape[1:] for entry in self.entries}
        if len(sizes) > 1:
            raise MemoryStateError(f"all windows of a memory have one latent size, received {sorted(map(list, sizes))}")
        parts = [self.model, self.reference, str(self.horizon)]
        parts += [f"{entry.digest}:{entry.weight:.12g}" for entry in self.entries]
        object.__setattr__(self, "digest", hashlib.sha256("|".join(parts).encode()).hexdigest()[:16])

    def describe(self) -> str:
        """Windows, horizon, weights, digests and size, in words."""
        horizon = "all past" if self.horizon is None else f"last {self.horizon} window{'s' * (self.horizon > 1)}"
        lines = [
            f"memory state {self.digest}",
            f"windows      {self.windows} seen, {len(self.entries)} remembered",
            f"horizon      {horizon}",
            f"checkpoint   {self.model or '-'}",
            f"reference    {self.reference or '-'}",
            f"bytes        {sum(entry.nbytes for entry in self.entries)}",
        ]
        for entry in reversed(self.entries):
            frames, _, height, width = entry.shape
            size = f"{frames} frames at {height} x {width} latents"
            lines.append(f"  {entry.digest[:8]}  weight {entry.weight:.3g}  {size}")
        return "\n".join(lines)
