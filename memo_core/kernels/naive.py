"""The kernels written as in the paper: the ground truth that every other version is compared with.

Shapes: B batch rows, F frames, N spatial locations, H heads, D head dim. Queries, keys and values are [B, F, N, H, D];
each location attends over time only. A memory is the pair (kv [B, N, H, D, D], z [B, N, H, D]).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..release import DECAY

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


def geglu(x: Tensor) -> Tensor:
    """Gated linear unit with GELU: [..., 2 C] -> [..., C], the first half times the GELU of the second."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`geglu` of a linear layer: [..., K] -> [..., C], for weights [2 C, K] and biases [2 C]."""
    return geglu(F.linear(x, weight, bias))


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group norm of maps, after a shift of each channel and before SiLU, if they are asked for.

    Args:
        x: [R, C, h, w], in the number format of the weights or a finer one.
        weight, bias: [C].
        shift: [S, C], S a divisor of R; row r of x takes row r // (R // S).

    Returns:
        [R, C, h, w] in the number format of the weights.
    """
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    if shift is not None:
        x = x + shift.repeat_interleave(len(x) // len(shift), dim=0)[:, :, None, None].to(x.dtype)
    out = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return (F.silu(out) if silu else out).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm of [..., C] over C, in the number format of the weights [C]; x may have a finer one."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(weight.dtype)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm: x + y in `dtype`, and of that `modulated_norm(..., shift, scale)`, or with
    `modulated` False the layer norm of weight scale[0] and bias shift[0], in the number format of y.

    Args:
        x, y: [R, N, C].
    """
    total = x.to(dtype) + y.to(dtype)
    if modulated:
        return total, modulated_norm(total, shift.to(dtype), scale.to(dtype), eps).to(y.dtype)
    return total, layer_norm(total, scale[0].to(dtype), shift[0].to(dtype), eps).to(y.dtype)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x + y in `dtype`, rounded once."""
    return (x.float() + y.float()).to(dtype)
