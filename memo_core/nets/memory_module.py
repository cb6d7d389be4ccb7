"""Memory-guided temporal module: linear attention over time with a memory of all past frames (MEMO section 4.1)."""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from .past import LinearSums, Memory
from .temporal import TemporalAttention, TemporalModule


class MemoryAttention(TemporalAttention):
    """Linear attention of a window over itself and over sums of its past, which fade with age."""

    carries = LinearSums()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
        """MEMO's equation 4 (`kernels.naive.memory_attention`)."""
        return kernels.memory_attention(query, key, value, memory)


class MemoryModule(TemporalModule):
    """MEMO's temporal module (section 4.1)."""

    attention = MemoryAttention
