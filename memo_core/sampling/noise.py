"""The noise that a window begins as."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def window_noise(seed: int, first_frame: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a window, the same on every device: it depends on the seed and the window's place in the audio alone."""
    # Hashed, because torch's generator reads only 32 bits: seeds that differ above them give different noise, too.
    digest = hashlib.sha256(f"{seed} {first_frame}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(shape, generator=generator)
