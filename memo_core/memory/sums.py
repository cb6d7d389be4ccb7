"""What one temporal layer remembers, where it is kept and in which format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nets.past import LinearSums, Recurrence
from ..running.fp8 import FP8
from ..running.host_memory import HostMemory, aligned


class LayerMemory:
    """What one temporal layer remembers (`nets.past.Memory`), kept; who computes with it gets it whole, on the device.

    Args:
        kv, z: of a layer with MEMO's linear attention [B, N, H, D, D] and [B, N, H, D], on the device that computes;
            taken over, not copied.
        dtype: None keeps kv as it is; float8_e4m3fn takes half the room of bf16 and rounds to 3 bits of mantissa, with
            a scale per batch row, location and head. z stays as it is.
        on_host: keep them in host memory, locked where the device is a CUDA device.
        carries: how it goes on.
    """

    def __init__(
        self,
        kv: Tensor,
        z: Tensor,
        dtype: torch.dtype | None = None,
        on_host: bool = False,
        carries: Recurrence | None = None,
    ):
        self.device, self.dtype = kv.device, kv.dtype
        self._stored = kv.dtype if dtype is None else dtype
        self._scale: Tensor | None = None
        self._home: tuple[HostMemory, list[Tensor]] | None = None
        self.on_host, self.carries = on_host, LinearSums() if carries is None else carries
        self.store(kv, z)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.kv.nbytes + self.z.nbytes

    def fetch(self, rows: slice = slice(None), into: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """kv and z of these batch rows on the device, in full; with `into`, as they are kept, to be given to `restore`.
        They are the kept tensors themselves where these lie on the device, not in fp8.

        Args:
            into: bytes on the device for what comes from the host, as many as `buffer_bytes` says; None makes them.
        """
        kv, z = self.kv[rows], self.z[rows]
        if into is None:
            return self.restore(kv.to(self.device, non_blocking=True), z.to(self.device, non_blocking=True), rows)
        views = (
            into[first : first + part.nbytes].view(part.dtype).view(part.shape)
            for part, first in ((kv, 0), (z, aligned(kv.nbytes)))
        )
        kv, z = (view.copy_(part, non_blocking=True) for view, part in zip(views, (kv, z)))
        return kv, z

    def buffer_bytes(self, rows: slice) -> int:
        """Bytes of a buffer for these rows as they are kept."""
        return aligned(self.kv[rows].nbytes) + self.z[rows].nbytes

    def restore(self, kv: Tensor, z: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """What was kept in fp8, in its own dtype again."""
        return (kv, z) if self._scale is None else (kv.to(self.dtype).mul_(self._scale[rows]), z)

    def fade(self, factor: float) -> None:
        """As if frames had passed and nothing been added."""
        self.store(*self.carries.fade(self.fetch(), factor))

    def move(self, on_host: bool) -> None:
        """To host memory, or back to the device."""
        if on_host != self.on_host:
            self.on_host = on_host
            self._settle(self.kv, self.z)

    def store(self, kv: Tensor, z: Tensor) -> None:
        """Takes over new sums, computed on the device: wherever they are kept, they are the same bits."""
        if self._stored == FP8:
            largest = torch.linalg.vector_norm(kv, float("inf"), dim=(-2, -1), keepdim=True)
            self._scale = (largest.float() / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
            kv = kv.div_(self._scale).to(FP8)
        self._settle(kv, z)

    def _settle(self, kv: Tensor, z: Tensor) -> None:
        """Where they are to lie."""
        if not self.on_host:
            self.kv, self.z, self._home = kv.to(self.device), z.to(self.device), None
            return
        if self._home is None or [view.shape for view in self._home[1]] != [kv.shape, z.shape]:
            self._home = HostMemory.for_((kv, z), self.device)
        self.kv, self.z = (home.copy_(part) for home, part in zip(self._home[1], (kv, z)))
