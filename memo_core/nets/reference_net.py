"""Reference Net: the Stable Diffusion 1.5 UNet up to the features that the Diffusion Net reads (MEMO section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import NetConfig
from .layers import (
    Attention,
    Downsample,
    FeedForward,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    add_layer_normed,
    as_laid_out,
    group_normed,
    layer_normed,
    residual,
    to_maps,
    to_tokens,
)


class _TransformerBlock(nn.Module):
    """Self-attention, attention to the face tokens, feed-forward. The last block of the net stops at its feature."""

    def __init__(self, dim: int, config: NetConfig, final: bool, ops: Any):
        super().__init__()
        self.norm1 = ops.LayerNorm(dim)
        if not final:
            self.attn1 = Attention(dim, dim, config.heads, ops=ops)
            self.norm2 = ops.LayerNorm(dim)
            self.attn2 = Attention(dim, dim, config.heads, config.cross_attention_dim, ops=ops)
            self.norm3 = ops.LayerNorm(dim)
            self.ff = FeedForward(dim, ops)

    def forward(self, x: Tensor, face_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        feature = layer_normed(self.norm1, x)
        if not hasattr(self, "attn1"):
            return None, feature
        x, normed = add_layer_normed(self.norm2, x, self.attn1(feature), x.dtype)
        answer = self.attn2.cross(normed, self.attn2.keys_values(face_tokens))
        x, normed = add_layer_normed(self.norm3, x, answer, x.dtype)
        return residual(x, self.ff(normed), self.norm3), feature


class _Transformer(nn.Module):
    def __init__(self, dim: int, config: NetConfig, final: bool = False, ops: Any = nn):
        super().__init__()
        self.norm = ops.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = ops.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(dim, config, final, ops)])
        if not final:
            self.proj_out = ops.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, face_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """[R, C, h, w] -> the same (None for the net's last block) and the feature [R, h * w, C]."""
        hidden, feature = self.transformer_blocks[0](to_tokens(self.proj_in(group_normed(self.norm, x))), face_tokens)
        if hidden is None:
            return None, feature
        return residual(x, self.proj_out(to_maps(hidden, *x.shape[2:])), self.norm), feature


class _Block(nn.Module):
    """One resolution level: residual blocks, each with a transformer where the level has attention; resampling."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        config: NetConfig,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
        final: bool = False,
        ops: Any = nn,
    ):
        super().__init__()
        time_dim = config.block_out_channels[0] * 4
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, time_dim, config.norm_num_groups, config.norm_eps, ops) for a, b in widths
        )
        if attention:
            self.attentions = nn.ModuleList(
                _Transformer(b, config, final and i == len(widths) - 1, ops) for i, (_, b) in enumerate(widths)
            )
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(widths[-1][1], ops)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(widths[-1][1], ops)])

    def layer(self, i: int, x: Tensor, time: Tensor, face_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        x = self.resnets[i](x, self.resnets[i].shift(time))
        return self.attentions[i](x, face_tokens) if hasattr(self, "attentions") else (x, to_tokens(x))


class _MidBlock(nn.Module):
    def __init__(self, dim: int, config: NetConfig, ops: Any):
        super().__init__()
        time_dim = config.block_out_channels[0] * 4
        self.resnets = nn.ModuleList(
            ResnetBlock(dim, dim, time_dim, config.norm_num_groups, config.norm_eps, ops) for _ in range(2)
        )
        self.attentions = nn.ModuleList([_Transformer(dim, config, ops=ops)])

    def forward(self, x: Tensor, time: Tensor, face_tokens: Tensor) -> tuple[Tensor, Tensor]:
        before, after = self.resnets
        x, feature = self.attentions[0](before(x, before.shift(time)), face_tokens)
        return after(x, after.shift(time)), feature


def down_widths(config: NetConfig) -> list[list[tuple[int, int]]]:
    """(in, out) channels of each residual block on the way down, per level."""
    levels, previous = [], config.block_out_channels[0]
    for out in config.block_out_channels:
        levels.append([(previous if i == 0 else out, out) for i in range(config.layers_per_block)])
        previous = out
    return levels


def up_widths(config: NetConfig) -> list[list[tuple[int, int]]]:
    """(in, out) channels of each residual block on the way up, per level; in counts the skip connection."""
    reverse = config.block_out_channels[::-1]
    levels, previous = [], reverse[0]
    for level, out in enumerate(reverse):
        skip_below = reverse[min(level + 1, len(reverse) - 1)]
        layers = config.layers_per_block + 1
        levels.append(
            [((previous if i == 0 else out) + (skip_below if i == layers - 1 else out), out) for i in range(layers)]
        )
        previous = out
    return levels


class ReferenceNet(nn.Module):
    """Features of still pictures, for the Diffusion Net to attend to.

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
            _Block(widths, config, config.attention[i], downsample=i < last, ops=ops)
            for i, widths in enumerate(down_widths(config))
        )
        self.mid_block = _MidBlock(channels[-1], config, ops)
        self.up_blocks = nn.ModuleList(
            _Block(widths, config, config.attention[last - i], upsample=i < last, final=i == last, ops=ops)
            for i, widths in enumerate(up_widths(config))
        )

    def forward(self, latents: Tensor, face_tokens: Tensor) -> list[Tensor]:
        """Reads pictures at timestep 0.

        Args:
            latents: [R, 4, h, w], scaled VAE means, one row per picture.
            face_tokens: [R, tokens, C] from the image projection, one set per row.

        Returns:
            One feature [R, N, C] per layer in the order the Diffusion Net consumes them: down, middle, up. Where the
            layer has attention it is the hidden state normalised for self-attention, elsewhere the residual block's
            output.
        """
        time = self.time_embedding(torch.zeros(1, device=latents.device), latents.dtype)
        x = self.conv_in(as_laid_out(latents))
        skips, features = [x], []
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x, feature = block.layer(i, x, time, face_tokens)
                features.append(feature)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x, feature = self.mid_block(x, time, face_tokens)
        features.append(feature)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x, feature = block.layer(i, torch.cat([x, skips.pop()], dim=1), time, face_tokens)
                features.append(feature)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])
        return features
