"""Main memory in which weights and memory sums wait for a device.

For a CUDA device it is locked ("pinned"), so that copies run beside computation. torch's own pinned memory is rounded
up to powers of two and kept for the life of the process; this takes what it says, to a page, and gives it back.
"""

from __future__ import annotations

import logging
import mmap
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .. import devices

logger = logging.getLogger(__name__)

_refused = False  # said once: what cannot be locked now can hardly be locked later


class HostMemory:
    """So many bytes of main memory, locked where the device can copy from it by itself; pageable where locking fails.

    Args:
        size: bytes.
        device: that will read and write it.

    Attributes:
        bytes: uint8 [size]; hold this object for as long as views of it are in use.
    """

    def __init__(self, size: int, device: torch.device):
        if not devices.of(device).pinned or size == 0:
            self.bytes = torch.empty(size, dtype=torch.uint8)
            return
        # Pages of its own: no other allocation shares one, which could not be locked twice.
        where = mmap.mmap(-1, size, **({} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | _ANONYMOUS}))
        self.bytes = torch.frombuffer(where, dtype=torch.uint8)
        if _lock(self.bytes, device):
            weakref.finalize(self, _unlock, self.bytes, device).atexit = False  # then the system does it

    @classmethod
    def for_(cls, tensors: Sequence[Tensor], device: torch.device) -> tuple[HostMemory, list[Tensor]]:
        """Room for tensors like these, and views of it in their shapes, number formats and order in memory."""
        sizes = [aligned(tensor.nbytes) for tensor in tensors]
        memory, views, at = cls(sum(sizes), device), [], 0
        for tensor, size in zip(tensors, sizes):
            numbers = memory.bytes[at : at + tensor.nbytes].view(tensor.dtype)
            views.append(numbers.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()))
            at += size
        return memory, views


_ANONYMOUS = getattr(mmap, "MAP_ANONYMOUS", 0)


def aligned(size: int) -> int:
    """The next multiple of 256: where a kernel reads fastest."""
    return -(-size // 256) * 256


def _lock(memory: Tensor, device: torch.device) -> bool:
    global _refused
    try:
        with torch.cuda.device(device):
            code = _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(code) == 0:
            return True
        reason = f"error {int(code)}"
    except RuntimeError as error:
        reason = str(error)
    _clear_error(device)
    if not _refused:
        _refused = True
        logger.warning(
            "%.1f GB of main memory cannot be locked (%s), as where too little is free, or the system allows only a "
            "part: copies to the GPU will not run beside its work",
            memory.nbytes / 2**30,
            reason,
        )
    return False


def _unlock(memory: Tensor, device: torch.device) -> None:
    """When nothing reads it any longer; the memory itself goes after this."""
    with suppress(RuntimeError):  # of a device that has failed, which says so elsewhere
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            if int(_runtime().cudaHostUnregister(memory.data_ptr())):
                _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """CUDA keeps the error of a call until somebody asks: the next kernel would be blamed for it."""
    with suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)


def _runtime() -> Any:
    return torch.cuda.cudart()
