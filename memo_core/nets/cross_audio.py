"""Audio module whose frames attend to the audio tokens, which stay as they came (cross-attention)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .audio import AudioLayer
from .conditions import Conditions
from .emotion_norm import EmotionAdaNorm, Modulation
from .layers import (
    Attention,
    FeedForward,
    KeysValues,
    add_layer_normed,
    added,
    group_normed,
    residual,
    to_maps,
    to_tokens,
    widened,
)


class CrossAudio(NamedTuple):
    """What does not change between the steps: the emotion's part in both norms, keys and values of the sound."""

    norm1: Modulation
    norm2: Modulation
    sound: KeysValues


class _CrossBlock(nn.Module):
    """Self-attention of the frames, attention to the sound, feed-forward; the net's last block as all others."""

    def __init__(self, dim: int, audio_dim: int, heads: int, final: bool, ops: Any):
        super().__init__()
        self.norm1 = EmotionAdaNorm(dim, ops)
        self.attn1 = Attention(dim, dim, heads, ops=ops)
        self.norm2 = EmotionAdaNorm(dim, ops)
        self.attn2 = Attention(dim, dim, heads, audio_dim, ops=ops)
        self.ff = FeedForward(dim, ops)
        self.norm3 = ops.LayerNorm(dim)

    def forward(self, x: Tensor, prepared: CrossAudio, carried: Any) -> Tensor:
        """x [B * F, N, C] in the layers' format, as what comes back is; between them hidden states are `carried`."""
        attention = self.attn1(self.norm1(x, prepared.norm1))
        x, normed = self.norm2.after_sum(widened(x, carried, self.norm3), attention, prepared.norm2, carried)
        x, normed = add_layer_normed(self.norm3, x, self.attn2.cross(normed, prepared.sound), carried)
        return added(x, self.ff(normed), self.norm3)


class CrossAudioModule(AudioLayer):
    """Audio module of such blocks; every one reads the sound as it enters the net, and hands it on."""

    adapted = AudioLayer.adapted | {"audio": r".+\.attn[12]\.to_(q|k|v|out\.0)"}
    block = _CrossBlock

    def prepare(self, conditions: Conditions, index: int) -> CrossAudio | None:
        """As `CrossAudio` says; None without an emotion, where it is left out."""
        if conditions.emotion is None or conditions.audio_tokens is None:
            return None
        block, dtype = self.transformer_blocks[0], conditions.face_tokens.dtype
        first, second = (norm.modulation(conditions.emotion, dtype) for norm in (block.norm1, block.norm2))
        return CrossAudio(first, second, block.attn2.keys_values(conditions.audio_tokens.flatten(0, 1)))

    def forward(self, x: Tensor, audio: Any, prepared: CrossAudio) -> tuple[Tensor, Any]:
        """x [B * F, C, h, w]; `audio` is handed on."""
        hidden = to_tokens(self.proj_in(group_normed(self.norm, x)))
        hidden = self.transformer_blocks[0](hidden, prepared, x.dtype)
        return residual(x, self.proj_out(to_maps(hidden, *x.shape[2:])), self.norm), audio
