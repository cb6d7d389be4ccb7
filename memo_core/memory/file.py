"""A memory state's file: one safetensors file, whose header says what the tensors are. Read with torch or without."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks import shown
from ..errors import MemoryStateError
from ..tensorfile import UNREADABLE, open_arrays, save_tensors
from .facts import FORGOTTEN, EntryFacts, StateFacts

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "memo-memory-state"
VERSIONS = {"1": ("F32",), "2": ("F32", "BF16", "F16")}  # number formats that a file of each may hold
MAX_FILE_BYTES = 256 * 2**20

_Entry = TypeVar("_Entry")
_State = TypeVar("_State")


def write(
    path: str | os.PathLike[str], entries: Sequence[tuple[Tensor, Tensor, float]], about: Mapping[str, Any], digest: str
) -> None:
    """Writes a state's windows and what else it consists of.

    Args:
        entries: latents, face embedding and weight of each window.

    Raises:
        MemoryStateError: it cannot be written.
    """
    import torch

    half = any(latents.dtype != torch.float32 for latents, _, _ in entries)
    header = {
        "format": FORMAT,
        "version": "2" if half else "1",  # which programs from before there was a second one read, too
        "state": json.dumps({**about, "weights": [weight for _, _, weight in entries], "digest": digest}),
    }
    tensors = {}
    for i, (latents, face_embedding, _) in enumerate(entries):
        tensors[f"latents.{i}"] = latents
        tensors[f"face_embedding.{i}"] = face_embedding.clone()  # entries may share one tensor, files may not
    try:
        save_tensors(tensors, _path(path), header)
    except UNREADABLE as error:
        raise MemoryStateError(f"cannot write the memory state to {path}: {error}") from error


def describe(path: str | os.PathLike[str]) -> str:
    """What `MemoryState.inspect` says of the state in a file, without torch.

    Raises:
        MemoryStateError: as `read`.
    """
    return read(path, open_arrays, EntryFacts.of_arrays, StateFacts).describe()


def read(
    path: str | os.PathLike[str],
    opened: Callable[[str | os.PathLike[str], int], AbstractContextManager[Any]],
    entry: Callable[[Any, Any, Any], _Entry],
    state: Callable[[tuple[_Entry, ...], Any, Any, Any, Any], _State],
) -> _State:
    """What `write` wrote.

    Args:
        opened: `open_tensors` or `open_arrays`.
        entry: makes a window of latents, face embedding and weight; it has a `weight`.
        state: makes the state of windows, horizon, count of windows, digests of checkpoint and reference; it has a
            `digest`.

    Raises:
        MemoryStateError: no such file, not a memory state, of a later version, too large or damaged.
    """
    path = _path(path)
    try:
        with opened(path, MAX_FILE_BYTES) as file:
            return _read(file, entry, state)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise MemoryStateError(f"no memory state at {path}") from error
    except UNREADABLE as error:
        raise MemoryStateError(f"{path} is not a readable memory state: {error}") from error
    except MemoryStateError as error:
        raise MemoryStateError(f"{path} {error}") from error


def _read(file: Any, entry: Callable[..., Any], state: Callable[..., Any]) -> Any:
    about = _header(file)
    try:
        entries = tuple(
            entry(file.get_tensor(f"latents.{i}"), file.get_tensor(f"face_embedding.{i}"), weight)
            for i, weight in enumerate(about["weights"])
        )
        if any(made.weight <= FORGOTTEN for made in entries):
            raise MemoryStateError(f"a window weighs {FORGOTTEN} or less")
        loaded = state(entries, about["horizon"], about["windows"], about["model"], about["reference"])
    except MemoryStateError as error:
        raise MemoryStateError(f"is damaged: {error}") from error
    if loaded.digest != about["digest"]:
        raise MemoryStateError(
            f"is damaged: its contents have digest {loaded.digest}, its header says {shown(about['digest'])}"
        )
    return loaded


def _header(file: Any) -> dict[str, Any]:
    """What the header says of a state, once it fits the tensors' names and number formats."""
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise MemoryStateError("is a safetensors file, but not a memory state")
    kinds = VERSIONS.get(str(header.get("version")))
    if kinds is None:
        version = str(header.get("version"))[:40]
        raise MemoryStateError(f"has version {version}, this program reads versions {', '.join(VERSIONS)}")
    try:
        state = json.loads(header.get("state", "null"))
    except (ValueError, RecursionError) as error:
        raise MemoryStateError(f"is damaged: its header is no JSON ({type(error).__name__})") from error
    names = {"horizon", "windows", "model", "reference", "weights", "digest"}
    if not isinstance(state, dict) or not names <= set(state) or not isinstance(state["weights"], list):
        raise MemoryStateError(f"is damaged: its header should give {', '.join(sorted(names))}")
    # Everything about the tensors before any of them.
    count, found = len(state["weights"]), set(file.keys())
    wanted = [name for i in range(count) for name in (f"latents.{i}", f"face_embedding.{i}")]
    if count > len(found) or set(wanted) != found:
        raise MemoryStateError(
            f"is damaged: its header gives {count} windows, which does not fit its {len(found)} tensors "
            f"{shown(sorted(found))}"
        )
    for name in wanted:
        kind, allowed = file.get_slice(name).get_dtype(), kinds if name.startswith("latents") else ("F32",)
        if kind not in allowed:
            raise MemoryStateError(f"is damaged: {name} holds {kind}, it should hold {' or '.join(allowed)}")
    return state


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise MemoryStateError(f"a memory state's file is a path, received {shown(path)}") from None
