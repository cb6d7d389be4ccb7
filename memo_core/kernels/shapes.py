"""The kernels without data: what each of them allocates on a card, for counting (`kernels.as_shapes`)."""

from __future__ import annotations

import torch
from torch import Tensor

Memory = tuple[Tensor, Tensor]


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None, decay: float = 0.9) -> Tensor:
    return query.new_empty(query.shape)


def memory_sums(key: Tensor, value: Tensor, decay: float = 0.9) -> Memory:
    shape = (key.shape[0], *key.shape[2:])
    return key.new_empty((*shape, shape[-1])), key.new_empty(shape)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor, decay: float = 0.9) -> Memory:
    return memory


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    return x.new_empty(x.shape, dtype=shift.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=y.dtype)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def geglu(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
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
    return torch.empty_like(x, dtype=weight.dtype, memory_format=torch.channels_last)


def supports(x: Tensor) -> bool:
    return True
