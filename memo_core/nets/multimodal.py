"""Multi-modal attention: frames and their audio tokens attend to each other, under an emotion (MEMO section 4.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .audio import AudioLayer
from .conditions import Conditions
from .emotion_norm import EmotionAdaNorm, Modulation
from .layers import (
    QUERY_KEY_VALUE,
    Attention,
    FeedForward,
    add_layer_normed,
    added,
    attend,
    fuse,
    group_normed,
    join_heads,
    project,
    residual,
    split_heads,
    to_maps,
    to_tokens,
    widened,
)


class EmotionModulation(NamedTuple):
    """What the emotion makes of a module's four norms; the same at every step."""

    norm1: Modulation
    audio_norm1: Modulation
    norm2: Modulation
    audio_norm2: Modulation


class AudioContext(NamedTuple):
    """Audio tokens [B * F, tokens, audio_dim] as they enter a module and after their own attention, and their
    projections for the joint one, [B * F, tokens, dim] each. At the net's first module the same at every step.
    """

    entering: Tensor
    audio: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class JointAttention(nn.Module):
    """One attention over the concatenation of frame tokens and audio tokens, with projections of their own."""

    to_out: Any

    def __init__(self, dim: int, audio_dim: int, heads: int, final: bool, ops: Any):
        super().__init__()
        self.heads = heads
        self.to_q = ops.Linear(dim, dim, bias=False)
        self.to_k = ops.Linear(dim, dim, bias=False)
        self.to_v = ops.Linear(dim, dim, bias=False)
        self.add_q_proj = ops.Linear(audio_dim, dim)
        self.add_k_proj = ops.Linear(audio_dim, dim)
        self.add_v_proj = ops.Linear(audio_dim, dim)
        self.to_out = nn.ModuleList([ops.Linear(dim, dim)])
        if not final:
            self.to_add_out = ops.Linear(dim, audio_dim)

    def fuse(self) -> None:
        """One matrix product for all that is made of the same tokens."""
        fuse(self, *QUERY_KEY_VALUE)
        fuse(self, *_ADDED)

    def of_audio(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of audio tokens [B * F, tokens, audio_dim]."""
        query, key, value = project(self, _ADDED, audio)
        return query, key, value

    def forward(self, x: Tensor, context: AudioContext) -> tuple[Tensor, Tensor | None]:
        """x [B * F, N, dim] -> what is added to the frames, and to the audio [B * F, tokens, audio_dim]."""
        own = project(self, QUERY_KEY_VALUE, x)
        query, key, value = (
            split_heads(torch.cat(pair, dim=1), self.heads) for pair in zip(own, context[2:], strict=True)
        )
        out = join_heads(attend(query, key, value))
        frames, audio = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](frames), self.to_add_out(audio) if hasattr(self, "to_add_out") else None


class _JointBlock(nn.Module):
    """Self-attention of each modality, joint attention, feed-forward. The net's last block drops the audio."""

    def __init__(self, dim: int, audio_dim: int, heads: int, final: bool, ops: Any):
        super().__init__()
        self.norm1 = EmotionAdaNorm(dim, ops)
        self.attn1 = Attention(dim, dim, heads, ops=ops)
        self.audio_norm1 = EmotionAdaNorm(audio_dim, ops)
        self.audio_attn1 = Attention(audio_dim, dim, heads, ops=ops)
        self.norm2 = EmotionAdaNorm(dim, ops)
        self.audio_norm2 = EmotionAdaNorm(audio_dim, ops)
        self.attn2 = JointAttention(dim, audio_dim, heads, final, ops)
        self.ff = FeedForward(dim, ops)
        self.norm3 = ops.LayerNorm(dim)
        if not final:
            self.audio_ff = FeedForward(audio_dim, ops)
            self.audio_norm3 = ops.LayerNorm(audio_dim)

    def modulations(self, emotion: Tensor, dtype: torch.dtype) -> EmotionModulation:
        norms = (self.norm1, self.audio_norm1, self.norm2, self.audio_norm2)
        return EmotionModulation(*(norm.modulation(emotion, dtype) for norm in norms))

    def context(self, entering: Tensor, emotion: EmotionModulation) -> AudioContext:
        audio = entering + self.audio_attn1(self.audio_norm1(entering, emotion.audio_norm1))
        normed = self.audio_norm2(audio, emotion.audio_norm2)
        return AudioContext(entering, audio, *self.attn2.of_audio(normed))

    def forward(
        self, x: Tensor, context: AudioContext, emotion: EmotionModulation, carried: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """x [B * F, N, C] in the layers' format, as what comes back is; between them hidden states are `carried`."""
        attention = self.attn1(self.norm1(x, emotion.norm1))
        x, normed = self.norm2.after_sum(widened(x, carried, self.norm3), attention, emotion.norm2, carried)
        joint, joint_audio = self.attn2(normed, context)
        x, normed = add_layer_normed(self.norm3, x, joint, carried)
        x = added(x, self.ff(normed), self.norm3)
        if joint_audio is None:
            return x, None
        audio = context.audio + joint_audio
        return x, audio + self.audio_ff(self.audio_norm3(audio))


class AudioModule(AudioLayer):
    """Multi-modal attention module at one layer of the Diffusion Net."""

    adapted = AudioLayer.adapted | {
        "audio": r".+\.(audio_)?attn[12]\.(to_(q|k|v|out\.0)|add_[qkv]_proj|to_add_out)",
    }
    outside_forward = ("prepare", "begin")
    block = _JointBlock

    def prepare(self, conditions: Conditions, index: int) -> EmotionModulation | None:
        """Shifts and scales of its norms; None without an emotion, where it is left out."""
        if conditions.emotion is None:
            return None
        return self.transformer_blocks[0].modulations(conditions.emotion, conditions.face_tokens.dtype)

    def begin(self, audio: Tensor, prepared: EmotionModulation) -> AudioContext:
        """What the net's first audio module makes of the sound [B * F, tokens, audio_dim] before it sees a frame."""
        return self.transformer_blocks[0].context(audio, prepared)

    def forward(
        self, x: Tensor, audio: Tensor | AudioContext, prepared: EmotionModulation
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            x: [B * F, C, h, w].
            audio: [B * F, tokens, audio_dim], or what `begin` made of it.
            prepared: from `prepare`.

        Returns:
            Frames and audio tokens, each with the module's contribution added.
        """
        block = self.transformer_blocks[0]
        context = audio if isinstance(audio, AudioContext) else block.context(audio, prepared)
        hidden = to_tokens(self.proj_in(group_normed(self.norm, x)))
        hidden, out_audio = block(hidden, context, prepared, x.dtype)
        x = residual(x, self.proj_out(to_maps(hidden, *x.shape[2:])), self.norm)
        return x, None if out_audio is None else context.entering + out_audio
