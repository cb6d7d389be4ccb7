"""Loads a checkpoint in the released folder layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import number, shown
from ..errors import CheckpointError
from ..files import short_hash
from ..nets.config import NetConfig, require_layers, settings_like
from ..nets.diffusion_net import DiffusionNet
from ..nets.projections import AudioProjection, ImageProjection
from ..nets.reference_net import ReferenceNet
from ..nets.weights import WEIGHTS, check_fit, load_strict, on_meta, read_json, read_tensors
from ..running import offload, precision
from ..running.options import Options, optimise
from . import lora as adapters
from .digest import net_digest
from .layout import EMOTION_HEAD, find
from .networks import Networks
from .rename import current_vae_keys

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


def load(
    checkpoint: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: Any = nn,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    options: Options | None = None,
    large_nets_wait: bool = False,
) -> Networks:
    """Loads a checkpoint in the released layout.

    Args:
        checkpoint: folder, or the name of an embedded checkpoint.
        device, dtype: where and in what precision the networks run. The speech and emotion encoders stay in fp32, as
            released.
        ops: namespace of layer classes for the MEMO networks.
        lora: adapters to merge, each a file and its strength (`lora.apply`).
        options: how the networks compute (`optimise.optimise`); None leaves them as they were saved, to be trained,
            changed or saved again.
        large_nets_wait: on a device with memory of its own the Reference Net and the Diffusion Net stay in host memory
            until something is sampled (`offload.enter` brings them).

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen, or a setting is not supported; an adapter
            cannot be read or does not fit; an option does not fit the device or the layer classes.
    """
    from diffusers import AutoencoderKL

    from ..encoders.emotion2vec import Emotion2Vec
    from ..encoders.emotion_head import EmotionHead
    from ..encoders.speech import SpeechEncoder

    device, dtype = _check_place(device, dtype)
    if options is not None and not isinstance(options, Options):
        raise CheckpointError(f"options must be None or an Options, received {shown(options)}")
    for pair in lora:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or number(pair[1]) is None:
            raise CheckpointError(f"an adapter is given as a file and a finite strength, received {shown(pair)}")
    folder = find(checkpoint)
    wanted = [(adapters.read(file), strength) for file, strength in lora]  # before the networks, which take long
    digests: list[str] = []

    def net(
        name: str,
        build: Callable[[dict[str, Tensor]], nn.Module],
        layers: int = 0,
        rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    ) -> Any:
        path = folder / name / WEIGHTS
        weights = rename(read_tensors(path))
        require_layers(layers, len(weights), folder / name / "config.json")
        module = on_meta(lambda: build(weights), path)
        check_fit(module, weights, path)
        # The two large nets come to a device when they are to sample: what listens and looks before has more room.
        waits = large_nets_wait and name in ("reference_net", "diffusion_net") and device.type not in ("cpu", "meta")
        where = torch.device("cpu") if waits else device
        placed = {key: tensor.to(where, precision.of_weight(name, key, dtype)) for key, tensor in weights.items()}
        load_strict(module, placed, path)
        digests.append(net_digest(folder / name, weights))
        return module.eval().requires_grad_(False)

    def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in weights.items()}

    # All that takes no time before what does.
    sample_size = _sample_size(folder / "diffusion_net" / "config.json")
    vae_settings = _vae_settings(folder / "vae" / "config.json")
    reference_config, diffusion_config = (_net_config(folder / name) for name in ("reference_net", "diffusion_net"))
    reference_net = net("reference_net", lambda _: ReferenceNet(reference_config, ops), reference_config.layers(False))
    diffusion_net = net("diffusion_net", lambda _: DiffusionNet(diffusion_config, ops), diffusion_config.layers(True))
    image_proj = net("image_proj", lambda weights: ImageProjection.from_shapes(shapes(weights), ops))
    audio_proj = net("audio_proj", lambda weights: AudioProjection.from_shapes(shapes(weights), ops))
    vae_layers = 2 * len(vae_settings["block_out_channels"]) * vae_settings["layers_per_block"]
    vae = net("vae", lambda _: AutoencoderKL(**vae_settings), vae_layers, current_vae_keys)

    speech_encoder = SpeechEncoder.from_pretrained(folder / "wav2vec2", dtype=torch.float32, device=device)
    emotion_encoder = Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device)
    emotion_head = EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device)
    nets = Networks(
        reference_net=reference_net,
        diffusion_net=diffusion_net,
        image_proj=image_proj,
        audio_proj=audio_proj,
        vae=vae,
        speech_encoder=speech_encoder,
        emotion_encoder=emotion_encoder,
        emotion_head=emotion_head,
        folder=folder,
        device=torch.device(device),
        base_digest=short_hash("".join(digests)),
        sample_size=sample_size,
    )
    for adapter, strength in wanted:
        adapters.apply(nets, adapter, strength)
    if options is not None:
        optimise(nets, options)
    if large_nets_wait and device.type not in ("cpu", "meta"):
        for large in (reference_net, diffusion_net):
            offload.wait(large)
    return nets


def _check_place(device: torch.device | str, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"device must be a device of torch's, received {shown(device)}: {error}") from error
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if dtype not in floats:
        raise CheckpointError(f"dtype must be one of {', '.join(map(str, floats))}, received {shown(dtype)}")
    return place, dtype


def _net_config(folder: Path) -> NetConfig:
    path = folder / "config.json"
    settings = read_json(path)
    try:
        config = NetConfig.from_json(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    if (config.in_channels, config.out_channels) != (4, 4):
        raise CheckpointError(f"{path}: latents have 4 channels, not {config.in_channels} and {config.out_channels}")
    return config


def _sample_size(path: Path) -> int:
    settings = {name: value for name, value in read_json(path).items() if value}  # none, or none worth the name
    return settings_like(settings, {"sample_size": 64}, path)["sample_size"]


def _vae_settings(path: Path) -> dict[str, Any]:
    settings = settings_like(read_json(path), _VAE_SETTINGS, path)
    channels = [settings[name] for name in ("in_channels", "latent_channels", "out_channels")]
    if channels != [3, 4, 3]:
        raise CheckpointError(f"{path}: pictures have 3 channels and latents 4, received {channels}")
    if not settings["scaling_factor"]:
        raise CheckpointError(f"{path}: scaling_factor must be above 0, received 0")
    return settings
