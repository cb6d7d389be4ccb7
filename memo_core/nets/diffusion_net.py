"""Diffusion Net: the denoising video UNet of MEMO (section 3); the memory goes in and out, never stays inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .config import NetConfig
from .layers import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    as_laid_out,
    in_full,
    narrowed,
    norm_is_kernel,
    widened,
)
from .memory_module import LazyMemory, Memory, MemoryModule
from .multimodal import AudioModule, Feeling, Heard
from .reference_net import down_widths, up_widths
from .spatial import SpatialConditions, SpatialTransformer


class _Block(nn.Module):
    """One resolution level. Each layer is a residual block, then, where the level has them, spatial attention,
    multi-modal attention and the memory module."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        audio_widths: list[int],
        config: NetConfig,
        attention: bool,
        memory: bool,
        downsample: bool = False,
        upsample: bool = False,
        final: bool = False,
        ops: Any = nn,
    ):
        super().__init__()
        time_dim, groups = config.block_out_channels[0] * 4, config.norm_num_groups
        dim, last = widths[-1][1], len(widths) - 1
        self.resnets = nn.ModuleList(ResnetBlock(a, b, time_dim, groups, config.norm_eps, ops) for a, b in widths)
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(dim, config, ops) for _ in widths)
            self.audio_modules = nn.ModuleList(
                AudioModule(dim, inner, config.audio_attention_dim, config.heads, groups, final and i == last, ops)
                for i, inner in enumerate(audio_widths)
            )
        if memory:
            self.motion_modules = nn.ModuleList(_memory_module(dim, config, ops) for _ in widths)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(dim, ops)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(dim, ops)])

    def memory_module(self, i: int) -> MemoryModule | None:
        return self.motion_modules[i] if hasattr(self, "motion_modules") else None

    def layer(
        self,
        i: int,
        x: Tensor,
        audio: Tensor | Heard | None,
        shift: Tensor,
        given: LayerConditions,
        memory: list[LazyMemory] | None,
        frames: int,
        carried: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | Heard | None]:
        x = self.resnets[i](x, shift, carried)
        if given.spatial is not None:
            x = _of_every_row(x, len(given.spatial.face[0]) * frames)
            x = self.attentions[i](x, given.spatial)
        if given.feeling is not None:
            x, audio = self.audio_modules[i](x, audio, given.feeling)
        if memory is not None:
            x = self.motion_modules[i](x, memory or None, frames)
        return x, audio


class _MidBlock(_Block):
    """As a level with one layer, and a second residual block after it."""

    def __init__(self, dim: int, config: NetConfig, ops: Any):
        super().__init__([(dim, dim)], [dim], config, attention=True, memory=True, ops=ops)
        self.resnets.append(
            ResnetBlock(dim, dim, config.block_out_channels[0] * 4, config.norm_num_groups, config.norm_eps, ops)
        )


def _memory_module(dim: int, config: NetConfig, ops: Any) -> MemoryModule:
    return MemoryModule(
        dim, config.memory_heads, config.memory_blocks, config.memory_layers_per_block, config.norm_num_groups, ops
    )


class LayerConditions(NamedTuple):
    """What one layer reads besides frames, memory and time; None where it has no such module or leaves it out."""

    spatial: SpatialConditions | None
    feeling: Feeling | None


