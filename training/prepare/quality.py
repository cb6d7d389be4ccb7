"""Image quality of a clip's first picture, by HyperIQA (Su et al. 2020, CVPR)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from .. import media
from .clip import read
from .rows import Row
from .settings import HYPERIQA, Settings, find_model

Scorer = Callable[[NDArray[np.uint8]], float]
"""uint8 [H, W, 3] RGB -> quality, 0 (bad) to 100. `--scorer module:function` names what makes one from (models folder,
device); `hyperiqa` below is the usual."""


def assess(row: Row, settings: Settings, scorer: Scorer | None = None) -> list[Row]:
    """The clip with the quality of its first picture, cut out and at the training size."""
    short = replace(row, end=min(row.end, row.start + 1 / settings.fps))
    reader = FirstPicture(row, settings, scorer)
    read(short, settings, [reader])
    return [reader.finish(row)]


class FirstPicture:
    """What `assess` reads; a `clip.Reader`."""

    def __init__(self, row: Row, settings: Settings, scorer: Scorer | None = None) -> None:
        self._row, self._settings, self._scorer = row, settings, scorer
        self._rate = media.EvenRate(row.start, row.start + 1 / settings.fps, settings.fps)
        self._picture: NDArray[np.uint8] | None = None

    @property
    def ready(self) -> bool:
        """Whether it is read."""
        return self._picture is not None

    def push(self, time: float, picture: NDArray[np.uint8]) -> None:
        self._take(self._rate.push(time, picture))
        if time >= self._rate.end:  # the next scene, or another rate
            self.end()

    def end(self) -> None:
        self._take(self._rate.finish())

    def _take(self, chosen: Iterator[NDArray[np.uint8]]) -> None:
        for picture in chosen:
            self._picture = media.cut(picture, self._row.box, self._settings.size)

    def finish(self, row: Row) -> Row:
        scorer = self._scorer or _scorer(self._settings.scorer, self._settings.models, self._settings.device)
        return replace(row, quality=round(float(scorer(self._picture)), 3))


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
