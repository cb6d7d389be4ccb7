"""What is measured: networks with random weights at several sizes, and the inputs of a clip, without any files."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, Reference
from memo_core.checkpoint.load import load
from memo_core.checkpoint.networks import Networks
from memo_core.encoders.autoencoder import AutoencoderKL
from memo_core.nets.config import NetConfig
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.projections import AudioProjection, ImageProjection
from memo_core.nets.reference_net import ReferenceNet
from memo_core.release import WINDOW
from memo_core.running import precision
from memo_core.sampling.job import Job

FPS = 30
SPEECH = (5, 12, 768)  # frames of context, layers and channels that the released audio projection reads


def tiny(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Networks:
    """As small as the layout allows with every kind of layer: for what does not depend on the networks."""
    both = dict(block_out_channels=(16, 16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4)
    both |= dict(attention=(False, True, False), heads=2)
    both |= dict(memory=(False, True, True), memory_heads=2, memory_layers_per_block=1)
    return random_networks(NetConfig(**both, audio_attention_dim=16), (8, 8, 8, 8), 1, 4, (5, 2, 16), device, dtype)


def mid_size(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Networks:
    """The released levels at a fifth of the width, one layer less in each: head widths 8, 16 and 32."""
    config = NetConfig(
        block_out_channels=(64, 128, 256, 256), layers_per_block=1, cross_attention_dim=256, audio_attention_dim=256
    )
    return random_networks(config, (16, 32, 64, 64), 2, 8, SPEECH, device, dtype)


def full_size(device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Networks:
    """The released sizes, as the defaults of NetConfig and of Stable Diffusion's VAE have them."""
    return random_networks(NetConfig(), (128, 256, 512, 512), 2, 32, SPEECH, device, dtype)


def random_networks(
    config: NetConfig,
    vae_widths: tuple[int, ...],
    vae_layers: int,
    vae_groups: int,
    speech: tuple[int, int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
) -> Networks:
    """Networks with torch's own random initialisation, drawn on `device`, without speech and emotion encoders.

    Its weights are smaller than those of a trained net: between the norms activations shrink, so that they stay finite
    in every number format.

    Args:
        config: of both nets.
        vae_widths, vae_layers, vae_groups: channels per level, residual blocks per level, groups of its norms.
        speech: frames of context, layers and channels of the speech features.
    """
    state, default, levels = torch.get_rng_state(), torch.get_default_dtype(), len(vae_widths)
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)  # drawn as they will be: in float32 first they would take twice the memory
    try:
        with torch.device(device):
            modules = dict(
                reference_net=ReferenceNet(config),
                diffusion_net=DiffusionNet(config),
                image_proj=ImageProjection(512, config.cross_attention_dim, 4),
                audio_proj=AudioProjection(math.prod(speech), token_dim=config.audio_attention_dim, tokens=32),
                vae=AutoencoderKL(
                    down_block_types=("DownEncoderBlock2D",) * levels,
                    up_block_types=("UpDecoderBlock2D",) * levels,
                    block_out_channels=vae_widths,
                    layers_per_block=vae_layers,
                    latent_channels=4,
                    norm_num_groups=vae_groups,
                    scaling_factor=0.18215,
                ),
            )
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(state)
    precision.set_weights("vae", modules["vae"], dtype)
    return Networks(
        **{name: module.eval().requires_grad_(False) for name, module in modules.items()},
        speech_encoder=None,  # type: ignore[arg-type]
        emotion_encoder=None,  # type: ignore[arg-type]
        emotion_head=None,  # type: ignore[arg-type]
        folder=Path("random"),
        device=torch.device(device),
        base_digest=f"random-{seed}",
        sample_size=64,
    )


def toon(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Networks:
    """The trained checkpoint that ships with the program."""
    return load("toon", device, dtype)


def portrait(nets: Networks, size: int, seed: int = 1) -> Reference:
    """A smooth random picture of `size` x `size` pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-2, 2)[0] / 2
    embedding = torch.nn.functional.normalize(torch.randn(1, 512, generator=generator), dim=1)
    return MemoPipeline(nets).encode_reference(pixels, embedding)


def voice(nets: Networks, windows: int, seed: int = 2) -> tuple[AudioTrack, EmotionTrack]:
    """Random speech features and one emotion for so many windows."""
    features, frames = nets.audio_proj.proj1.in_features, windows * WINDOW
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(frames, SPEECH[0], features // SPEECH[0], 1, generator=generator)
    return AudioTrack(embeddings, frames, FPS, None), EmotionTrack.constant("happy", frames)


def clip(pipe: MemoPipeline, size: int, windows: int, **settings: object) -> Job:
    """A job of whole windows at `size` x `size` pixels."""
    return pipe.job(portrait(pipe.nets, size), *voice(pipe.nets, windows), **settings)
