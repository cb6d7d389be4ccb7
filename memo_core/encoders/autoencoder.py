"""The VAE: pictures to latents and back (Rombach et al. 2022, arXiv 2112.10752, the one of Stable Diffusion 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import shown

_EPSILON = 1e-6
_ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "mish": nn.Mish}


class Posterior(NamedTuple):
    """What the encoder makes of pictures; of its distribution only the mean [B, latent channels, h, w] is read."""

    mean: Tensor


class Encoded(NamedTuple):
    """Result of `AutoencoderKL.encode`."""

    latent_dist: Posterior


class Decoded(NamedTuple):
    """Result of `AutoencoderKL.decode`: pictures [B, channels, H, W]."""

    sample: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Settings of a VAE under diffusers' names, with its values."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = getattr(self, name)
            if tuple(kinds) != (kind,) * len(self.block_out_channels):
                raise ValueError(
                    f"{name} = {shown(list(kinds))} is not supported, only {kind!r} for each of the "
                    f"{len(self.block_out_channels)} block_out_channels is"
                )
        if self.act_fn not in _ACTIVATIONS:
            raise ValueError(f"act_fn = {shown(self.act_fn)}; allowed are {', '.join(_ACTIVATIONS)}")


class AutoencoderKL(nn.Module):
    """The VAE, with the numbers and the state-dict names of diffusers' AutoencoderKL.

    A seed gives both the same weights, so layers are made in its order. And with as much of its interface as is used
    here, so that functions take either.

    Args:
        settings: fields of `Config`.

    Raises:
        ValueError: for a setting that is not implemented.
    """

    def __init__(self, **settings: Any):
        super().__init__()
        self.config = config = Config(**settings)
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.encoder.conv_in.weight.device

    def encode(self, pictures: Tensor, return_dict: bool = True) -> Encoded:
        """Pictures [B, channels, H, W] in [-1, 1] -> their latents, before scaling.

        Args:
            return_dict: of no effect: the result is a tuple in any case.
        """
        mean, _ = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return Encoded(Posterior(mean))

    def decode(self, latents: Tensor, return_dict: bool = True) -> Decoded:
        """Latents [B, latent channels, h, w], without scaling -> pictures.

        Args:
            return_dict: of no effect: the result is a tuple in any case.
        """
        return Decoded(self.decoder(self.post_quant_conv(latents)))


class _Encoder(nn.Module):
    """[B, channels, H, W] -> means and log variances [B, 2 * latent channels, h, w]."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(config, before, width, config.layers_per_block, downsample=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid_block = _Middle(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], _EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv_in(hidden)
        for level in self.down_blocks:
            hidden = level(hidden)
        hidden = F.silu(self.conv_norm_out(self.mid_block(hidden)))
        return self.conv_out(hidden)


class _Decoder(nn.Module):
    """[B, latent channels, h, w] -> [B, channels, H, W]."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        middle = _Middle(config)
        self.up_blocks = nn.ModuleList(
            _Level(config, before, width, config.layers_per_block + 1, upsample=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid_block = middle
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], _EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(hidden))
        for level in self.up_blocks:
            hidden = level(hidden)
        hidden = F.silu(self.conv_norm_out(hidden))
        return self.conv_out(hidden)


class _Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next one."""

    def __init__(
        self, config: Config, before: int, width: int, blocks: int, downsample: bool = False, upsample: bool = False
    ):
        super().__init__()
        self.resnets = nn.ModuleList(PictureBlock(config, width if i else before, width) for i in range(blocks))
        self.downsamplers = nn.ModuleList(_Downsample(width) for _ in range(downsample))
        self.upsamplers = nn.ModuleList(_Upsample(width) for _ in range(upsample))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            hidden = layer(hidden)
        return hidden


class _Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.block_out_channels[-1]
        before = PictureBlock(config, width, width)
        self.attentions = nn.ModuleList(PictureAttention(config, width) for _ in range(config.mid_block_add_attention))
        self.resnets = nn.ModuleList([before, PictureBlock(config, width, width)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            hidden = layer(hidden)
        return hidden


class PictureBlock(nn.Module):
    """Residual block."""

    def __init__(self, config: Config, before: int, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, before, _EPSILON)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, width, _EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = _ACTIVATIONS[config.act_fn]()
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, width, h, w]."""
        inner = hidden
        # One after the other: the largest maps of the VAE are here, and none is held any longer than needed.
        for layer in (self.norm1, self.nonlinearity, self.conv1, self.norm2, self.nonlinearity, self.conv2):
            inner = layer(inner)
        return self.conv_shortcut(hidden) + inner


class PictureAttention(nn.Module):
    """Every pixel attends to every other one, with one head."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width, _EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width, h, w] -> the same."""
        tokens = self.group_norm(hidden.flatten(2)).transpose(1, 2)
        query, key, value = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return out.transpose(1, 2).reshape(hidden.shape) + hidden


class _Downsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        if len(hidden) >= 64 or 2 * hidden.numel() > 2**31:  # torch's channels-last code fails on such (pytorch 141831)
            hidden = hidden.contiguous()
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
