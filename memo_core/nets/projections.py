"""The two small projections: a face embedding and speech features become tokens to attend to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ImageProjection(nn.Module):
    """Face embedding -> face tokens (MEMO appendix D).

    Args:
        embedding_dim: width of the face embedding (released: 512).
        token_dim: width of a token (768).
        tokens: number of tokens (4).
    """

    adapted: ClassVar[Mapping[str, str]] = {"face": r"proj"}  # as `LayerModule` declares it

    def __init__(self, embedding_dim: int = 512, token_dim: int = 768, tokens: int = 4, ops: Any = nn):
        super().__init__()
        self.tokens = tokens
        self.proj = ops.Linear(embedding_dim, tokens * token_dim)
        self.norm = ops.LayerNorm(token_dim)

    @classmethod
    def from_shapes(cls, shapes: dict[str, torch.Size], ops: Any = nn) -> ImageProjection:
        """Sizes from the shapes of a checkpoint's tensors: its config.json has none."""
        token_dim = shapes["norm.weight"][0]
        out, embedding_dim = shapes["proj.weight"]
        return cls(embedding_dim, token_dim, out // token_dim, ops)

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, embedding_dim] -> [B, tokens, token_dim]."""
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class AudioProjection(nn.Module):
    """Speech features of a frame and its neighbours -> audio tokens of that frame (MEMO appendix D).

    Args:
        input_dim: frames of context x speech encoder layers x channels (released: 5 x 12 x 768).
        hidden_dim: width of the two hidden layers (512).
        token_dim: width of a token (768).
        tokens: number of tokens per frame (32).
    """

    adapted: ClassVar[Mapping[str, str]] = {"audio": r"proj[123]"}

    def __init__(self, input_dim: int, hidden_dim: int = 512, token_dim: int = 768, tokens: int = 32, ops: Any = nn):
        super().__init__()
        self.tokens = tokens
        self.proj1 = ops.Linear(input_dim, hidden_dim)
        self.proj2 = ops.Linear(hidden_dim, hidden_dim)
        self.proj3 = ops.Linear(hidden_dim, tokens * token_dim)
        self.norm = ops.LayerNorm(token_dim)

    @classmethod
    def from_shapes(cls, shapes: dict[str, torch.Size], ops: Any = nn) -> AudioProjection:
        """Sizes from the shapes of a checkpoint's tensors: its config.json has none."""
        token_dim = shapes["norm.weight"][0]
        hidden_dim, input_dim = shapes["proj1.weight"]
        return cls(input_dim, hidden_dim, token_dim, shapes["proj3.weight"][0] // token_dim, ops)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, context, layers, channels] -> [B, F, tokens, token_dim]."""
        hidden = torch.relu(self.proj1(embeddings.flatten(2)))
        hidden = torch.relu(self.proj2(hidden))
        return self.norm(self.proj3(hidden).unflatten(-1, (self.tokens, -1)))
