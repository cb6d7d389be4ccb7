"""Reference: the portrait as the networks see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import shown, whole
from ..errors import PortraitError
from ..tensorfile import tensors_digest


@dataclass(frozen=True, eq=False)
class Reference:
    """A portrait with its latents and face embedding; immutable.

    Attributes:
        pixels: [3, H, W] in [-1, 1].
        latents: [1, 4, H / 8, W / 8] float32 on the CPU, scaled VAE mean.
        face_embedding: [1, 512] float32; zeros where no face was found.
        faces_found: how many faces the picture shows; None where nobody looked.
        digest: identifies the picture, by its pixels in 8 bits: the same on every device and in every precision.
    """

    pixels: Tensor
    latents: Tensor
    face_embedding: Tensor
    faces_found: int | None = None
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        for name, tensor in (
            ("pixels", self.pixels),
            ("latents", self.latents),
            ("face_embedding", self.face_embedding),
        ):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.itemsize == 1:
                what = str(tensor.dtype) if isinstance(tensor, Tensor) else shown(tensor)
                raise PortraitError(f"a reference's {name} must be a floating-point tensor, received {what}")
        if self.faces_found is not None and whole(self.faces_found) is None:
            raise PortraitError(
                f"faces_found must be None or a whole number from 0, received {shown(self.faces_found)}"
            )
        if self.pixels.ndim != 3:
            raise PortraitError(f"a reference's pixels are [3, H, W], received {list(self.pixels.shape)}")
        height, width = self.pixels.shape[-2:]
        for name, tensor, shape in (
            ("pixels", self.pixels, [3, height, width]),
            ("latents", self.latents, [1, 4, height // 8, width // 8]),
            ("face_embedding", self.face_embedding, [1, 512]),
        ):
            if list(tensor.shape) != shape:
                raise PortraitError(
                    f"a reference of {height} x {width} pixels has {name} {shape}, received {list(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise PortraitError(f"the reference's {name} hold NaN or infinite values")
        pixels = ((self.pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
        object.__setattr__(self, "digest", tensors_digest(pixels))
