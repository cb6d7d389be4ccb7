"""Image quality of a clip's first picture, by HyperIQA (Su et al. 2020, CVPR)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from .. import media
from .rows import Row
from .settings import HYPERIQA, Settings, find_model

Scorer = Callable[[NDArray[np.uint8]], float]
"""uint8 [H, W, 3] RGB -> quality, 0 (bad) to 100. `--scorer module:function` names what makes one from (models folder,
device); `hyperiqa` below is the usual."""


def assess(row: Row, settings: Settings, scorer: Scorer | None = None) -> list[Row]:
    """The clip with the quality of its first picture, cut out and at the training size."""
    path = Path(settings.raw, row.source)
    pictures = media.at_rate(path, row.start, row.start + 1 / settings.fps, settings.fps, settings.max_pixels)
    picture = media.cut(next(pictures), row.box, settings.size)
    scorer = scorer or _scorer(settings.scorer, settings.models, settings.device)
    return [replace(row, quality=round(float(scorer(picture)), 3))]


@lru_cache(maxsize=1)
def _scorer(name: str, models: str, device: str) -> Scorer:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)(Path(models), device)


def hyperiqa(models: Path, device: str = "cpu") -> Scorer:
    """pyiqa's HyperIQA with the weights file in the models folder. Nothing is downloaded.

    Raises CheckpointError if the file is absent, damaged, or does not fit.
    """
    import timm
    import torch
    from pyiqa.archs.hypernet_arch import HyperNet

    from memo_core.errors import CheckpointError
    from memo_core.nets.weights import load_strict, read_tensors

    path = find_model(models, HYPERIQA)
    tensors = read_tensors(path)
    tensors = tensors.get("params", tensors)
    # HyperNet asks for ImageNet weights, which would be fetched only to be overwritten.
    create = timm.create_model
    with patch.object(timm, "create_model", lambda *a, **k: create(*a, **{**k, "pretrained": False})):
        network = HyperNet(pretrained=False)
    load_strict(network, {name.removeprefix("module."): value for name, value in tensors.items()}, path)
    network = network.to(device).eval()

    @torch.inference_mode()
    def score(picture: NDArray[np.uint8]) -> float:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float().div(255).to(device)
        value = float(network(pixels))  # trained on KonIQ-10k's opinions, 0 to 1
        if not np.isfinite(value):
            raise CheckpointError(f"{path} gives {value} for a picture; download it again")
        return 100 * value

    return score
