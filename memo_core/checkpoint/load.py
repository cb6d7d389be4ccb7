"""Loads a checkpoint in the released folder layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import number, shown
from ..errors import CheckpointError
from ..files import short_hash
from ..nets.config import require_layers
from ..nets.diffusion_net import DiffusionNet
from ..nets.projections import AudioProjection, ImageProjection
from ..nets.reference_net import ReferenceNet
from ..nets.weights import WEIGHTS, check_fit, load_strict, on_meta, read_tensors
from ..running import offload, precision
from ..running.options import Options, optimise
from . import lora as adapters
from .digest import net_digest
from .layout import EMOTION_HEAD, find
from .networks import Networks
from .rename import current_vae_keys
from .settings import read_net_config, read_sample_size, read_vae_settings


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
        options: how the networks compute (`running.options.optimise`); None leaves them as they were saved, to be
            trained, changed or saved again.
        large_nets_wait: on a device with memory of its own the Reference Net and the Diffusion Net stay in host memory
            until something is sampled (`offload.to_device` brings them).

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen, or a setting is not supported; an adapter
            cannot be read or does not fit; an option does not fit the device or the layer classes.
    """
    from ..encoders.autoencoder import AutoencoderKL
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
    sample_size = read_sample_size(folder / "diffusion_net" / "config.json")
    vae_settings = read_vae_settings(folder / "vae" / "config.json")
    reference_config, diffusion_config = (read_net_config(folder / name) for name in ("reference_net", "diffusion_net"))
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
            offload.start_on_host(large)
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
