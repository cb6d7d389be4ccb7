"""Memory-guided temporal module: linear attention over time with a memory of past frames (MEMO section 3.2).

The module holds no state: sums of past frames are computed by `sums`, carried by the caller and handed to `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .. import kernels
from .layers import (
    QUERY_KEY_VALUE,
    FeedForward,
    add_layer_normed,
    added,
    fuse,
    group_normed,
    layer_normed,
    project,
    residual,
    to_maps,
    to_tokens,
    widened,
)

Memory = tuple[Tensor, Tensor]  # kv [B, N, H, D, D], z [B, N, H, D] of one memory layer
# One layer's pair, or a function that takes nothing and gives this one pair when its layer is reached.
LazyMemory = Memory | Callable[[], Memory]


def _brought(memory: LazyMemory) -> Memory:
    """No sooner than its layer is reached, and outside it: the layer may be compiled."""
    return memory() if callable(memory) else memory


class MemoryAttention(nn.Module):
    """One memory layer: every location of a frame attends to the same location in the window and in the memory."""

    def __init__(self, dim: int, heads: int, ops: Any = nn):
        super().__init__()
        self.heads = heads
        self.to_q = ops.Linear(dim, dim, bias=False)
        self.to_k = ops.Linear(dim, dim, bias=False)
        self.to_v = ops.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([ops.Linear(dim, dim)])

    def fuse(self) -> None:
        """One matrix product for queries, keys and values."""
        fuse(self, *QUERY_KEY_VALUE)

    def _split(self, x: Tensor, frames: int) -> Tensor:
        """[B * F, N, C] -> [B, F, N, H, D]."""
        return x.view(-1, frames, x.shape[1], self.heads, x.shape[2] // self.heads)

    def sums(
        self, past: Tensor, frames: int, rows: Tensor | None = None, into: tuple[Memory, float] | None = None
    ) -> Memory:
        """What past frames [B * F, N, C] add to the memory. With `into`, a memory and a factor: that memory, times the
        factor and added to, in place. `rows` as for `MemoryModule.sums`."""
        key, value = project(self, ("to_k", "to_v"), past)
        if rows is not None:
            key, value = key[rows], value[rows]
        key, value = self._split(key, frames), self._split(value, frames)
        return kernels.memory_sums(key, value) if into is None else kernels.update_memory(*into, key, value)

    def forward(self, x: Tensor, memory: Memory | None, frames: int) -> Tensor:
        query, key, value = (self._split(part, frames) for part in project(self, QUERY_KEY_VALUE, x))
        return self.to_out[0](kernels.memory_attention(query, key, value, memory).reshape(x.shape))


class _MemoryBlock(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, ops: Any):
        super().__init__()
        self.attention_blocks = nn.ModuleList(MemoryAttention(dim, heads, ops) for _ in range(layers))
        self.norms = nn.ModuleList(ops.LayerNorm(dim) for _ in range(layers))
        self.ff = FeedForward(dim, ops)
        self.ff_norm = ops.LayerNorm(dim)


class _TemporalTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, blocks: int, layers: int, groups: int, ops: Any):
        super().__init__()
        self.norm = ops.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = ops.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(_MemoryBlock(dim, heads, layers, ops) for _ in range(blocks))
        self.proj_out = ops.Linear(dim, dim)


class MemoryModule(nn.Module):
    """Memory-guided temporal module at one layer of the Diffusion Net; holds `blocks` x `layers` memory layers."""

    def __init__(self, dim: int, heads: int, blocks: int, layers: int, groups: int, ops: Any = nn):
        super().__init__()
        self.num_memory_layers, self.width = blocks * layers, dim
        self.temporal_transformer = _TemporalTransformer(dim, heads, blocks, layers, groups, ops)

    def sums(
        self,
        past: Tensor,
        height: int,
        width: int,
        frames: int,
        rows: Tensor | None = None,
        into: Iterator[tuple[Memory, float]] | None = None,
    ) -> Iterator[Memory]:
        """What Reference Net features of past frames add to the memory of each layer, one after the other.

        Args:
            past: [B * F, N, C], frames oldest first.
            height, width: N = height * width.
            frames: F.
            rows: [B * F] numbers of rows of `past`, where some frames are alike and `past` holds each only once.
            into: per layer a memory and a factor: it is multiplied by that and added to, in place.
        """
        # Past frames take the same path as the window's frames, but only up to keys and values.
        transformer = self.temporal_transformer
        past = transformer.proj_in(to_tokens(group_normed(transformer.norm, to_maps(past, height, width))))
        for block in transformer.transformer_blocks:
            for attention, norm in zip(block.attention_blocks, block.norms):
                yield attention.sums(layer_normed(norm, past), frames, rows, None if into is None else next(into))

    def forward(self, x: Tensor, memory: list[LazyMemory] | None, frames: int) -> Tensor:
        """x [B * F, C, h, w]; memory: per layer its (kv, z), or a function giving this pair and not the whole list; or
        None to look at the window alone."""
        transformer = self.temporal_transformer
        hidden = transformer.proj_in(to_tokens(group_normed(transformer.norm, x)))
        hidden, layer = widened(hidden, x.dtype, transformer.norm), 0
        for block in transformer.transformer_blocks:
            norms = [*block.norms, block.ff_norm]
            normed = layer_normed(norms[0], hidden)
            for attention, norm in zip(block.attention_blocks, norms[1:]):
                past = None if memory is None else _brought(memory[layer])
                hidden, normed = add_layer_normed(norm, hidden, attention(normed, past, frames), x.dtype)
                layer += 1
            last = block is transformer.transformer_blocks[-1]
            fed = block.ff(normed)
            hidden = added(hidden, fed, block.ff_norm) if last else residual(hidden, fed, block.ff_norm)
        return residual(x, to_maps(transformer.proj_out(hidden), *x.shape[2:]), transformer.norm)
