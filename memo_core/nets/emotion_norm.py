"""The emotion-adaptive layer norm (MEMO section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..release import EMOTION_LABELS
from .layers import narrowed

Modulation = tuple[Tensor, Tensor]  # shift and scale, [S, C] each: one for every batch row, or for every frame


class _LabelEmbedding(nn.Module):
    def __init__(self, dim: int, ops: Any):
        super().__init__()
        self.embedding_table = ops.Embedding(EMOTION_LABELS, dim)


class EmotionAdaNorm(nn.Module):
    """Layer norm whose shift and scale come from the emotion label (MEMO section 4.2, emotion-adaptive layer norm)."""

    adaLN_modulation: Any

    def __init__(self, dim: int, ops: Any = nn):
        super().__init__()
        self.class_embedder = _LabelEmbedding(dim, ops)
        self.adaLN_modulation = nn.ModuleList([nn.Identity(), ops.Linear(dim, 2 * dim)])

    def modulation(self, emotion: Tensor, dtype: torch.dtype) -> Modulation:
        """emotion [B] or [B * F] int labels in 0..9, or [B, 10] or [B * F, 10] floating class weights, each row summing
        to 1, which stand for the weighted mean of the labels' embeddings.
        """
        table = self.class_embedder.embedding_table
        if emotion.is_floating_point():
            # Called, not read: a host's layer brings its weight to the device in its forward.
            labels = table(torch.arange(EMOTION_LABELS, device=emotion.device))
            embedding = (emotion.float()[..., None] * labels.float()).sum(dim=1).to(dtype)
        else:
            embedding = table(emotion).to(dtype)
        return self.adaLN_modulation[1](F.silu(embedding)).chunk(2, dim=-1)

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """x [B * F, N, C], in the format of the modulation or a finer one."""
        if kernels.fuses(x):
            return kernels.modulated_norm(x, *modulation)
        return kernels.modulated_norm(narrowed(x, self.class_embedder.embedding_table), *modulation)

    def after_sum(self, x: Tensor, y: Tensor, modulation: Modulation, carried: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual sum x + y, carried in that format, and its norm."""
        if kernels.fuses(x):
            return kernels.add_norm(x, y, *modulation, 1e-5, carried, True)
        x = x + y
        return x, self(x, modulation)