class WindowConditions(NamedTuple):
    """Everything that `DiffusionNet.prepare` computes from a window's conditions; no step changes it.

    Attributes:
        layers: in execution order.
        audio: what the first audio module heard; None without sound.
        frames: F.
    """

    layers: list[LayerConditions]
    audio: Heard | None
    frames: int

    def half(self, number: int) -> WindowConditions:
        """Those of the batch's first half (0), which sees no reference, or of its second (1), which does; views."""

        def mine(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
            return tuple(tensor.chunk(2)[number] for tensor in tensors)

        layers = []
        for spatial, feeling in self.layers:
            if spatial is not None:
                reference = spatial.reference if number else tuple(kv[:0] for kv in spatial.reference)
                spatial = SpatialConditions(reference, mine(spatial.face))
            if feeling is not None:
                feeling = Feeling(*(mine(modulation) for modulation in feeling))
            layers.append(LayerConditions(spatial, feeling))
        return WindowConditions(layers, None if self.audio is None else Heard(*mine(self.audio)), self.frames)


def _of_every_row(x: Tensor, rows: int) -> Tensor:
    """Rows that were computed once, because they do not differ yet, for all: [R, C, h, w] -> [rows, C, h, w]."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # in memory as x is


class DiffusionNet(nn.Module):
    """Predicts the rectified-flow velocity of a window of frames.

    Args:
        config: sizes.
        ops: namespace of layer classes.
    """

    def __init__(self, config: NetConfig, ops: Any = nn):
        super().__init__()
        self.config = config
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = ops.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], ops)
        self.down_blocks = nn.ModuleList(
            _Block(
                widths,
                [a for a, _ in widths],
                config,
                config.attention[i],
                config.memory[i],
                downsample=i < last,
                ops=ops,
            )
            for i, widths in enumerate(down_widths(config))
        )
        self.mid_block = _MidBlock(channels[-1], config, ops)
        self.up_blocks = nn.ModuleList()
        for i, widths in enumerate(up_widths(config)):
            level = last - i
            audio_widths = [channels[max(level - 1, 0)]] * len(widths)
            self.up_blocks.append(
                _Block(
                    widths,
                    audio_widths,
                    config,
                    config.attention[level],
                    config.memory[level],
                    upsample=i < last,
                    final=i == last,
                    ops=ops,
                )
            )
        self.conv_norm_out = ops.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = ops.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def layers(self) -> Iterator[tuple[_Block, int, int]]:
        """(block, index of the layer in it, level) in execution order: down, middle, up."""
        last = len(self.down_blocks) - 1
        for level, block in enumerate(self.down_blocks):
            yield from ((block, i, level) for i in range(len(block.resnets)))
        yield self.mid_block, 0, last
        for i, block in enumerate(self.up_blocks):
            yield from ((block, j, last - i) for j in range(len(block.resnets)))

    def memory_sums(
        self,
        past: list[Tensor],
        height: int,
        width: int,
        frames: int,
        rows: Tensor | None = None,
        into: Iterator[tuple[Memory, float]] | None = None,
    ) -> Iterator[Memory]:
        """What a window of past frames adds to the memory, one memory layer after the other in execution order.

        Args:
            past: Reference Net features of the past frames, [B * F, N, C] per layer, frames oldest first.
            height, width: latent size; level i of the net works at ceil(size / 2^i).
            frames: F.
            rows: [B * F] numbers of rows of `past`, where some frames are alike and `past` holds each only once.
            into: per memory layer a memory and a factor: it is multiplied by that and added to, in place, and yielded.

        Yields:
            (kv [B, N, H, D, D], z [B, N, H, D]) per memory layer. Memory of several windows is the sum of theirs, each
            decayed by 0.9^frames per later window (`memory.MemoryState` keeps the weights).
        """
        for (block, i, level), feature in zip(self.layers(), past):
            module = block.memory_module(i)
            if module is not None:
                h, w = -(-height // 2**level), -(-width // 2**level)
                yield from module.sums(feature, h, w, frames, rows, into)

    def prepare(
        self,
        *,
        reference: list[Tensor],
        face_tokens: Tensor,
        audio_tokens: Tensor | None,
        emotion: Tensor | None,
        frames: int,
    ) -> WindowConditions:
        """Computes what does not change between the steps of a window: keys and values of the portrait and of the face
        tokens, the emotion's shifts and scales, what the first audio module makes of the sound. Arguments as for
        `predict`."""
        dtype = face_tokens.dtype
        layers = []
        for (block, i, _), feature in zip(self.layers(), reference):
            spatial = feeling = None
            if hasattr(block, "attentions"):
                sets = feature if feature.ndim == 4 else feature[:, None]
                spatial = block.attentions[i].prepare(sets, face_tokens)
                if emotion is not None:
                    feeling = block.audio_modules[i].feel(emotion, dtype)
            layers.append(LayerConditions(spatial, feeling))
        audio = None
        if audio_tokens is not None:
            first = next(n for n, given in enumerate(layers) if given.feeling is not None)
            block, i, _ = list(self.layers())[first]
            audio = block.audio_modules[i].listen(audio_tokens.flatten(0, 1), layers[first].feeling)
        return WindowConditions(layers, audio, frames)

    def time_shifts(self, timestep: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What the time embedding [T] of timesteps 0 (clean) to 1000 (noise) adds in every residual block, [T, C]."""
        time = self.time_embedding(timestep, dtype)
        return [resnet.shift(time) for resnet in self._resnets()]

    def _resnets(self) -> Iterator[ResnetBlock]:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from block.resnets

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        reference: list[Tensor],
        memory: list[LazyMemory] | None,
        face_tokens: Tensor,
        audio_tokens: Tensor | None,
        emotion: Tensor | None,
    ) -> Tensor:
        """One step, and all that `prepare` and `time_shifts` compute for it.

        Args:
            latents: [B, 4, F, h, w] noisy latents.
            timestep: [B] or [1], or [B * F] for one per frame, 0 (clean) to 1000 (noise).
            reference: Reference Net features of the portrait per layer, [S, N, C], or [S, K, N, C] for K sets that the
                frames see in turn. The first B - S rows of the batch do not see the reference.
            memory: as `memory_sums` gives them, or None for a window without a past.
            face_tokens: [B, tokens, cross_attention_dim].
            audio_tokens: [B, F, tokens, audio_attention_dim].
            emotion: int labels 0..9, [B] for one per window or [B * F] for one per frame, or floating class weights
                [B, 10] or [B * F, 10], rows summing to 1. None, with audio_tokens None, leaves out multi-modal
                attention and memory: each frame by itself, as the first stage of training has it.

        Returns:
            Velocity [B, 4, F, h, w].
        """
        given = self.prepare(
            reference=reference,
            face_tokens=face_tokens,
            audio_tokens=audio_tokens,
            emotion=emotion,
            frames=latents.shape[2],
        )
        return self(latents, self.time_shifts(timestep, latents.dtype), given, memory)

    def forward(
        self,
        latents: Tensor,
        shifts: list[Tensor],
        given: WindowConditions,
        memory: list[LazyMemory] | None,
    ) -> Tensor:
        """One step under prepared conditions.

        Args:
            latents: [B, 4, F, h, w] noisy latents; or those of B / 2 videos, which then stand for both halves of the
                batch (guidance) and are computed once as far as the halves do not differ. In a finer format than the
                weights, hidden states are carried in it from layer to layer.
            shifts: of `time_shifts`, for one timestep, or one per row or frame.
            given: from `prepare`.
            memory: as for `predict`.

        Returns:
            Velocity [B, 4, F, h, w].
        """
        frames, norm = given.frames, self.conv_norm_out
        # None where there is nothing finer to carry, as in training.
        carried = latents.dtype if norm.weight.dtype.itemsize < latents.dtype.itemsize else None
        shift, layers = iter(shifts), iter(given.layers)
        sums = None if memory is None else iter(memory)
        audio: Tensor | Heard | None = given.audio

        def layer(block: _Block, i: int, x: Tensor, audio: Tensor | Heard | None) -> tuple[Tensor, Any]:
            module = None if given.audio is None else block.memory_module(i)
            mine = None
            if module is not None:
                mine = [] if sums is None else [next(sums) for _ in range(module.num_memory_layers)]
            return block.layer(i, x, audio, next(shift), next(layers), mine, frames, carried)

        x = in_full(self.conv_in, as_laid_out(latents.transpose(1, 2).flatten(0, 1)))
        skips = [narrowed(x, norm)]  # nothing is added to them
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x, audio = layer(block, i, x, audio)
                skips.append(narrowed(x, norm))
            if hasattr(block, "downsamplers"):
                x = self._through(block.downsamplers[0], x)
                skips.append(narrowed(x, norm))
        x, audio = layer(self.mid_block, 0, x, audio)
        x = self.mid_block.resnets[1](x, next(shift), carried)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                skip = _of_every_row(skips.pop(), len(x))
                x, audio = layer(block, i, torch.cat([narrowed(x, norm), skip], dim=1), audio)
            if hasattr(block, "upsamplers"):
                x = self._through(partial(block.upsamplers[0], size=skips[-1].shape[2:]), x)
        return self._velocity(x, frames)

    def _through(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What a resampling layer makes of x, carried on as x is, or, where kernels read it as it comes, not."""
        return widened(layer(narrowed(x, self.conv_norm_out)), x.dtype, self.conv_norm_out)

    def _velocity(self, x: Tensor, frames: int) -> Tensor:
        norm = self.conv_norm_out
        if norm_is_kernel(x, norm):
            weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            x = kernels.group_norm(x, norm.num_groups, weight, bias, norm.eps, silu=True)
        else:
            x = F.silu(in_full(norm, x))
        x = in_full(self.conv_out, x)
        return x.unflatten(0, (-1, frames)).transpose(1, 2)
