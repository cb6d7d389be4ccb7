"""The kernels written as in the paper: the ground truth that every other version is compared with.

Shapes: B batch rows, F frames, N spatial locations, H heads, D head dim. Queries, keys and values are [B, F, N, H, D];
each location attends over time only. A memory is the pair (kv [B, N, H, D, D], z [B, N, H, D]). Formulas are those of
one location and head, with gamma the decay per frame and phi a softmax: over D for queries, over the frames for keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..release import DECAY

Memory = tuple[Tensor, Tensor]
MIN_NORMALISER = 1e-10


def memory_sums(key: Tensor, value: Tensor) -> Memory:
    """Sums that one window of past frames contributes to the memory (MEMO section 4.1, equations 2 and 3).

        kv = sum over j of gamma^(2 (F - j)) phi(K)_j V_j^T        z = sum over j of gamma^(F - j) phi(K)_j

    As released: frame j = 1, ..., F weighs gamma^(its age), the newest 1, and the weight multiplies key and value both,
    so that it enters kv squared.

    Args:
        key, value: [B, F, N, H, D] projections of the past frames, oldest first, before the softmax.

    Returns:
        kv [B, N, H, D, D] and z [B, N, H, D].
    """
    frames = key.shape[1]
    age = torch.arange(frames - 1, -1, -1, device=key.device, dtype=torch.float32)
    weight = (DECAY**age).to(key.dtype).view(1, frames, 1, 1, 1)
    key = torch.softmax(key, dim=1) * weight
    kv = torch.einsum("bfnhd,bfnhe->bnhde", key, value * weight)
    return kv, key.sum(dim=1)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
    """Carries a memory on by one window, in place (MEMO section 4.1, equations 2 and 3).

        M <- gamma^F M + sums        of both parts, M_KV = kv and M_K = z

    Args:
        memory: (kv, z), overwritten.
        factor: what the memory fades by meanwhile: gamma^F, as released.
        key, value: as for `memory_sums`.

    Returns:
        `memory`.
    """
    for part, window in zip(memory, memory_sums(key, value)):
        part.mul_(factor).add_(window)
    return memory


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
    """Linear attention of a window over itself and over the memory (MEMO section 4.1, equation 4).

        out_i = phi(Q)_i^T (H_KV + gamma M_KV) / phi(Q)_i^T (H_K + gamma M_K)
        H_KV = sum over j of phi(K)_j V_j^T        H_K = sum over j of phi(K)_j

    As released: the memory fades once more, and phi(Q) is scaled by D^-0.5, which cancels except where the denominator
    falls to `MIN_NORMALISER`, the least that is divided by.

    Args:
        query, key, value: [B, F, N, H, D] projections of the window's frames, before any softmax.
        memory: (kv, z) of all windows before, as `memory_sums` and `update_memory` give it; None for the window alone.

    Returns:
        [B, F, N, H, D].
    """
    query = torch.softmax(query, dim=-1) * query.shape[-1] ** -0.5
    key = torch.softmax(key, dim=1)
    kv = torch.einsum("bfnhd,bfnhe->bnhde", key, value)
    z = key.sum(dim=1)
    if memory is not None:
        kv = kv + DECAY * memory[0]
        z = z + DECAY * memory[1]
    numerator = torch.einsum("bfnhd,bnhde->bfnhe", query, kv)
    denominator = torch.einsum("bfnhd,bnhd->bfnh", query, z).clamp_min(MIN_NORMALISER)
    return numerator / denominator.unsqueeze(-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm whose shift and scale come from outside (MEMO section 4.2, emotion-adaptive layer norm).

        (1 + scale) (x - mean(x)) / sqrt(variance(x) + eps) + shift        mean and variance over C

    Args:
        x: [R, N, C].
        shift, scale: [S, C], S a divisor of R; row r of x takes row r // (R // S).
        eps: added to the variance.

    Returns:
        [R, N, C].
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
        groups: a divisor of C.
        weight, bias: [C].
        eps: added to the variance.
        shift: [S, C], S a divisor of R; row r of x takes row r // (R // S).
        silu: whether SiLU follows.

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
    """A residual sum and its norm.

    Args:
        x, y: [R, N, C].
        shift, scale: [S, C], as for `modulated_norm`.
        eps: added to the variance.
        dtype: number format of the sum.
        modulated: whether the norm is `modulated_norm`, or the layer norm of weight scale[0] and bias shift[0].

    Returns:
        x + y in `dtype`, and its norm in the number format of y.
    """
    total = x.to(dtype) + y.to(dtype)
    if modulated:
        return total, modulated_norm(total, shift.to(dtype), scale.to(dtype), eps).to(y.dtype)
    return total, layer_norm(total, scale[0].to(dtype), shift[0].to(dtype), eps).to(y.dtype)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x + y in `dtype`, rounded once."""
    return (x.float() + y.float()).to(dtype)
