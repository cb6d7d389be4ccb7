"""Diffusion Net: the denoising video UNet of MEMO (section 3); the memory goes in and out, never stays inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio_module import AudioModule
from .config import NetConfig
from .layers import Downsample, ResnetBlock, TimestepEmbedding, Upsample
from .memory_module import Memory, MemoryModule
from .reference_net import down_widths, up_widths
from .spatial import SpatialTransformer


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

    def layer(self, i: int, x: Tensor, audio: Tensor | None, context: _Context) -> tuple[Tensor, Tensor | None]:
        x = self.resnets[i](x, context.time)
        return context.attend(self, i, x, audio)


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


class _Context:
    """What every layer of one forward pass reads: embeddings, tokens, and the layer's share of reference and memory."""

    def __init__(
        self,
        time: Tensor,
        face_tokens: Tensor,
        emotion: Tensor | None,
        reference: list[Tensor],
        memory: list[Memory] | None,
        frames: int,
        unconditional_rows: int,
    ):
        self.time, self.face_tokens, self.emotion = time, face_tokens, emotion
        self.spatial_only = emotion is None
        self.frames, self.unconditional_rows = frames, unconditional_rows
        self._reference = iter(reference)
        self._memory = None if memory is None else iter(memory)

    def attend(self, block: _Block, i: int, x: Tensor, audio: Tensor | None) -> tuple[Tensor, Tensor | None]:
        reference = next(self._reference)
        if hasattr(block, "attentions"):
            x = block.attentions[i](x, self.face_tokens, reference, self.unconditional_rows)
        if self.spatial_only:
            return x, None
        if hasattr(block, "attentions"):
            x, audio = block.audio_modules[i](x, audio, self.emotion)
        module = block.memory_module(i)
        if module is not None:
            memory = None if self._memory is None else [next(self._memory) for _ in range(module.num_memory_layers)]
            x = module(x, memory, self.frames)
        return x, audio


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

    def memory_sums(self, past: list[Tensor], height: int, width: int, frames: int) -> Iterator[Memory]:
        """What a window of past frames adds to the memory, one memory layer after the other in execution order.

        Args:
            past: Reference Net features of the past frames, [B * F, N, C] per layer, frames oldest first.
            height, width: latent size; level i of the net works at ceil(size / 2^i).
            frames: F.

        Yields:
            (kv [B, N, H, D, D], z [B, N, H, D]) per memory layer. Memory of several windows is the sum of theirs, each
            decayed by 0.9^frames per later window (`memory.MemoryState` keeps the weights).
        """
        for (block, i, level), feature in zip(self.layers(), past):
            module = block.memory_module(i)
            if module is not None:
                h, w = -(-height // 2**level), -(-width // 2**level)
                yield from module.sums(feature, h, w, frames)

    def memory_numbers(self, height: int, width: int) -> int:
        """How many numbers `memory_sums` gives per batch row at this latent size."""
        total = 0
        for block, i, level in self.layers():
            module = block.memory_module(i)
            if module is not None:
                dim, heads = module.width, self.config.memory_heads
                tokens = -(-height // 2**level) * -(-width // 2**level)
                total += module.num_memory_layers * tokens * dim * (dim // heads + 1)
        return total

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        reference: list[Tensor],
        memory: list[Memory] | None,
        face_tokens: Tensor,
        audio_tokens: Tensor | None,
        emotion: Tensor | None,
        unconditional: int = 0,
    ) -> Tensor:
        """
        Args:
            latents: [B, 4, F, h, w] noisy latents.
            timestep: [B] or [1], or [B * F] for one per frame, 0 (clean) to 1000 (noise).
            reference: Reference Net features of the portrait per layer: [B - unconditional, N, C], or
                [(B - unconditional) * F, N, C] for one per frame.
            memory: as `memory_sums` gives them, or None for a window without a past.
            face_tokens: [B, tokens, cross_attention_dim].
            audio_tokens: [B, F, tokens, audio_attention_dim].
            emotion: int labels 0..9, [B] for one per window or [B * F] for one per frame, or floating class weights
                [B, 10] or [B * F, 10], rows summing to 1. None, with audio_tokens None, leaves out multi-modal
                attention and memory: each frame by itself, as the first stage of training has it.
            unconditional: the first rows of the batch do not see the reference.

        Returns:
            Velocity [B, 4, F, h, w].
        """
        batch, _, frames, height, width = latents.shape
        rows = (batch - unconditional) * frames
        time = self.time_embedding(timestep, latents.dtype)
        context = _Context(
            time=time,
            face_tokens=face_tokens.repeat_interleave(frames, dim=0),
            emotion=emotion,
            reference=[
                feature if len(feature) == rows else feature.repeat_interleave(rows // max(len(feature), 1), dim=0)
                for feature in reference
            ],
            memory=memory,
            frames=frames,
            unconditional_rows=unconditional * frames,
        )
        audio = None if audio_tokens is None else audio_tokens.flatten(0, 1)
        x = self.conv_in(latents.transpose(1, 2).flatten(0, 1))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x, audio = block.layer(i, x, audio, context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x, audio = self.mid_block.layer(0, x, audio, context)
        x = self.mid_block.resnets[1](x, time)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x, audio = block.layer(i, torch.cat([x, skips.pop()], dim=1), audio, context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (batch, frames)).transpose(1, 2)
