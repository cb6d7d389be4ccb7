"""Temporal module with softmax attention over past frames and the window's own, instead of sums of the past."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NetConfig
from .past import LastFrames, Memory
from .temporal import TemporalAttention, TemporalModule


class PastAttention(TemporalAttention):
    """Self-attention over the last `frames` past frames and the window."""

    def __init__(self, dim: int, heads: int, ops: Any = nn, *, frames: int = 0, positions: int = 0):
        super().__init__(dim, heads, ops, positions=positions)
        self.carries = LastFrames(frames)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
        """Softmax attention of the window's frames to the past ones that there are, and to each other."""
        query, key, value = (part.permute(0, 2, 3, 1, 4) for part in (query, key, value))  # [B, N, H, F, D]
        mask = None
        if memory is not None:
            past_key, past_value = memory[0].to(key.dtype).chunk(2, dim=-1)
            own = torch.ones(*key.shape[:-1], dtype=torch.bool, device=key.device)
            mask = torch.cat([memory[1] > 0, own], dim=-1)[..., None, :]
            key, value = torch.cat([past_key, key], dim=-2), torch.cat([past_value, value], dim=-2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.permute(0, 3, 1, 2, 4)


class PastAttentionModule(TemporalModule):
    """Temporal module of such layers."""

    attention = PastAttention

    @classmethod
    def default_frames(cls, config: NetConfig) -> int:
        """Those of a window."""
        return config.window
