"""The VAE of a checkpoint, frozen, for what training encodes and shows."""

from __future__ import annotations

from pathlib import Path

import torch

from memo_core.checkpoint.rename import current_vae_keys
from memo_core.checkpoint.settings import read_vae_settings
from memo_core.encoders.autoencoder import AutoencoderKL
from memo_core.nets.weights import WEIGHTS, built, read_tensors


def load_vae(checkpoint: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE in `checkpoint`/vae, with diffusers' numbers; CheckpointError where it is absent, damaged or of another
    kind.
    """
    folder = checkpoint / "vae"
    settings = read_vae_settings(folder / "config.json")
    tensors = current_vae_keys(read_tensors(folder / WEIGHTS))
    vae = built(lambda: AutoencoderKL(**settings), tensors, folder / WEIGHTS, dtype, device)
    return vae.requires_grad_(False)
