"""Safetensors files: opened only where they are files, read with torch or without it, written whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .files import open_regular, replace_whole

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")
UNREADABLE = (OSError, SafetensorError)  # what opening, reading and writing raise
# Up to so many bytes the file that is locked is the one written. Larger ones are not copied in memory: safetensors puts
# a file of its own in its place, which is without a lock until it has its final name, at once.
_AT_ONCE = 2**28
_BFLOAT16 = np.dtype([("bits", "<u2")])  # numpy has no such number; see `float32`
_ARRAYS: dict[str, np.dtype[Any]] = {
    **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    **{"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BOOL": np.dtype("?")},
    "BF16": _BFLOAT16,
}


@contextmanager
def open_tensors(path: str | os.PathLike[str], max_bytes: int | None = None) -> Iterator[Any]:
    """A safetensors file that is open for reading, tensors on the CPU.

    Raises:
        OSError, SafetensorError: no regular file, of more than `max_bytes`, or not of that format.
    """
    _check_size(path, max_bytes)
    with safe_open(path, "pt") as file:
        yield file


@contextmanager
def open_arrays(path: str | os.PathLike[str], max_bytes: int | None = None) -> Iterator[ArrayFile]:
    """As `open_tensors`, without torch: `get_tensor` gives arrays."""
    _check_size(path, max_bytes)
    with safe_open(path, "numpy") as file:
        yield ArrayFile(file, path)


class ArrayFile:
    """An open safetensors file whose tensors are arrays on the file itself: what is not looked at is not read.

    Those in bfloat16 are arrays of bits, for `float32`.
    """

    def __init__(self, file: Any, path: str | os.PathLike[str]) -> None:
        self.metadata, self.keys, self.get_slice = file.metadata, file.keys, file.get_slice
        # In order, or safe_open had refused it; unless another file has been put in its place since.
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            length = int(self._bytes[:8].view("<u8")[0])
            self._header = json.loads(self._bytes[8 : 8 + length].tobytes())
        except (ValueError, IndexError, RecursionError) as error:
            raise SafetensorError(f"it was replaced while it was opened ({error}): read it again") from error
        self._data = self._bytes[8 + length :]

    @property
    def all_known(self) -> bool:
        """Whether all tensors can be read so: numpy has no numbers of 8 bits."""
        return all(self.get_slice(name).get_dtype() in _ARRAYS for name in self.keys())

    def get_tensor(self, name: str) -> NDArray[Any]:
        """The array of that name.

        Raises:
            SafetensorError: there is none of that name, or none that numpy can hold.
        """
        try:
            kind, shape, (start, end) = (self._header[name][key] for key in ("dtype", "shape", "data_offsets"))
            return self._data[start:end].view(np.ndarray).view(_ARRAYS[kind]).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise SafetensorError(
                f"{name} cannot be read ({type(error).__name__}: {error}); if the file was replaced meanwhile, read it "
                "again"
            ) from error


def float32(values: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """The values of a tensor, or of an array of `ArrayFile`, in float32: the same bits for both, but for NaN's."""
    if not isinstance(values, np.ndarray):
        return values.detach().float().cpu().contiguous().numpy()
    if values.dtype == _BFLOAT16:  # the upper half of a float32
        return np.asarray((values["bits"].astype(np.uint32) << np.uint32(16)).view(np.float32))
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32, order="C")


def is_finite(values: Tensor | NDArray[Any]) -> bool:
    """Whether neither NaN nor infinity is among the values of a tensor, or of an array of `ArrayFile`."""
    if isinstance(values, np.ndarray):
        return bool(np.isfinite(float32(values) if values.dtype == _BFLOAT16 else values).all())
    return bool(values.isfinite().all())


def tensors_digest(*tensors: Tensor | NDArray[Any]) -> str:
    """Shapes and float32 values, hashed to 16 hexadecimal digits; the same for tensors and arrays."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + float32(tensor).tobytes())
    return digest.hexdigest()[:16]


def _check_size(path: str | os.PathLike[str], max_bytes: int | None) -> None:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        raise SafetensorError(f"it has {size} bytes, at most {max_bytes} are allowed")
    if size < 8:
        raise SafetensorError(f"it has {size} bytes")


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; raises OSError or SafetensorError, and then leaves what was there."""
    from safetensors.torch import save, save_file

    if not Path(path).name or "\0" in str(path):
        raise OSError(errno.EINVAL, "this is no file name", repr(path))
    tensors, metadata = dict(tensors), None if metadata is None else dict(metadata)
    with replace_whole(path) as temporary:
        if sum(tensor.nbytes for tensor in tensors.values()) <= _AT_ONCE:
            temporary.write_bytes(save(tensors, metadata))
        else:
            save_file(tensors, temporary, metadata)
