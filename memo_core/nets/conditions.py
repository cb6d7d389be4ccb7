"""Conditions: what a window is denoised under, as a tree of named tensors, batch axis first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Tree = TypeVar("Tree")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """All that the Diffusion Net's layers read besides frames, time and memory.

    The first rows of the batch may be those that do without (guidance's unconditional ones): they see no reference.

    Attributes:
        reference: Reference Net features of the portrait per layer, [S, N, C], or [S, K, N, C] for K sets that the
            frames see in turn, for the last S of the batch's B rows.
        face_tokens: [B, tokens, cross_attention_dim].
        audio_tokens: [B, F, tokens, audio_attention_dim].
        emotion: int labels 0..9, [B] for one per window or [B * F] for one per frame, or floating class weights
            [B, 10] or [B * F, 10], rows summing to 1. None, with audio_tokens None, leaves out audio and temporal
            modules: each frame by itself, as the first stage of training has it.
        frames: F.
    """

    reference: list[Tensor]
    face_tokens: Tensor
    audio_tokens: Tensor | None
    emotion: Tensor | None
    frames: int


class LayerInputs(NamedTuple):
    """What the modules of one layer prepared for themselves, once a window; None where there is no such module."""

    spatial: Any
    audio: Any


class Prepared(NamedTuple):
    """Everything that `DiffusionNet.prepare` computes of a window's conditions; no step changes it.

    Attributes:
        layers: in execution order.
        audio: what the first audio module makes of the sound; None without sound.
        frames: F.
        batch: B.
    """

    layers: list[LayerInputs]
    audio: Any
    frames: int
    batch: int

    def guidance_row(self, number: int) -> Prepared:
        """Those of the batch's first half (0), which does without the reference, or of its second (1); views."""
        layers, audio = _half((self.layers, self.audio), number, self.batch)
        return Prepared(layers, audio, self.frames, self.batch // 2)


def _half(tree: Any, number: int, batch: int) -> Any:
    if isinstance(tree, Tensor):
        if len(tree) < batch:  # of the rows that see it alone, which are the last
            return tree if number else tree[:0]
        return tree.chunk(2)[number]
    if isinstance(tree, list):
        return [_half(part, number, batch) for part in tree]
    if isinstance(tree, tuple):
        parts = [_half(part, number, batch) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree
