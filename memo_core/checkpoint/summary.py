"""What a checkpoint's files say of it, without torch and without building its networks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encoders.files import (
    emotion_settings,
    emotion_weights,
    find_speech,
    head_sizes,
    read_emotion_config,
    speech_weights,
)
from ..errors import CheckpointError
from ..nets.config import require_layers
from ..nets.reading import WEIGHTS
from .digest import digest_of, stored_weights
from .layout import EMOTION_HEAD, NETS, find
from .settings import read_net_config, read_sample_size, read_vae_settings


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint in short.

    Attributes:
        folder: where it lies.
        digest: `Networks.digest`.
        sample_size: latent height and width of training.
        parameters: how many each network has, by its folder.
    """

    folder: Path
    digest: str
    sample_size: int
    parameters: Mapping[str, int]


def summarise(checkpoint: str | os.PathLike[str]) -> Summary:
    """Reads settings, and of weights their names and shapes.

    What it says of weights is true of the files; whether all of them fit the networks shows when these are built.

    Raises:
        CheckpointError: files are missing or damaged, a setting is not supported, or there are fewer weights than the
            settings announce.
    """
    folder = find(checkpoint)
    sample_size = read_sample_size(folder / "diffusion_net" / "config.json")
    vae = read_vae_settings(folder / "vae" / "config.json")
    layers = {
        "reference_net": read_net_config(folder / "reference_net").layers(False),
        "diffusion_net": read_net_config(folder / "diffusion_net").layers(True),
        "vae": 2 * len(vae["block_out_channels"]) * vae["layers_per_block"],
    }
    weights = {name: stored_weights(folder / name / WEIGHTS) for name in (*NETS, "vae")}
    for name, announced in layers.items():
        require_layers(announced, len(weights[name]), folder / name / "config.json")
    digest = digest_of(weights, folder)
    weights |= _listeners(folder)
    for name, tensors in weights.items():
        _check_named(tensors, folder / name)
    return Summary(
        folder=folder,
        digest=digest,
        sample_size=sample_size,
        parameters={name: sum(math.prod(w.shape) for w in tensors.values()) for name, tensors in weights.items()},
    )


def _listeners(folder: Path) -> dict[str, dict[str, Any]]:
    """The weights of the speech encoder, the emotion encoder and the emotion head that are used."""
    speech = find_speech(folder / "wav2vec2")
    heard = speech_weights(stored_weights(speech.weights))
    require_layers(speech.settings["num_hidden_layers"], len(heard), folder / "wav2vec2" / "config.json")
    config = read_emotion_config(folder / "emotion2vec" / "config.yaml")
    emotion_settings(config)
    felt = emotion_weights(stored_weights(folder / "emotion2vec" / "model.pt"), config)
    path = folder / EMOTION_HEAD / WEIGHTS
    head = stored_weights(path)
    head_sizes({name: value.shape for name, value in head.items()}, path)
    return {"wav2vec2": heard, "emotion2vec": felt, EMOTION_HEAD: head}


def _check_named(tensors: Mapping[str, Any], source: Path) -> None:
    others = [name for name, value in tensors.items() if not hasattr(value, "shape")]
    if others or not tensors:
        raise CheckpointError(f"{source} holds {', '.join(others[:10]) or 'nothing'} in place of tensors by name")
