"""The kernels in a few batched matrix products: the default without Triton, on any device.

Same functions and shapes as `naive`. Softmaxes run where the frames lie; only matrix products need them by location.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..release import DECAY
from .naive import MIN_NORMALISER, Memory, add, add_norm, geglu, geglu_linear, group_norm, layer_norm

# With torch's operators nothing is to be gained in these.
__all__ = ["add", "add_norm", "geglu", "geglu_linear", "group_norm", "layer_norm"]


def _by_location(x: Tensor) -> Tensor:
    """[B, F, N, H, D] -> [B * N * H, F, D]."""
    return x.permute(0, 2, 3, 1, 4).reshape(-1, x.shape[1], x.shape[4])


def _weighted(key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, F, N, H, D] after the softmax as they enter z, and as they enter kv."""
    frames = key.shape[1]
    age = torch.arange(frames - 1, -1, -1, device=key.device, dtype=torch.float32)
    weight = (DECAY**age).to(key.dtype).view(frames, 1, 1, 1)
    key = torch.softmax(key, dim=1) * weight
    return key, key * weight  # kv holds the weight of key and value both


def memory_sums(key: Tensor, value: Tensor) -> Memory:
    """As `naive.memory_sums`."""
    batch, frames, locations, heads, dim = key.shape
    key, key_of_kv = _weighted(key)
    kv = key_of_kv.permute(0, 2, 3, 4, 1).reshape(-1, dim, frames) @ _by_location(value)
    return kv.view(batch, locations, heads, dim, dim), key.sum(dim=1)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
    """As `naive.update_memory`."""
    kv, z = memory
    if not kv.is_contiguous() or kv.dtype != key.dtype:
        for part, window in zip(memory, memory_sums(key, value)):
            part.mul_(factor).add_(window)
        return memory
    key, key_of_kv = _weighted(key)
    kv.view(-1, *kv.shape[-2:]).baddbmm_(_by_location(key_of_kv).transpose(1, 2), _by_location(value), beta=factor)
    z.mul_(factor).add_(key.sum(dim=1))
    return memory


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
    """As `naive.memory_attention`."""
    batch, frames, locations, heads, dim = query.shape
    query = torch.softmax(query, dim=-1)
    if memory is not None:
        kv, z = memory[0].reshape(-1, dim, dim), memory[1]
        # Keys sum to 1 over the window, queries over the width: so does the window's part of the normaliser.
        # The scale D^-0.5 on queries cancels in the quotient except at the floor, which keeps its released value.
        normaliser = 1 + DECAY * (query * z[:, None]).sum(dim=-1, keepdim=True)
        normaliser = normaliser.clamp_min(MIN_NORMALISER * dim**0.5)
    query, key, value = (
        _by_location(query),
        _by_location(torch.softmax(key, dim=1)).transpose(1, 2),
        _by_location(value),
    )
    if dim < frames:
        total = key @ value
        out = query @ (total if memory is None else torch.add(total, kv, alpha=DECAY))
    else:  # as at released sizes: cheaper than through a D x D sum
        out = query @ key @ value
        if memory is not None:
            out = torch.baddbmm(out, query, kv, alpha=DECAY)
    out = out.view(batch, locations, heads, frames, dim).permute(0, 3, 1, 2, 4)
    return out if memory is None else out / normaliser


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.modulated_norm`."""
    samples, width = shift.shape
    weight = 1 + scale
    if samples <= 2:  # as with one label per row of guidance
        parts = zip(x.chunk(samples), weight, shift)
        return torch.cat([F.layer_norm(part, (width,), w, bias, eps) for part, w, bias in parts])
    normed = F.layer_norm(x, (width,), eps=eps).reshape(samples, -1, width)
    return torch.addcmul(shift[:, None], normed, weight[:, None]).view(x.shape)
