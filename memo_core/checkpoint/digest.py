"""Digests: what tells checkpoints apart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files import short_hash
from ..nets.weights import WEIGHTS, read_json, read_tensors
from .layout import NETS, find
from .rename import current_vae_keys


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Names, shapes and 32 to 63 values of every tensor, hashed: tells checkpoints apart without reading gigabytes.

    Equal for the same values in another number format; a change that spares all the values read goes unnoticed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].flatten()
        sample = flat[:: max(1, flat.numel() // 32)].float()
        digest.update(f"{name}{tuple(weights[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def net_digest(folder: Path, weights: dict[str, Tensor]) -> str:
    settings = read_json(folder / "config.json")  # what has no trace in the weights: heads, epsilons, scales
    told = {key: settings[key] for key in sorted(settings) if not key.startswith("_")}
    return weights_digest(weights) + json.dumps(told)


def base_digest(checkpoint: str | os.PathLike[str]) -> str:
    """`Networks.base_digest` of a checkpoint, without building its networks; CheckpointError as from `load`."""
    folder = find(checkpoint)
    try:
        digests = [net_digest(folder / name, read_tensors(folder / name / WEIGHTS)) for name in NETS]
        vae = current_vae_keys(read_tensors(folder / "vae" / WEIGHTS))
        return short_hash("".join([*digests, net_digest(folder / "vae", vae)]))
    except (RuntimeError, TypeError) as error:  # numbers that torch cannot compute with
        raise CheckpointError(f"{folder} holds weights that cannot be read: {error}") from error
