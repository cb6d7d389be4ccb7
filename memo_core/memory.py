"""MemoryState: what the networks remember of the video so far, as a small immutable value (MEMO section 3.2).

The memory layers read nothing but Reference Net features of past frames, so their sums can be rebuilt from the past
frames' latents. A state is a short list of windows with weights; the sums themselves (gigabytes at released sizes)
never travel. With the released decay of 0.9 per frame a window older than six windows weighs less than 4.1e-5 and is
left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .clips import WINDOW
from .errors import MemoryStateError
from .kernels import DECAY
from .reference import tensors_digest

FORMAT, VERSION = "memo-memory-state", 1
KEEP = 6 * WINDOW  # frames kept at least; a seventh window stays until the eighth comes, then both leave
MAX_FILE_BYTES = 256 * 2**20
_FORGOTTEN = 1e-9  # weight below which an entry is dropped


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """One window of past frames.

    Attributes:
        latents: [F, 4, h, w] float32 on the CPU, scaled VAE means of the decoded frames, oldest first; F is 16 or,
            where a clip was cut inside a window, less.
        face_embedding: [1, 512] float32, what the Reference Net reads along with them.
        weight: factor of this window's sums in the memory.
        digest: hash of latents and face embedding.
    """

    latents: Tensor
    face_embedding: Tensor
    weight: float = 1.0
    digest: str = ""

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or not 0 < self.latents.shape[0] <= WINDOW or self.latents.shape[1] != 4:
            raise MemoryStateError(
                f"an entry's latents are [F, 4, h, w] with F from 1 to {WINDOW}, received {list(self.latents.shape)}"
            )
        if tuple(self.face_embedding.shape) != (1, 512):
            raise MemoryStateError(f"an entry's face embedding is [1, 512], received {list(self.face_embedding.shape)}")
        if not (torch.isfinite(self.latents).all() and torch.isfinite(self.face_embedding).all()):
            raise MemoryStateError("an entry holds NaN or infinite values")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise MemoryStateError(f"an entry's weight is finite and above 0, received {self.weight!r}")
        if not self.digest:
            object.__setattr__(self, "digest", tensors_digest(self.latents, self.face_embedding))


@dataclass(frozen=True, eq=False)
class MemoryState:
    """An immutable memory. Every operation returns a new state.

    Attributes:
        entries: windows remembered, oldest first.
        horizon: how many windows are remembered at most; None for all of the past (by weight that is the last 96 to 112
            frames).
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
        if self.horizon is not None and (not isinstance(self.horizon, int) or self.horizon < 1):
            raise MemoryStateError(
                f"horizon must be None (all of the past) or a whole number from 1, received {self.horizon!r}"
            )
        sizes = {tuple(entry.latents.shape[1:]) for entry in self.entries}
        if len(sizes) > 1:
            raise MemoryStateError(f"all windows of a memory have one latent size, received {sorted(map(list, sizes))}")
        parts = [self.model, self.reference, str(self.horizon)]
        parts += [f"{entry.digest}:{entry.weight:.12g}" for entry in self.entries]
        object.__setattr__(self, "digest", hashlib.sha256("|".join(parts).encode()).hexdigest()[:16])

    @classmethod
    def empty(cls, horizon: int | None = None) -> MemoryState:
        """A memory without a past.

        Args:
            horizon: remember only the last `horizon` windows (1: only the window before); None: all of the past.
        """
        return cls(horizon=horizon)

    @property
    def is_empty(self) -> bool:
        return not self.entries

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors on the wire; at most 8 MiB at 512 x 512, however long the video."""
        return sum(e.latents.nbytes + e.face_embedding.nbytes for e in self.entries)

    def fork(self) -> MemoryState:
        """A second state with the same past; both go on independently."""
        return replace(self)

    def with_horizon(self, horizon: int | None) -> MemoryState:
        """The state that remembers only the last `horizon` windows from here on; None: all of the past it still has."""
        return replace(self, horizon=horizon, entries=self.entries if horizon is None else self.entries[-horizon:])

    def require(self, model: str, reference: str) -> None:
        """Raises MemoryStateError, naming both digests, if this state was made by another checkpoint or reference."""
        for name, mine, wanted in (("checkpoint", self.model, model), ("reference", self.reference, reference)):
            if mine and mine != wanted:
                what = "" if name == "checkpoint" else " (another portrait, crop or size)"
                raise MemoryStateError(
                    f"this memory state belongs to {name} {mine}{what}, but the {name} in use is {wanted}: "
                    f"use the same {name}, or start from an empty memory"
                )

    def push(
        self, latents: Tensor, face_embedding: Tensor, model: str, reference: str, windows: int = 1
    ) -> MemoryState:
        """The state after one more window: older ones fade by 0.9 per new frame, the new one weighs 1.

        Args:
            latents: [F, 4, h, w] scaled VAE means of the window's decoded frames.
            face_embedding: [1, 512].
            model, reference: digests of what made them.
            windows: what it adds to the count of windows seen; 0 for the portrait held still before a video's first
                window.
        """
        self.require(model, reference)
        # Copies: nobody who holds the tensors given here can change the state through them.
        copies = (t.detach().to("cpu", torch.float32, copy=True).contiguous() for t in (latents, face_embedding))
        entry = MemoryEntry(*copies)
        entries = _recent((*self._faded(len(entry.latents)), entry))
        if self.horizon is not None:
            entries = entries[-self.horizon :]
        return replace(self, entries=entries, windows=self.windows + windows, model=model, reference=reference)

    def decayed(self, seconds: float, fps: float = 30.0) -> MemoryState:
        """The state as if `seconds` of silence had passed: everything fades by 0.9 per frame, nothing is added.

        After about 7 s nothing is left; what is sampled then starts from the portrait, as a new video does.
        """
        for name, value in (("seconds", seconds), ("fps", fps)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise MemoryStateError(f"{name} must be a finite number, at least 0, received {value!r}")
        return replace(self, entries=self._faded(round(seconds * fps)))

    def _faded(self, frames: int) -> tuple[MemoryEntry, ...]:
        return _weighted((entry, entry.weight * DECAY**frames) for entry in self.entries)

    @staticmethod
    def blend(a: MemoryState, b: MemoryState, weight: float) -> MemoryState:
        """(1 - weight) of `a` and `weight` of `b`, as their sums would blend; weight in [0, 1].

        Windows both remember are joined. Where that is more than seven windows of frames, the heaviest stay: of two
        full pasts three windows each, and what is left out weighs less than 0.9^48, 0.6%. A horizon counts again from
        the next window on.
        """
        if not 0 <= weight <= 1:
            raise MemoryStateError(f"weight must be from 0 to 1, received {weight!r}")
        if a.entries and b.entries:
            b.require(a.model, a.reference)
        weights: dict[str, float] = {}
        for state, share in ((a, 1 - weight), (b, weight)):
            for entry in state.entries:
                weights[entry.digest] = weights.get(entry.digest, 0.0) + share * entry.weight
        joined = {entry.digest: entry for entry in (*a.entries, *b.entries)}
        by_weight = sorted(joined, key=lambda digest: (weights[digest], digest))
        entries = _weighted((joined[digest], weights[digest]) for digest in by_weight)
        horizon = None if None in (a.horizon, b.horizon) else max(a.horizon, b.horizon)
        return MemoryState(
            _recent(entries), horizon, max(a.windows, b.windows), a.model or b.model, a.reference or b.reference
        )

    def inspect(self) -> str:
        """Windows, horizon, weights, digests and size, in words."""
        horizon = "all past" if self.horizon is None else f"last {self.horizon} window{'s' * (self.horizon > 1)}"
        lines = [
            f"memory state {self.digest}",
            f"windows      {self.windows} seen, {len(self.entries)} remembered",
            f"horizon      {horizon}",
            f"checkpoint   {self.model or '-'}",
            f"reference    {self.reference or '-'}",
            f"bytes        {self.nbytes}",
        ]
        for entry in reversed(self.entries):
            frames, _, height, width = entry.latents.shape
            size = f"{frames} frames at {height} x {width} latents"
            lines.append(f"  {entry.digest[:8]}  weight {entry.weight:.3g}  {size}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        path = Path(path)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "state": json.dumps(
                {
                    "horizon": self.horizon,
                    "windows": self.windows,
                    "model": self.model,
                    "reference": self.reference,
                    "weights": [entry.weight for entry in self.entries],
                    "digest": self.digest,
                }
            ),
        }
        tensors = {}
        for i, entry in enumerate(self.entries):
            tensors[f"latents.{i}"] = entry.latents
            tensors[f"face_embedding.{i}"] = entry.face_embedding.clone()  # entries may share one tensor, files may not
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise MemoryStateError(f"cannot write the memory state to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemoryState:
        """Reads what `save` wrote.

        Raises:
            MemoryStateError: no such file, not a memory state, of a later version, too large or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise MemoryStateError(f"no memory state at {path}")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise MemoryStateError(f"{path} has {path.stat().st_size} bytes, a memory state at most {MAX_FILE_BYTES}")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise MemoryStateError(f"{path} is not a readable memory state: {error}") from error
        if header.get("format") != FORMAT:
            raise MemoryStateError(f"{path} is a safetensors file, but not a memory state")
        if header.get("version") != str(VERSION):
            raise MemoryStateError(f"{path} has version {header.get('version')}, this program reads version {VERSION}")
        try:
            state = json.loads(header["state"])
            entries = tuple(
                MemoryEntry(tensors[f"latents.{i}"], tensors[f"face_embedding.{i}"], float(weight))
                for i, weight in enumerate(state["weights"])
            )
            loaded = cls(entries, state["horizon"], int(state["windows"]), state["model"], state["reference"])
            digest = state["digest"]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MemoryStateError(f"{path} is damaged: {error}") from error
        if loaded.digest != digest:
            raise MemoryStateError(
                f"{path} is damaged: its contents have digest {loaded.digest}, its header says {digest}"
            )
        return loaded


