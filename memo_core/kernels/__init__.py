"""Memory-guided linear attention and the emotion's layer norm: `naive` states them, `triton` and `fused` are fast.

Tensors on CUDA go to Triton where it can be imported, all others to `fused`. MEMO_KERNELS=torch in the environment,
read when this package is imported, turns Triton off (for a machine where Triton finds no compiler, say).
"""

import os

import torch
from torch import Tensor

from . import fused
from .naive import DECAY

__all__ = ["DECAY", "memory_attention", "memory_sums", "modulated_norm", "update_memory"]

_triton = None
if os.environ.get("MEMO_KERNELS") != "torch" and torch.backends.cuda.is_built():
    try:
        from . import triton as _triton
    except ImportError:
        pass


def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor] | None, decay: float = DECAY
) -> Tensor:
    """As `naive.memory_attention`."""
    kernels = _triton if _triton is not None and query.is_cuda and _triton.supports(query) else fused
    return kernels.memory_attention(query, key, value, memory, decay)


def memory_sums(key: Tensor, value: Tensor, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """As `naive.memory_sums`."""
    kernels = _triton if _triton is not None and key.is_cuda and _triton.supports(key) else fused
    return kernels.memory_sums(key, value, decay)


def update_memory(
    memory: tuple[Tensor, Tensor], factor: float, key: Tensor, value: Tensor, decay: float = DECAY
) -> tuple[Tensor, Tensor]:
    """As `naive.update_memory`."""
    kernels = _triton if _triton is not None and key.is_cuda and _triton.supports(key) else fused
    return kernels.update_memory(memory, factor, key, value, decay)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.modulated_norm`."""
    kernels = _triton if _triton is not None and x.is_cuda and x.dtype != torch.float64 else fused
    return kernels.modulated_norm(x, shift, scale, eps)
