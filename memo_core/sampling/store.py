"""WindowStore: finished windows on disk, found again by what they were made from, so that none is rendered twice."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checks import number, shown
from ..errors import SamplingError
from ..files import remove_if_abandoned
from ..tensorfile import UNREADABLE, open_tensors, save_tensors

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_BYTES = 10 * 2**30  # of the whole store, unless MEMO_STORE_GB says otherwise
KINDS = ("F32", "BF16", "F16")  # number formats of what is kept
MAX_ENTRY_BYTES = 64 * 2**20  # one window at 512 x 512 takes 2 MiB
_KEPT = 0.9  # share of the allowed size that is left after making room
_KEY = re.compile(r"[0-9a-f]{16,64}")


class WindowStore:
    """A folder of finished windows, each under the hash of everything that made it.

    Several processes may use one folder: entries appear by renaming a whole file, carry a checksum, and one that is
    damaged or gone is simply not there. When the folder grows beyond `max_bytes`, what was used least recently goes
    first. Where it cannot be written (a full disk), it says so once and goes on without keeping anything. Entries have
    the rights of any new file, so that users who share a folder share them; one that may not be read is not there.

    Args:
        folder: made when first written to.
        max_bytes: size at which old entries are removed.

    Raises:
        SamplingError: a folder that is no path, a size that is no number above 0.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
        if not isinstance(folder, (str, os.PathLike)) or "\0" in os.fspath(folder):
            raise SamplingError(f"a store's folder is a path, received {shown(folder)}")
        if not number(max_bytes, 0):
            raise SamplingError(f"a store's max_bytes is a number above 0, received {shown(max_bytes)}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._bytes: int | None = None  # what the folder holds; known after the first look
        self._writes, self._reads_all = True, True

    @classmethod
    def default(cls, folder: str | os.PathLike[str] | None = None) -> WindowStore | None:
        """The store at `folder`, or in the user's cache; the variables MEMO_STORE (a folder, or "off") and
        MEMO_STORE_GB (its size) override. None when it is off.
        """
        wanted = os.environ.get("MEMO_STORE", "")
        if wanted.lower() in ("off", "0", "none"):
            return None
        return cls(wanted or folder or _user_cache() / "memo" / "windows", allowed_bytes())

    def path(self, key: str) -> Path:
        """Where the entry of a key lies; SamplingError for what is no key."""
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise SamplingError(f"a key is 16 to 64 hexadecimal digits, received {shown(key)}")
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, None where there is none. A damaged one is reported, removed, and not there; one
        that cannot be read (another user's, no file at all) is left alone, and the first is reported.
        """
        path = self.path(key)
        try:
            with open_tensors(path, MAX_ENTRY_BYTES) as file:
                checksum = (file.metadata() or {}).get("sha256")
                names = list(file.keys())
                if any(file.get_slice(name).get_dtype() not in KINDS for name in names):
                    raise SafetensorError("it holds other numbers than float32, bfloat16 or float16")
                tensors = {name: file.get_tensor(name).clone() for name in names}
            if checksum != _checksum(tensors):
                raise SafetensorError("its checksum differs")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if self._reads_all:
                self._reads_all = False
                logger.warning("a stored window cannot be read and is made anew: %s; further ones: no word", error)
            return None
        except SafetensorError as error:
            logger.warning("a stored window is damaged and is made anew: %s (%s)", path, error)
            _remove(path)
            return None
        with suppress(OSError):
            os.utime(path)  # used now: the last to go
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps CPU tensors of floating-point numbers under a key. Never fails: what cannot be written is not kept."""
        if not self._writes:
            return
        path = self.path(key)
        if sum(tensor.nbytes for tensor in tensors.values()) > MAX_ENTRY_BYTES - 2**16:  # room for the header
            return
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            if self._bytes is None:
                self._bytes = self._make_room()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_tensors(whole, path, {"sha256": _checksum(whole)})
            except PermissionError:  # on Windows, while another process reads the same entry
                if not path.is_file():
                    raise
            self._bytes += path.stat().st_size
            if self._bytes > self.max_bytes:
                self._bytes = self._make_room()
        except UNREADABLE as error:
            self._writes = False
            logger.warning(
                "finished windows are no longer kept in %s: %s. Nothing else is affected", self.folder, error
            )

    def _make_room(self) -> int:
        """Removes what is too much, oldest use first, and what killed processes left; returns the bytes that stay."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            try:
                about = path.stat()
            except OSError:
                continue
            if path.suffix == ".part":
                remove_if_abandoned(path)
            elif path.suffix == SUFFIX:
                found.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.max_bytes:
            return total
        for _, size, path in sorted(found):
            if total <= _KEPT * self.max_bytes:
                break
            _remove(path)
            total -= size
        return total


def allowed_bytes() -> int:
    """Size of a store: MEMO_STORE_GB, or MAX_BYTES."""
    try:
        gigabytes = float(os.environ.get("MEMO_STORE_GB", ""))
    except ValueError:
        return MAX_BYTES
    return int(gigabytes * 2**30) if 0 < gigabytes < math.inf else MAX_BYTES


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        # As bytes: numpy has no bfloat16. An empty tensor has none.
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data if tensors[name].numel() else b"")
    return digest.hexdigest()


def _remove(path: Path) -> None:
    with suppress(OSError):  # someone reads it, or the folder is read-only: it stays
        path.unlink(missing_ok=True)


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