def _weighted(entries: Iterable[tuple[MemoryEntry, float]]) -> tuple[MemoryEntry, ...]:
    """Entries with new weights, without those that are forgotten."""
    return tuple(replace(entry, weight=weight) for entry, weight in entries if weight > _FORGOTTEN)


def _recent(entries: tuple[MemoryEntry, ...]) -> tuple[MemoryEntry, ...]:
    """The last KEEP frames or somewhat more, once there are more than seven windows of them; entries oldest first.

    Dropping two windows every second time costs less than one every time: the sums are rebuilt when the oldest changes.
    """
    frames = sum(len(entry.latents) for entry in entries)
    if frames <= KEEP + WINDOW:
        return entries
    first = 0
    while frames - len(entries[first].latents) >= KEEP:
        frames -= len(entries[first].latents)
        first += 1
    return entries[first:]


Sums = list[tuple[Tensor, Tensor]]


class SumsCache:
    """The resident sums of the last state used: going on from it costs one window instead of seven.

    At released sizes they are gigabytes, so there is one copy of them, which each call brings up to date in place. A
    cached result has the same bits as a rebuilt one, because both add the windows in the same order (Horner's scheme).
    """

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._sums: Sums = []

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes + z.nbytes for kv, z in self._sums)

    def clear(self) -> None:
        self._key, self._sums = (), []

    @torch.inference_mode()  # always, so that what was made inside the mode can be updated wherever it is used next
    def sums(
        self, state: MemoryState, context: str, of_entry: Callable[[MemoryEntry], Iterable[tuple[Tensor, Tensor]]]
    ) -> Sums:
        """The memory of `state`, [(kv, z)] per memory layer; valid until the next call.

        Args:
            context: whatever else the sums depend on (guidance, dtype, device).
            of_entry: sums of one entry at weight 1, layer by layer.
        """
        steps = _horner(state.entries)
        keys = [context] + [f"{factor:.9g}*+{entry.digest}" for factor, entry in steps]
        done = len(self._key)
        if done > 1 and self._key == tuple(keys[:done]):
            sums = self._sums
        else:
            done, sums = 1, []
        self.clear()  # while they change: an interrupt must not leave half of a sum behind
        for factor, entry in steps[done - 1 :]:
            if not sums:
                sums = list(of_entry(entry))
                continue
            for (kv, z), (a, b) in zip(sums, of_entry(entry), strict=True):
                kv.mul_(factor).add_(a)
                z.mul_(factor).add_(b)
        last = state.entries[-1].weight
        if last == 1.0:
            self._key, self._sums = tuple(keys), sums
            return sums
        for kv, z in sums:  # in place: there is room for one copy; the next call builds it anew
            kv.mul_(last)
            z.mul_(last)
        return sums


def _horner(entries: tuple[MemoryEntry, ...]) -> list[tuple[float, MemoryEntry]]:
    """Factors by which the running sum is multiplied before each entry is added; the last weight is left out."""
    weights = [entry.weight for entry in entries]
    ratios = [0.0] + [before / after for before, after in zip(weights, weights[1:])]
    return list(zip((float(f"{ratio:.9g}") for ratio in ratios), entries))
