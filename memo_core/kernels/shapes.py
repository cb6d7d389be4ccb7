"""The kernels without data: what each of them allocates on a card, for counting (`kernels.as_shapes`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import Memory


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
    """[B, F, N, H, D], as the query."""
    return query.new_empty(query.shape)


def memory_sums(key: Tensor, value: Tensor) -> Memory:
    """kv [B, N, H, D, D] and z [B, N, H, D], in the format of the key."""
    shape = (key.shape[0], *key.shape[2:])
    return key.new_empty((*shape, shape[-1])), key.new_empty(shape)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
    """Nothing new: the memory is written in place."""
    return memory


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """[R, N, C], in the format of the shift."""
    return x.new_empty(x.shape, dtype=shift.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """[R, N, C], in the format of the weights."""
    return x.new_empty(x.shape, dtype=weight.dtype)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    """Twice [R, N, C]: the sum in `dtype`, its norm in the format of y."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=y.dtype)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """As x lies in memory, in `dtype`."""
    return torch.empty_like(x, dtype=dtype)


def geglu(x: Tensor) -> Tensor:
    """[..., C] of [..., 2 C]."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., C] of weights [2 C, K]."""
    return x.new_empty((*x.shape[:-1], len(weight) // 2))


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """[R, C, h, w] channels-last, in the format of the weights."""
    return torch.empty_like(x, dtype=weight.dtype, memory_format=torch.channels_last)
