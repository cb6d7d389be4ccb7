"""What temporal modules share: a transformer over time whose attention looks at the window and at its past.

A kind of it is the class of its attention. The module holds no state: what it remembers of the past is made of keys and
values that `past` hands out, carried by the caller and handed to `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import NetConfig
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
from .module import TRANSFORMER, LayerModule
from .past import Memory, MemoryOfModule, Recurrence


class PositionEncoding(nn.Module):
    """Sines and cosines of a frame's place in the window, added to its hidden states.

    Args:
        dim: channels.
        frames: of the longest window.
    """

    pe: Tensor

    def __init__(self, dim: int, frames: int):
        super().__init__()
        angle = torch.arange(frames).unsqueeze(1) * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        table = torch.zeros(1, frames, dim)
        table[0, :, 0::2], table[0, :, 1::2] = angle.sin(), angle.cos()
        self.register_buffer("pe", table)  # saved, as the released code does

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x [B * F, N, C]."""
        return (x.unflatten(0, (-1, frames)) + self.pe.to(x)[:, :frames, None]).flatten(0, 1)


class TemporalAttention(nn.Module):
    """A temporal layer: every location of a frame attends to the same location in the window and in its past.

    Args:
        dim: channels.
        heads: attention heads.
        frames: past frames that it looks at, where its kind has a choice.
        positions: frames of the longest window whose places it knows; 0: it knows none.
        ops: namespace of layer classes.

    Attributes:
        carries: what it remembers, and how that goes on.
    """

    to_out: Any

    carries: Recurrence

    def __init__(self, dim: int, heads: int, ops: Any = nn, *, frames: int = 0, positions: int = 0):
        super().__init__()
        if frames:
            raise CheckpointError(f"config.json: temporal_modules: frames = {frames} is not for a layer of this kind")
        self.heads = heads
        self.to_q = ops.Linear(dim, dim, bias=False)
        self.to_k = ops.Linear(dim, dim, bias=False)
        self.to_v = ops.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([ops.Linear(dim, dim)])
        if positions:
            self.pos_encoder = PositionEncoding(dim, positions)

    def fuse(self) -> None:
        """One matrix product for queries, keys and values."""
        fuse(self, *QUERY_KEY_VALUE)

    def _split(self, x: Tensor, frames: int) -> Tensor:
        """[B * F, N, C] -> [B, F, N, H, D]."""
        return x.view(-1, frames, x.shape[1], self.heads, x.shape[2] // self.heads)

    def keys_values(self, past: Tensor, frames: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of past frames [B * F, N, C], which have no places: [B, F, N, H, D] each. `rows` as for
        `TemporalModule.past`.
        """
        key, value = project(self, ("to_k", "to_v"), past)
        if rows is not None:
            key, value = key[rows], value[rows]
        return self._split(key, frames), self._split(value, frames)

    def forward(self, x: Tensor, memory: Memory | None, frames: int) -> Tensor:
        """x [B * F, N, C] in the layers' format; memory: of `carries`, or None for the window alone."""
        if hasattr(self, "pos_encoder"):
            x = self.pos_encoder(x, frames)
        query, key, value = (self._split(part, frames) for part in project(self, QUERY_KEY_VALUE, x))
        return self.to_out[0](self.attend(query, key, value, memory).reshape(x.shape))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
        """[B, F, N, H, D] each -> the same; what makes the kind."""
        raise NotImplementedError


class _TemporalBlock(nn.Module):
    attention_blocks: Any
    norms: Any
    ff: Any
    ff_norm: Any

    def __init__(self, dim: int, attention: Iterable[TemporalAttention], ops: Any):
        super().__init__()
        self.attention_blocks = nn.ModuleList(attention)
        self.norms = nn.ModuleList(ops.LayerNorm(dim) for _ in self.attention_blocks)
        self.ff = FeedForward(dim, ops)
        self.ff_norm = ops.LayerNorm(dim)


class _TemporalTransformer(nn.Module):
    norm: Any
    proj_in: Any
    transformer_blocks: Any
    proj_out: Any

    def __init__(self, dim: int, blocks: Iterable[Iterable[TemporalAttention]], groups: int, ops: Any):
        super().__init__()
        self.norm = ops.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = ops.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(_TemporalBlock(dim, attention, ops) for attention in blocks)
        self.proj_out = ops.Linear(dim, dim)


class TemporalModule(LayerModule):
    """Temporal module at one layer of the Diffusion Net; holds `blocks` x `layers` temporal layers.

    Args:
        dim: channels.
        heads: attention heads.
        blocks: transformer blocks.
        layers: temporal layers in each.
        groups: of the group norm.
        frames, positions: as for `TemporalAttention`.
        ops: namespace of layer classes.
    """

    temporal_transformer: Any

    part = "memory"
    adapted = TRANSFORMER | {"memory": r".+\.attention_blocks\.\d+\.to_(q|k|v|out\.0)"}
    outside_forward = ()  # `past` computes with its weights: see there
    attention: ClassVar[type[TemporalAttention]]

    def __init__(
        self,
        dim: int,
        heads: int,
        blocks: int,
        layers: int,
        groups: int,
        ops: Any = nn,
        *,
        frames: int = 0,
        positions: int = 0,
    ):
        super().__init__()
        make = self.attention
        attention = (
            (make(dim, heads, ops, frames=frames, positions=positions) for _ in range(layers)) for _ in range(blocks)
        )
        self.temporal_transformer = _TemporalTransformer(dim, attention, groups, ops)

    @classmethod
    def default_frames(cls, config: NetConfig) -> int:
        """Past frames that its layers look at where the configuration does not say; 0 where they have no choice."""
        return 0

    def layers(self) -> Iterator[TemporalAttention]:
        """Its temporal layers, in execution order."""
        for block in self.temporal_transformer.transformer_blocks:
            yield from block.attention_blocks

    def compiled(self) -> Iterator[nn.Module]:
        """Its parts: what is remembered may have to be brought from the host between them."""
        for block in self.temporal_transformer.transformer_blocks:
            yield from (*block.attention_blocks, block.ff)

    def past(
        self, past: Tensor, height: int, width: int, frames: int, rows: Tensor | None = None
    ) -> Iterator[tuple[TemporalAttention, Tensor, Tensor]]:
        """Each layer with its keys and values of past frames, [B, F, N, H, D].

        Its weights have to be there while the answer is read, layer by layer. Where they are sharded that is so inside
        `forward`, as in training, whose memory is made of this when `forward` asks for it. So it is not among
        `outside_forward`: the weights of a method named there are gathered until it returns, before the first layer.

        Args:
            past: Reference Net features [B * F, N, C], frames oldest first.
            height, width: N = height * width.
            frames: F.
            rows: [B * F] numbers of rows of `past`, where some frames are alike and `past` holds each only once.
        """
        # Past frames take the same path as the window's frames, but only up to keys and values.
        transformer = self.temporal_transformer
        past = transformer.proj_in(to_tokens(group_normed(transformer.norm, to_maps(past, height, width))))
        for block in transformer.transformer_blocks:
            for attention, norm in zip(block.attention_blocks, block.norms, strict=True):
                yield attention, *attention.keys_values(layer_normed(norm, past), frames, rows)

    def forward(self, x: Tensor, memory: MemoryOfModule | None, frames: int) -> Tensor:
        """x [B * F, C, h, w]; memory: what its layers remember, or None to look at the window alone."""
        transformer = self.temporal_transformer
        remembered = None if memory is None else iter(memory())
        hidden = transformer.proj_in(to_tokens(group_normed(transformer.norm, x)))
        hidden = widened(hidden, x.dtype, transformer.norm)
        for block in transformer.transformer_blocks:
            norms = [*block.norms, block.ff_norm]
            normed = layer_normed(norms[0], hidden)
            for attention, norm in zip(block.attention_blocks, norms[1:], strict=True):
                # Outside the layer, which may be compiled, and no sooner than it is reached.
                past = None if remembered is None else next(remembered)
                hidden, normed = add_layer_normed(norm, hidden, attention(normed, past, frames), x.dtype)
            last = block is transformer.transformer_blocks[-1]
            fed = block.ff(normed)
            hidden = added(hidden, fed, block.ff_norm) if last else residual(hidden, fed, block.ff_norm)
        return residual(x, to_maps(transformer.proj_out(hidden), *x.shape[2:]), transformer.norm)
