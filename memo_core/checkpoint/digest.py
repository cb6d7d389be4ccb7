"""Digests: what tells checkpoints apart."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import short_hash
from ..nets.reading import WEIGHTS, list_weights, read_json
from ..tensorfile import float32
from .layout import NETS, find
from .rename import current_vae_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def weights_digest(weights: Mapping[str, Tensor] | Mapping[str, NDArray[Any]]) -> str:
    """Names, shapes and 32 to 63 values of every tensor, hashed: tells checkpoints apart without reading gigabytes.

    Equal for the same values in another number format; a change that spares all the values read goes unnoticed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        shape = tuple(weights[name].shape)
        sample = weights[name].reshape(-1)[:: max(1, math.prod(shape) // 32)]
        digest.update(f"{name}{shape}".encode() + float32(sample).tobytes())
    return digest.hexdigest()


def net_digest(folder: Path, weights: Mapping[str, Tensor] | Mapping[str, NDArray[Any]]) -> str:
    """Identifies one network of a checkpoint by its weights and settings."""
    settings = read_json(folder / "config.json")  # what has no trace in the weights: heads, epsilons, scales
    told = {key: settings[key] for key in sorted(settings) if not key.startswith("_")}
    return weights_digest(weights) + json.dumps(told)


def stored_weights(path: Path) -> dict[str, Any]:
    """The weights of a file as `list_weights` gives them, or tensors where only torch can read them.

    Raises:
        CheckpointError: the file is absent, damaged, or holds anything but tensors and plain containers.
    """
    listed = list_weights(path)
    if listed is not None:
        return listed
    from ..nets.weights import read_tensors

    return read_tensors(path)


def base_digest(checkpoint: str | os.PathLike[str]) -> str:
    """`Networks.base_digest` of a checkpoint, without building its networks; CheckpointError as from `load`."""
    folder = find(checkpoint)
    return digest_of({name: stored_weights(folder / name / WEIGHTS) for name in (*NETS, "vae")}, folder)


def digest_of(weights: Mapping[str, dict[str, Any]], folder: Path) -> str:
    """`Networks.base_digest` of the weights, as stored, of the four MEMO networks and the VAE in a checkpoint's folder.

    Raises:
        CheckpointError: they, or their settings, cannot be read.
    """
    try:
        digests = [net_digest(folder / name, weights[name]) for name in NETS]
        return short_hash("".join([*digests, net_digest(folder / "vae", current_vae_keys(weights["vae"]))]))
    except (RuntimeError, TypeError) as error:  # numbers that cannot be computed with
        raise CheckpointError(f"{folder} holds weights that cannot be read: {error}") from error
