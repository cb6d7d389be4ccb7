"""Frames that were decoded while a clip was sampled, kept for whoever looks at the clip next."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEAST_FREE = 2 * 2**30  # bytes of the disk that stay free
MOST = 8 * 2**30  # bytes of one clip: ten minutes at 512 x 512 are 14 GB


class KeptFrames:
    """Windows of 8-bit frames in a temporary file without a name: it is gone with this object, or with the process
    however that ends. A disk that is full or read-only costs nothing but the frames: they are decoded again, on a GPU
    with another number at once, perhaps, and so a level of 255 away here and there.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)
        self._file: io.BufferedRandom | None = None
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}  # by the window's number: where, and its shape
        self._end, self._lock, self._writes = 0, threading.Lock(), True

    def put(self, window: int, frames: NDArray[np.uint8]) -> None:
        """Keeps a window's frames [F, H, W, 3], unless there is no room."""
        if not self._writes or window in self._places:
            return
        try:
            with self._lock:
                room = min(shutil.disk_usage(self._folder).free - LEAST_FREE, MOST - self._end)
                if room < frames.nbytes:
                    raise OSError("no room for more")
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 -- as long as this object
                self._file.seek(self._end)
                self._file.write(np.ascontiguousarray(frames).data)
                self._file.flush()
                self._places[window] = self._end, frames.shape
                self._end += frames.nbytes
        except OSError:
            self._writes = False

    def get(self, window: int) -> NDArray[np.uint8] | None:
        """A window's frames, or None where they are not kept."""
        if window not in self._places or self._file is None:
            return None
        place, shape = self._places[window]
        frames = np.empty(shape, np.uint8)
        try:
            with self._lock:
                self._file.seek(place)
                read = self._file.readinto(frames.data.cast("B"))
        except OSError:
            return None
        return frames if read == frames.nbytes else None
