"""The kernels written as in the paper: the ground truth that every other version is compared with.

Shapes: B batch rows, F frames, N spatial locations, H heads, D head dim. Queries, keys and values are [B, F, N, H, D];
each location attends over time only. A memory is the pair (kv [B, N, H, D, D], z [B, N, H, D]).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY = 0.9  # gamma of the released model, per frame
MIN_NORMALISER = 1e-10


def memory_sums(key: Tensor, value: Tensor, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """Sums that one window of past frames contributes to the memory (MEMO section 3.2, equations 3 and 4).

    Args:
        key, value: [B, F, N, H, D] projections of the past frames, oldest first, before the softmax.
        decay: weight of a frame per frame of age; the newest frame weighs 1. As released, it multiplies key and value
            both, so that a frame of age a enters kv with decay^(2a) and z with decay^a.

    Returns:
        kv [B, N, H, D, D] and z [B, N, H, D].
    """
    frames = key.shape[1]
    age = torch.arange(frames - 1, -1, -1, device=key.device, dtype=torch.float32)
    weight = (decay**age).to(key.dtype).view(1, frames, 1, 1, 1)
    key = torch.softmax(key, dim=1) * weight
    kv = torch.einsum("bfnhd,bfnhe->bnhde", key, value * weight)
    return kv, key.sum(dim=1)


def update_memory(
    memory: tuple[Tensor, Tensor], factor: float, key: Tensor, value: Tensor, decay: float = DECAY
) -> tuple[Tensor, Tensor]:
    """Carries a memory on by one window, in place: M <- factor M + sums (MEMO section 3.2, equations 3 and 4).

    Args:
        memory: (kv, z), overwritten.
        factor: what the memory fades by meanwhile: `decay` to the window's number of frames, as released.
        key, value, decay: as for `memory_sums`.

    Returns:
        `memory`.
    """
    for part, window in zip(memory, memory_sums(key, value, decay)):
        part.mul_(factor).add_(window)
    return memory


def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor] | None, decay: float = DECAY
) -> Tensor:
    """Linear attention of a window over itself and over the memory (MEMO section 3.2, equation 2).

    Args:
        query, key, value: [B, F, N, H, D] projections of the window's frames, before any softmax.
        memory: (kv, z) as `memory_sums` gives it, those of several windows decayed and added; None for the window
            alone.
        decay: weight of the memory against the window.

    Returns:
        [B, F, N, H, D].
    """
    query = torch.softmax(query, dim=-1) * query.shape[-1] ** -0.5
    key = torch.softmax(key, dim=1)
    kv = torch.einsum("bfnhd,bfnhe->bnhde", key, value)
    z = key.sum(dim=1)
    if memory is not None:
        kv = kv + decay * memory[0]
        z = z + decay * memory[1]
    numerator = torch.einsum("bfnhd,bnhde->bfnhe", query, kv)
    denominator = torch.einsum("bfnhd,bnhd->bfnh", query, z).clamp_min(MIN_NORMALISER)
    return numerator / denominator.unsqueeze(-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm whose shift and scale come from outside (MEMO section 3.3, emotion-adaptive layer norm).

    Args:
        x: [R, N, C].
        shift, scale: [S, C], S a divisor of R; row r of x takes row r // (R // S).
        eps: added to the variance.

    Returns:
        [R, N, C]: normalised over C, times (1 + scale), plus shift.
    """
    shift, scale = (part.repeat_interleave(x.shape[0] // part.shape[0], dim=0)[:, None] for part in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
