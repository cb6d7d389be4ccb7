"""Networks that differ from MEMO's in one thing, for the toon bench. The parameters, and their names, stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memo_core import kernels
from memo_core.nets.layers import add_layer_normed, added, attend, join_heads, split_heads, widened
from memo_core.nets.memory_module import Memory, MemoryAttention
from memo_core.nets.multimodal import Feeling, Heard, JointAttention, _JointBlock
from memo_core.release import WINDOW


class LastFramesAttention(MemoryAttention):
    """Memory-guided attention that remembers the last few frames before the window and nothing else."""

    remembered: int

    def sums(self, past: Tensor, frames: int, rows: Tensor | None = None, into: None = None) -> Memory:
        past = past if rows is None else past[rows]
        key, value = (self._split(to(past), frames)[:, -self.remembered :] for to in (self.to_k, self.to_v))
        return kernels.memory_sums(key, value)


class PastSelfAttention(MemoryAttention):
    """Softmax attention over the 16 past frames and the window's own, instead of linear attention with a memory.

    What it carries as memory is not sums but keys and values: [B, N, H, 16, 2 * D], and [B, N, H, 1] that is 0 where
    there is no past.
    """

    def sums(self, past: Tensor, frames: int, rows: Tensor | None = None, into: None = None) -> Memory:
        past = past if rows is None else past[rows]
        key, value = (self._split(to(past), frames).permute(0, 2, 3, 1, 4) for to in (self.to_k, self.to_v))
        return torch.cat([key, value], dim=-1), key.new_ones(key.shape[:3] + (1,))

    def forward(self, x: Tensor, memory: Memory | None, frames: int) -> Tensor:
        query, key, value = (
            self._split(to(x), frames).permute(0, 2, 3, 1, 4) for to in (self.to_q, self.to_k, self.to_v)
        )
        mask = None
        if memory is not None:
            past, there = memory
            past_key, past_value = past.to(key.dtype).chunk(2, dim=-1)
            key, value = torch.cat([past_key, key], dim=-2), torch.cat([past_value, value], dim=-2)
            seen = torch.cat(
                [
                    (there > 0).expand(*there.shape[:3], WINDOW),
                    there.new_ones(1).bool().expand(*there.shape[:3], frames),
                ],
                dim=-1,
            )
            mask = seen[..., None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out[0](out.permute(0, 3, 1, 2, 4).reshape(x.shape))


class CrossAttentionBlock(_JointBlock):
    """Frames attend to the audio tokens, which stay as they are, instead of both attending to both."""

    def listen(self, entering: Tensor, feeling: Feeling) -> Heard:
        tokens = self.audio_norm2(entering, feeling.audio_norm2)
        return Heard(entering, entering, tokens, self.attn2.add_k_proj(tokens), self.attn2.add_v_proj(tokens))

    def forward(self, x: Tensor, heard: Heard, feeling: Feeling, carried: torch.dtype) -> tuple[Tensor, Tensor]:
        own = self.attn1(self.norm1(x, feeling.norm1))
        x, normed = self.norm2.after_sum(widened(x, carried, self.norm3), own, feeling.norm2, carried)
        attention: JointAttention = self.attn2
        query = split_heads(attention.to_q(normed), attention.heads)
        key, value = (split_heads(projected, attention.heads) for projected in (heard.key, heard.value))
        answer = attention.to_out[0](join_heads(attend(query, key, value)))
        x, normed = add_layer_normed(self.norm3, x, answer, carried)
        return added(x, self.ff(normed), self.norm3), torch.zeros_like(heard.entering)


def remember(frames: int) -> Callable[[nn.Module], None]:
    """Makes every memory layer remember so many frames of the window before."""

    def change(net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, MemoryAttention):
                module.__class__, module.remembered = LastFramesAttention, frames

    return change


def attend_to_past(net: nn.Module) -> None:
    """Makes every memory layer a softmax attention over 16 past frames and the window."""
    for module in net.modules():
        if isinstance(module, MemoryAttention):
            module.__class__ = PastSelfAttention


def cross_attend(net: nn.Module) -> None:
    """Makes multi-modal attention a cross-attention to the audio tokens."""
    for module in net.modules():
        if isinstance(module, _JointBlock):
            module.__class__ = CrossAttentionBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the bench; it differs in one thing from the row `against`.

    change: what is done to the Diffusion Net. horizon: windows that the memory reaches back (None: all).
    past_windows: of the last stage of training. emotion: "detected" per window, "static" (the label most heard, for the
    whole video) or "none". weights: the variant whose weights it samples with, where it needs none of its own.
    """

    name: str
    what: str
    against: str = ""
    change: Callable[[nn.Module], None] = lambda net: None
    horizon: int | None = None
    past_windows: tuple[int, ...] = (1,)
    emotion: str = "detected"
    weights: str = ""


VARIANTS = (
    Variant(name="memo", what="MEMO: memory of all past, dynamic past frames", past_windows=(1, 2, 3)),
    Variant(name="fixed-past", what="memory of all past, always 16 past frames in training", against="memo"),
    Variant(name="last-2", what="last 2 frames", change=remember(2), horizon=1, against="fixed-past"),
    Variant(name="last-4", what="last 4 frames", change=remember(4), horizon=1, against="fixed-past"),
    Variant(
        name="self-16", what="16 past frames, self-attention", change=attend_to_past, horizon=1, against="fixed-past"
    ),
    Variant(name="cross", what="audio by cross-attention", change=cross_attend, past_windows=(1, 2, 3), against="memo"),
    Variant(name="static", what="one emotion for the whole video", emotion="static", weights="memo", against="memo"),
    Variant(name="none", what="no emotion", emotion="none", weights="memo", against="memo"),
)
