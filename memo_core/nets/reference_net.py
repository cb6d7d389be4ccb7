"""Reference Net: the Stable Diffusion 1.5 UNet up to the features that the Diffusion Net reads (MEMO appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import NetConfig
from .layers import (
    Attention,
    FeedForward,
    add_layer_normed,
    group_normed,
    layer_normed,
    residual,
    to_maps,
    to_tokens,
)
from .module import TRANSFORMER
from .unet import Level, UNet


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
    transformer_blocks: Any

    # As `LayerModule` declares them.
    recomputed: ClassVar[bool] = True
    adapted: ClassVar[Mapping[str, str]] = TRANSFORMER | {"reference": r".+\.attn[12]\.to_(q|k|v|out\.0)"}

    def __init__(self, dim: int, config: NetConfig, final: bool = False, ops: Any = nn):
        super().__init__()
        self.norm = ops.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = ops.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(dim, config, final, ops)])
        if not final:
            self.proj_out = ops.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, face_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C, h, w] -> the same (in the net's last block as it was) and the feature [R, h * w, C]."""
        hidden, feature = self.transformer_blocks[0](to_tokens(self.proj_in(group_normed(self.norm, x))), face_tokens)
        if hidden is None:
            return x, feature
        return residual(x, self.proj_out(to_maps(hidden, *x.shape[2:])), self.norm), feature


class ReferenceNet(UNet):
    """Features of still pictures, for the Diffusion Net to attend to.

    Args:
        config: sizes.
        ops: namespace of layer classes.
    """

    def __init__(self, config: NetConfig, ops: Any = nn):
        def level(place: str, resolution: int, widths: Sequence[tuple[int, int]], resample: str) -> Level:
            last = place == "up" and resolution == 0

            def beside() -> dict[str, nn.ModuleList]:
                if place == "mid":
                    return {"attentions": nn.ModuleList([_Transformer(widths[0][1], config, ops=ops)])}
                if not config.attention[resolution]:
                    return {}
                finals = [last and i == len(widths) - 1 for i in range(len(widths))]
                dims = [dim for _, dim in widths]
                modules = (_Transformer(dim, config, final, ops) for dim, final in zip(dims, finals, strict=True))
                return {"attentions": nn.ModuleList(modules)}

            return Level(widths, config, beside, resample, ops)

        super().__init__(config, level, ops)

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
        features: list[Tensor] = []

        def beside(level: Any, i: int, x: Tensor) -> Tensor:
            x, feature = level.attentions[i](x, face_tokens) if hasattr(level, "attentions") else (x, to_tokens(x))
            features.append(feature)
            return x

        shifts = self.time_shifts(torch.zeros(1, device=latents.device), latents.dtype)
        self.walk(latents, shifts, beside, self.mid_block.resnets[0].norm1)
        return features
