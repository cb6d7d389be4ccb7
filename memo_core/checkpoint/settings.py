"""Settings of a checkpoint's networks, from their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..nets.config import NetConfig, settings_like
from ..nets.reading import read_json

# What the VAE's pictures depend on, with the values of diffusers' AutoencoderKL.
_VAE_SETTINGS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def read_net_config(folder: Path) -> NetConfig:
    """Sizes of the Reference Net or the Diffusion Net in a folder; CheckpointError for any that this code has not."""
    path = folder / "config.json"
    settings = read_json(path)
    try:
        config = NetConfig.from_json(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    if (config.in_channels, config.out_channels) != (4, 4):
        raise CheckpointError(f"{path}: latents have 4 channels, not {config.in_channels} and {config.out_channels}")
    return config


def read_sample_size(path: Path) -> int:
    """Latent height and width of training, from the Diffusion Net's config.json."""
    settings = {name: value for name, value in read_json(path).items() if value}  # none, or none worth the name
    return settings_like(settings, {"sample_size": 64}, path)["sample_size"]


def read_vae_settings(path: Path) -> dict[str, Any]:
    """What `AutoencoderKL` is built from, of a VAE's config.json; CheckpointError for pictures or latents of another
    kind.
    """
    settings = settings_like(read_json(path), _VAE_SETTINGS, path)
    channels = [settings[name] for name in ("in_channels", "latent_channels", "out_channels")]
    if channels != [3, 4, 3]:
        raise CheckpointError(f"{path}: pictures have 3 channels and latents 4, received {channels}")
    if not settings["scaling_factor"]:
        raise CheckpointError(f"{path}: scaling_factor must be above 0, received 0")
    return settings
