"""MemoryState: what the networks remember of the video so far, as a small immutable value (MEMO section 4.1).

The memory layers read nothing but Reference Net features of past frames, so their sums can be rebuilt from the past
frames' latents. A state is a short list of windows with weights; the sums themselves (gigabytes at released sizes)
never travel. With the released decay of 0.9 per frame a window older than six windows weighs less than 4.1e-5 and is
left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checks import number, shown, whole
from ..errors import MemoryStateError
from ..release import WINDOW
from ..running.precision import HALF
from ..tensorfile import open_tensors, tensors_digest
from . import facts, file, recurrence

KEEP = 6 * WINDOW  # frames kept at least
ROOM = 4 * (KEEP + WINDOW)  # bytes of all frames' latents, per number of one: what does not fit makes only KEEP stay
MOST_WINDOWS = 12  # likewise; the oldest of fourteen is forgotten by its weight, one after the other
_ALL_FADED = 1000  # frames after which no weight is left above `facts.FORGOTTEN`


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """One window of past frames.

    Attributes:
        latents: [F, 4, h, w] on the CPU, scaled VAE means of the decoded frames, oldest first; F is the checkpoint's
            window or, where a clip was cut inside one, less. In float32, or in the half precision of networks that read
            nothing finer.
        face_embedding: [1, 512] float32, what the Reference Net reads along with them.
        weight: factor of this window's sums in the memory.
        digest: hash of latents and face embedding.
    """

    latents: Tensor
    face_embedding: Tensor
    weight: float = 1.0
    digest: str = ""

    def __post_init__(self) -> None:
        for name, tensor in (("latents", self.latents), ("face embedding", self.face_embedding)):
            allowed = (torch.float32, *HALF) if name == "latents" else (torch.float32,)
            if not isinstance(tensor, Tensor) or tensor.dtype not in allowed:
                what = str(tensor.dtype) if isinstance(tensor, Tensor) else shown(tensor)
                kinds = "float32, bfloat16 or float16" if name == "latents" else "float32"
                raise MemoryStateError(f"an entry's {name} must be a {kinds} tensor, received {what}")
        facts.check_shapes(self.latents.shape, self.face_embedding.shape)
        facts.check_finite(self.latents, self.face_embedding)
        object.__setattr__(self, "weight", facts.check_weight(self.weight))
        if not self.digest:
            object.__setattr__(self, "digest", tensors_digest(self.latents, self.face_embedding))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.latents.nbytes + self.face_embedding.nbytes


@dataclass(frozen=True, eq=False)
class MemoryState:
    """An immutable memory. Every operation returns a new state.

    Attributes:
        entries: windows remembered, oldest first.
        horizon: how many windows are remembered at most; None for all of the past (by weight that is the last 96 to 112
            frames, in half precision 96 to 192).
        windows: how many windows of video this memory has seen.
        model, reference: digests of the checkpoint and of the reference it belongs to; empty for a state without a
            past.
    """

    entries: tuple[MemoryEntry, ...] = ()
    horizon: int | None = None
    windows: int = 0
    model: str = ""
    reference: str = ""
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        entries = self.entries
        if not isinstance(entries, (tuple, list)) or not all(isinstance(entry, MemoryEntry) for entry in entries):
            raise MemoryStateError(f"a memory's entries are MemoryEntry values, received {shown(entries)}")
        object.__setattr__(self, "entries", tuple(entries))
        told = self._facts()
        for name in ("horizon", "windows", "digest"):
            object.__setattr__(self, name, getattr(told, name))

    def _facts(self) -> facts.StateFacts:
        entries = tuple(
            facts.EntryFacts(tuple(entry.latents.shape), entry.digest, entry.weight, entry.nbytes)
            for entry in self.entries
        )
        return facts.StateFacts(entries, self.horizon, self.windows, self.model, self.reference)

    @classmethod
    def empty(cls, horizon: int | None = None) -> MemoryState:
        """A memory without a past.

        Args:
            horizon: remember only the last `horizon` windows (1: only the window before); None: all of the past.
        """
        return cls(horizon=horizon)

    @property
    def is_empty(self) -> bool:
        """Whether it remembers nothing."""
        return not self.entries

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors on the wire; at most 8 MiB at 512 x 512, however long the video."""
        return sum(entry.nbytes for entry in self.entries)

    def with_horizon(self, horizon: int | None) -> MemoryState:
        """The state that remembers only the last `horizon` windows from here on; None: all of the past it still has."""
        state = replace(self, horizon=horizon)
        return state if state.horizon is None else replace(state, entries=self.entries[-state.horizon :])

    def require(self, model: str, reference: str) -> None:
        """Raises MemoryStateError, naming both digests, if this state was made by another checkpoint or reference."""
        for name, mine, wanted in (("checkpoint", self.model, model), ("reference", self.reference, reference)):
            if mine and mine != wanted:
                what = "" if name == "checkpoint" else " (another portrait, crop or size)"
                raise MemoryStateError(
                    f"this memory state belongs to {name} {mine}{what}, but the {name} in use is {wanted}: "
                    f"use the same {name}, or start from an empty memory"
                )

    def require_size(self, latents: Sequence[int], face_embedding: int) -> None:
        """Raises MemoryStateError where the windows remembered have another size than those to be sampled.

        The digests of `require` say so of every state this program made; those in a file are what somebody wrote there.

        Args:
            latents: [4, h, w], of one frame of the reference.
            face_embedding: how many numbers of it the checkpoint reads.
        """
        wanted = [list(latents), [1, face_embedding]]
        for entry in self.entries[:1]:  # all have one size
            found = [list(entry.latents.shape[1:]), list(entry.face_embedding.shape)]
            if found != wanted:
                raise MemoryStateError(
                    f"this memory state {self.digest} holds latents {found[0]} and a face embedding {found[1]}, but "
                    f"the reference has latents {wanted[0]} and the checkpoint reads a face embedding {wanted[1]}: use "
                    "the reference and the checkpoint it was made with, or start from an empty memory"
                )

    def push(
        self, latents: Tensor, face_embedding: Tensor, model: str, reference: str, windows: int = 1
    ) -> MemoryState:
        """The state after one more window: older ones fade by 0.9 per new frame, the new one weighs 1.

        Args:
            latents: [F, 4, h, w] scaled VAE means of the window's decoded frames; they keep their number format if it
                is one that `MemoryEntry` takes.
            face_embedding: [1, 512].
            model, reference: digests of what made them.
            windows: what it adds to the count of windows seen; 0 for the portrait held still before a video's first
                window.
        """
        self.require(model, reference)
        for name, tensor in (("latents", latents), ("face_embedding", face_embedding)):
            if not isinstance(tensor, Tensor):
                raise MemoryStateError(f"{name} must be a tensor, received {shown(tensor)}")
        if whole(windows) is None:
            raise MemoryStateError(f"windows must be a whole number from 0, received {shown(windows)}")
        # Copies: nobody who holds the tensors given here can change the state through them.
        dtypes = (latents.dtype if latents.dtype in HALF else torch.float32, torch.float32)
        copied, face = (
            tensor.detach().to("cpu", dtype, copy=True).contiguous()
            for tensor, dtype in zip((latents, face_embedding), dtypes, strict=True)
        )
        entry = MemoryEntry(copied, face)
        entries = _recent((*self._faded(len(entry.latents)), entry))
        if self.horizon is not None:
            entries = entries[-self.horizon :]
        return replace(self, entries=entries, windows=self.windows + windows, model=model, reference=reference)

    def decayed(self, seconds: float, fps: float = 30.0) -> MemoryState:
        """The state as if `seconds` of silence had passed: everything fades by 0.9 per frame, nothing is added.

        After about 7 s nothing is left; what is sampled then starts from the portrait, as a new video does.
        """
        for name, value in (("seconds", seconds), ("fps", fps)):
            if number(value, 0) is None:
                raise MemoryStateError(f"{name} must be a finite number, at least 0, received {shown(value)}")
        frames = float(seconds) * float(fps)
        return replace(self, entries=self._faded(round(frames)) if frames < _ALL_FADED else ())

    def _faded(self, frames: int) -> tuple[MemoryEntry, ...]:
        return _weighted((entry, entry.weight * recurrence.faded(frames)) for entry in self.entries)

    @staticmethod
    def blend(a: MemoryState, b: MemoryState, weight: float) -> MemoryState:
        """(1 - weight) of `a` and `weight` of `b`, as their sums would blend; weight in [0, 1].

        Windows both remember are joined. Where that is more than a memory holds, the heaviest six stay: of two full
        pasts three windows each, and what is left out weighs less than 0.9^48, 0.6%. A horizon counts again from the
        next window on.
        """
        for state in (a, b):
            if not isinstance(state, MemoryState):
                raise MemoryStateError(f"two memory states can be blended, received {shown(state)}")
        share_of_b = number(weight, 0, 1)
        if share_of_b is None:
            raise MemoryStateError(f"weight must be from 0 to 1, received {shown(weight)}")
        if a.entries and b.entries:
            b.require(a.model, a.reference)
        weights: dict[str, float] = {}
        for state, share in ((a, 1 - share_of_b), (b, share_of_b)):
            for entry in state.entries:
                weights[entry.digest] = weights.get(entry.digest, 0.0) + share * entry.weight
        joined = {entry.digest: entry for entry in (*a.entries, *b.entries)}
        by_weight = sorted(joined, key=lambda digest: (weights[digest], digest))
        entries = _weighted((joined[digest], weights[digest]) for digest in by_weight)
        horizon = None if a.horizon is None or b.horizon is None else max(a.horizon, b.horizon)
        return MemoryState(
            _recent(entries), horizon, max(a.windows, b.windows), a.model or b.model, a.reference or b.reference
        )

    def inspect(self) -> str:
        """Windows, horizon, weights, digests and size, in words."""
        return self._facts().describe()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically.

        Raises:
            MemoryStateError: it cannot be written.
        """
        entries = [(entry.latents, entry.face_embedding, entry.weight) for entry in self.entries]
        about = {"horizon": self.horizon, "windows": self.windows, "model": self.model, "reference": self.reference}
        file.write(path, entries, about, self.digest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemoryState:
        """Reads what `save` wrote.

        Raises:
            MemoryStateError: no such file, not a memory state, of a later version, too large or damaged.
        """
        return file.read(path, open_tensors, MemoryEntry, cls)


def _weighted(entries: Iterable[tuple[MemoryEntry, float]]) -> tuple[MemoryEntry, ...]:
    """Entries with new weights, without those that are forgotten."""
    return tuple(replace(entry, weight=weight) for entry, weight in entries if weight > facts.FORGOTTEN)


def _recent(entries: tuple[MemoryEntry, ...]) -> tuple[MemoryEntry, ...]:
    """All entries as long as their latents take no more than seven windows in float32 do, and are no more than
    twelve windows; then the last KEEP frames or somewhat more. Entries oldest first.

    Dropping several windows at once costs less than one every time, because the sums are rebuilt when the oldest
    changes: of networks in half precision, whose windows take half the room, the Reference Net reads 12 / 7 windows for
    each new one, in float32 7 / 2.
    """
    frames, first = sum(len(entry.latents) for entry in entries), 0
    taken = sum(len(entry.latents) * entry.latents.itemsize for entry in entries)
    if taken <= ROOM and frames <= MOST_WINDOWS * WINDOW:
        return entries
    while frames - len(entries[first].latents) >= KEEP:
        frames -= len(entries[first].latents)
        first += 1
    return entries[first:]
