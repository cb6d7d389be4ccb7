"""Safetensors files: opened only where they are files, written whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from .files import open_regular, replace_whole

FLOATS = ("F64", "F32", "F16", "BF16")
UNREADABLE = (OSError, SafetensorError)  # what opening, reading and writing raise
# Up to so many bytes the file that is locked is the one written. Larger ones are not copied in memory: safetensors puts
# a file of its own in its place, which is without a lock until it has its final name, at once.
_AT_ONCE = 2**28


@contextmanager
def open_tensors(path: str | os.PathLike[str], max_bytes: int | None = None) -> Iterator[Any]:
    """A safetensors file that is open for reading, tensors on the CPU.

    Raises:
        OSError, SafetensorError: no regular file, of more than `max_bytes`, or not of that format.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        raise SafetensorError(f"it has {size} bytes, at most {max_bytes} are allowed")
    if size < 8:
        raise SafetensorError(f"it has {size} bytes")
    with safe_open(path, "pt") as file:
        yield file


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; raises OSError or SafetensorError, and then leaves what was there."""
    if not Path(path).name or "\0" in str(path):
        raise OSError(errno.EINVAL, "this is no file name", repr(path))
    tensors, metadata = dict(tensors), None if metadata is None else dict(metadata)
    with replace_whole(path) as temporary:
        if sum(tensor.nbytes for tensor in tensors.values()) <= _AT_ONCE:
            temporary.write_bytes(save(tensors, metadata))
        else:
            save_file(tensors, temporary, metadata)
