"""Clip: finished frames of a video, kept as latents and decoded when looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import SamplingError

WINDOW = 16  # frames per window


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one sampling call.

    Attributes:
        latents: [4, F, h, w] float32 on the CPU, scaled, as the sampler left them.
        start: number of the first frame in the audio track.
        fps: frames per second.
        decode: latents [4, F, h, w] of one window -> frames [F, 3, H, W] in [0, 1].
        stopped: sampling was interrupted before the last frame asked for.
    """

    latents: Tensor
    start: int
    fps: float
    decode: Callable[[Tensor], Tensor]
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or len(self.latents) != 4:
            raise SamplingError(f"a clip's latents are [4, F, h, w], received {list(self.latents.shape)}")
        if not torch.isfinite(self.latents).all():
            raise SamplingError("a clip's latents hold NaN or infinite values")
        if not 0 < self.fps < math.inf:
            raise SamplingError(f"a clip's fps is a positive number, received {self.fps!r}")

    @property
    def num_frames(self) -> int:
        return self.latents.shape[1]

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def frames(self) -> Iterator[np.ndarray]:
        """Decodes window by window; yields uint8 [H, W, 3]."""
        for window in self.latents.split(WINDOW, dim=1):
            if window.shape[1]:
                yield from to_uint8(self.decode(window))

    def to_tensor(self) -> Tensor:
        """All frames, float32 [F, H, W, 3] in [0, 1]."""
        height, width = (8 * size for size in self.latents.shape[2:])
        frames = torch.empty(self.num_frames, height, width, 3)
        for i, window in enumerate(self.latents.split(WINDOW, dim=1)):
            if window.shape[1]:
                frames[i * WINDOW : (i + 1) * WINDOW] = self.decode(window).permute(0, 2, 3, 1)
        return frames


def to_uint8(frames: Tensor) -> np.ndarray:
    """[F, 3, H, W] in [0, 1] -> uint8 [F, H, W, 3]."""
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
