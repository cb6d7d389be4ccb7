"""Spatial transformer of the Diffusion Net: attends to the portrait and to the face tokens (MEMO section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import NetConfig
from .layers import Attention, FeedForward, to_maps, to_tokens


class _SpatialBlock(nn.Module):
    def __init__(self, dim: int, config: NetConfig, ops: Any):
        super().__init__()
        self.norm1 = ops.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.heads, ops=ops)
        self.norm2 = ops.LayerNorm(dim)
        self.attn2 = Attention(dim, dim, config.heads, config.cross_attention_dim, ops=ops)
        self.norm3 = ops.LayerNorm(dim)
        self.ff = FeedForward(dim, ops)

    def forward(self, x: Tensor, face_tokens: Tensor, reference: Tensor, unconditional_rows: int) -> Tensor:
        normed = self.norm1(x)
        split = unconditional_rows
        attended = []
        if split:
            attended.append(self.attn1(normed[:split]))
        if split < len(x):
            attended.append(self.attn1(normed[split:], torch.cat([normed[split:], reference], dim=1)))
        x = x + torch.cat(attended)
        x = x + self.attn2(self.norm2(x), face_tokens)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Self-attention within a frame, extended by the reference's tokens; then cross-attention to the face tokens."""

    def __init__(self, dim: int, config: NetConfig, ops: Any = nn):
        super().__init__()
        self.norm = ops.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = ops.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([_SpatialBlock(dim, config, ops)])
        self.proj_out = ops.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, face_tokens: Tensor, reference: Tensor, unconditional_rows: int) -> Tensor:
        """
        Args:
            x: [B * F, C, h, w].
            face_tokens: [B * F, tokens, cross_attention_dim].
            reference: [B * F - unconditional_rows, N, C] Reference Net features of the portrait, one set per frame.
            unconditional_rows: the first rows of x, which do not see the reference (classifier-free guidance).

        Returns:
            [B * F, C, h, w].
        """
        hidden = to_tokens(self.proj_in(self.norm(x)))
        hidden = self.transformer_blocks[0](hidden, face_tokens, reference, unconditional_rows)
        return x + self.proj_out(to_maps(hidden, *x.shape[2:]))
