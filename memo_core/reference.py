"""Reference: the portrait as the networks see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """A portrait with its latents and face embedding; immutable.

    Attributes:
        pixels: [3, H, W] in [-1, 1].
        latents: [1, 4, H / 8, W / 8] float32 on the CPU, scaled VAE mean.
        face_embedding: [1, 512] float32; zeros where no face was found.
        digest: identifies latents and face embedding.
    """

    pixels: Tensor
    latents: Tensor
    face_embedding: Tensor
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        content = hashlib.sha256()
        for tensor in (self.latents, self.face_embedding):
            content.update(str(tuple(tensor.shape)).encode() + tensor.float().cpu().contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", content.hexdigest()[:16])
