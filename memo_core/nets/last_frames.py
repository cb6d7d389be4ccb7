"""Temporal module that remembers the last few frames before the window, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..errors import CheckpointError
from .past import LastFrames, Memory
from .temporal import TemporalAttention, TemporalModule

_ABSENT = -1e4  # before a softmax: a frame that is not there


class LastFramesAttention(TemporalAttention):
    """Linear attention as MEMO's, whose sums are those of the last `frames` past frames."""

    def __init__(self, dim: int, heads: int, ops: Any = nn, *, frames: int = 0, positions: int = 0):
        if frames < 1:
            raise CheckpointError(f"config.json: a last_frames module needs frames from 1, received {frames}")
        super().__init__(dim, heads, ops, positions=positions)
        self.carries = LastFrames(frames)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
        """As MEMO's, with sums of the frames that there are."""
        if memory is None:
            return kernels.memory_attention(query, key, value, None)
        pairs, there = memory[0].to(key.dtype).permute(0, 3, 1, 2, 4), memory[1].to(key.dtype)  # [B, f, N, H, 2 D]
        past_key, past_value = pairs.chunk(2, dim=-1)
        absent = there.permute(0, 3, 1, 2).unsqueeze(-1) == 0
        kv, z = kernels.memory_sums(past_key.masked_fill(absent, _ABSENT), past_value.masked_fill(absent, 0))
        any_there = there.amax(dim=-1)[..., None]
        return kernels.memory_attention(query, key, value, (kv * any_there[..., None], z * any_there))


class LastFramesModule(TemporalModule):
    """Temporal module of such layers."""

    attention = LastFramesAttention
