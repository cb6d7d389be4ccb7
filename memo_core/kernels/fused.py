"""Memory-guided linear attention in a few batched matrix products: the default without Triton, on any device.

Same functions and shapes as `naive`. A window has fewer frames than a head has channels at released sizes, so the
window's own part is cheaper as (q k^T) v than through a D x D sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import DECAY, MIN_NORMALISER


def _by_location(x: Tensor) -> Tensor:
    """[B, F, N, H, D] -> [B * N * H, F, D]."""
    return x.permute(0, 2, 3, 1, 4).reshape(-1, x.shape[1], x.shape[4])


def memory_sums(key: Tensor, value: Tensor, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """As `naive.memory_sums`."""
    batch, frames, locations, heads, dim = key.shape
    age = torch.arange(frames - 1, -1, -1, device=key.device, dtype=torch.float32)
    weight = (decay**age).to(key.dtype).view(1, frames, 1)
    key = torch.softmax(_by_location(key), dim=1) * weight
    kv = key.transpose(1, 2) @ (_by_location(value) * weight)
    return kv.view(batch, locations, heads, dim, dim), key.sum(dim=1).view(batch, locations, heads, dim)


def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor] | None, decay: float = DECAY
) -> Tensor:
    """As `naive.memory_attention`."""
    batch, frames, locations, heads, dim = query.shape
    query = torch.softmax(_by_location(query), dim=-1)
    key = torch.softmax(_by_location(key), dim=1)
    scores = query @ key.transpose(1, 2)
    numerator = scores @ _by_location(value)
    denominator = scores.sum(dim=-1, keepdim=True)
    if memory is not None:
        kv, z = memory
        numerator = torch.baddbmm(numerator, query, kv.reshape(-1, dim, dim), alpha=decay)
        denominator = torch.baddbmm(denominator, query, z.reshape(-1, dim, 1), alpha=decay)
    # The scale D^-0.5 on queries cancels in the quotient except at the floor, which keeps its released value.
    out = numerator / denominator.clamp_min(MIN_NORMALISER * dim**0.5)
    return out.view(batch, locations, heads, frames, dim).permute(0, 3, 1, 2, 4)
