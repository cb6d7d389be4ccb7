"""Pictures to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SamplingError
from ..release import WINDOW
from ..running.parallel import run_in_parallel


def few_frames(height: int, width: int) -> int:
    """Frames that go through the VAE at once where no plan says: one at 512 x 512, as released, more where they are
    small.
    """
    return max(1, min(WINDOW, 512 * 512 // (height * width)))


@torch.no_grad()
def decode_latents(
    vae: Any, latents: Tensor, device: torch.device | None = None, at_once: int | None = None, on_threads: bool = False
) -> Tensor:
    """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1], computed on `device` (None: where the VAE is),
    `at_once` frames at once (None: `few_frames`); with `on_threads`, on a CPU, half of these on each of two threads,
    the same but for rounding.

    Raises:
        SamplingError: the VAE gave NaN or infinite values; names the frames.
    """
    dtype = vae.decoder.conv_in.weight.dtype  # the two halves of a VAE may differ (`precision`)
    latents = latents.transpose(0, 1).to(device or vae.device, dtype) / vae.config.scaling_factor
    at_once = at_once or few_frames(8 * latents.shape[2], 8 * latents.shape[3])
    frames = _in_pieces(lambda piece: vae.decode(piece, return_dict=False)[0], latents, at_once, on_threads)
    _check_pictures(frames, "decoding", dtype)  # before the clamp, which would make white of what is infinite
    return (frames.float() / 2 + 0.5).clamp(0, 1)


def encode_frames(
    vae: Any, frames: Tensor, device: torch.device | None = None, at_once: int | None = None, on_threads: bool = False
) -> Tensor:
    """Frames [F, 3, H, W] in [-1, 1] -> scaled VAE means [F, 4, h, w], float32, computed as by `decode_latents`.

    Raises:
        SamplingError: as `decode_latents`.
    """
    dtype = vae.encoder.conv_in.weight.dtype
    frames = frames.to(device or vae.device, dtype)
    at_once = at_once or few_frames(*frames.shape[2:])
    means = _in_pieces(lambda piece: vae.encode(piece, return_dict=False)[0].mean, frames, at_once, on_threads)
    _check_pictures(means, "encoding", dtype)
    return means.float() * vae.config.scaling_factor


def _in_pieces(run: Callable[[Tensor], Tensor], frames: Tensor, at_once: int, on_threads: bool) -> Tensor:
    """A network on frames [F, ...], so many at once."""
    if frames.device.type != "cpu" or at_once < 2 or not on_threads:
        return torch.cat([run(piece) for piece in frames.split(at_once)])
    pieces = frames.split(at_once // 2)
    pairs = [pieces[first : first + 2] for first in range(0, len(pieces), 2)]
    return torch.cat([out for pair in pairs for out in run_in_parallel([partial(run, piece) for piece in pair])])


def _check_pictures(pictures: Tensor, doing: str, dtype: torch.dtype) -> None:
    """SamplingError if what the VAE made of frames [F, ...] is not finite."""
    if bool(torch.isfinite(pictures).all()):
        return
    bad = (~torch.isfinite(pictures)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    which = f"frame {bad[0]}" if len(bad) == 1 else f"{len(bad)} frames, {bad[0]} to {bad[-1]},"
    remedy = "a weight or a latent is out of range: use an undamaged checkpoint"
    if dtype == torch.float16:  # at most 65504, which the released VAE is known to exceed
        remedy = "the released VAE overflows in float16: use float32 or bfloat16"
    elif dtype == torch.bfloat16:
        remedy += ", or float32"
    raise SamplingError(
        f"the VAE gave NaN or infinite values in {dtype} when {doing} {which} of {len(pictures)} (counted from 0): "
        f"{remedy}"
    )
