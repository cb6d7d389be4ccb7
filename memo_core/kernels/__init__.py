"""Memory-guided linear attention: `naive` states it, `fused` is the default."""

from .fused import memory_attention, memory_sums
from .naive import DECAY

__all__ = ["DECAY", "memory_attention", "memory_sums"]
