"""Spatial transformer of the Diffusion Net: attends to the portrait and to the face tokens (MEMO appendix D)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .config import NetConfig
from .layers import (
    Attention,
    FeedForward,
    KeysValues,
    add_layer_normed,
    added,
    group_normed,
    into_place,
    layer_normed,
    residual,
    to_maps,
    to_tokens,
    widened,
)
from .module import TRANSFORMER, LayerModule


class SpatialConditions(NamedTuple):
    """What a layer attends to besides its own frame; the same at every step.

    reference: keys and values of the portrait, [S, K, H, N, D] for S batch rows that see it: K sets, which the frames
    see in turn. face: those of the face tokens, [B, H, tokens, D], or what `Attention.folded` makes of them.
    """

    reference: KeysValues
    face: KeysValues


class _SpatialBlock(nn.Module):
    def __init__(self, dim: int, config: NetConfig, ops: Any):
        super().__init__()
        self.norm1 = ops.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.heads, ops=ops)
        self.norm2 = ops.LayerNorm(dim)
        self.attn2 = Attention(dim, dim, config.heads, config.cross_attention_dim, ops=ops)
        self.norm3 = ops.LayerNorm(dim)
        self.ff = FeedForward(dim, ops)

    def forward(self, x: Tensor, conditions: SpatialConditions, carried: torch.dtype) -> Tensor:
        """x [R, N, C] in the layers' format, as what comes back is; between them hidden states are `carried`."""
        rows, tokens, dim = x.shape
        batch, seeing = len(conditions.face[0]), len(conditions.reference[0])
        frames = rows // batch
        blind = (batch - seeing) * frames  # rows without a reference
        normed = layer_normed(self.norm1, x)
        if blind and seeing and into_place(self.attn1.to_out[0], normed):
            attention = torch.empty_like(normed)
            self.attn1(normed[:blind], into=attention[:blind])
            self.attn1(normed[blind:], conditions.reference, into=attention[blind:])
        else:
            attended = [self.attn1(normed[:blind])] if blind else []
            if seeing:
                attended.append(self.attn1(normed[blind:], conditions.reference))
            attention = torch.cat(attended) if len(attended) > 1 else attended[0]
        x, asking = add_layer_normed(self.norm2, widened(x, carried, self.norm2), attention, carried)
        # The face tokens are a batch row's, whatever the frame: its frames' tokens ask together.
        cross = self.attn2.cross_folded if conditions.face[0].ndim == 3 else self.attn2.cross
        answer = cross(asking.view(batch, frames * tokens, dim), conditions.face).view(x.shape)
        x, normed = add_layer_normed(self.norm3, x, answer, carried)
        return added(x, self.ff(normed), self.norm3)


class SpatialTransformer(LayerModule):
    """Self-attention within a frame, extended by the reference's tokens; then cross-attention to the face tokens."""

    transformer_blocks: Any

    part = "spatial"
    begins_silent = False  # it begins as Stable Diffusion's
    adapted = TRANSFORMER | {"attention": r".+\.attn[12]\.to_(q|k|v|out\.0)"}

    def __init__(self, dim: int, config: NetConfig, ops: Any = nn):
        super().__init__()
        self.norm = ops.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = ops.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([_SpatialBlock(dim, config, ops)])
        self.proj_out = ops.Conv2d(dim, dim, 1)

    def prepare(self, conditions: Conditions, index: int) -> SpatialConditions:
        """Keys and values of the portrait's features and of the face tokens."""
        block, face_tokens = self.transformer_blocks[0], conditions.face_tokens
        reference = conditions.reference[index]
        reference = reference if reference.ndim == 4 else reference[:, None]
        sets = block.attn1.keys_values(reference.flatten(0, 1))
        key, value = (kv.unflatten(0, reference.shape[:2]) for kv in sets)
        return SpatialConditions((key, value), block.attn2.folded(face_tokens) or block.attn2.keys_values(face_tokens))

    def forward(self, x: Tensor, conditions: SpatialConditions) -> Tensor:
        """x [B * F, C, h, w]; the first of its B rows are those that see no reference."""
        hidden = to_tokens(self.proj_in(group_normed(self.norm, x)))
        hidden = self.transformer_blocks[0](hidden, conditions, x.dtype)
        return residual(x, self.proj_out(to_maps(hidden, *x.shape[2:])), self.norm)
