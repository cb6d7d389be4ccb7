"""Rectified flow, and the filter that keeps bad samples out (MEMO sections 3.1 and 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_sigma(count: int, mean: float, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1), logit-normal about `mean` (Esser et al. 2024, section 3.1)."""
    return (mean + torch.randn(count, generator=generator)).sigmoid()


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The point at `sigma` on the straight path from clean (0) to noise (1), and the velocity along it.

    `sigma` broadcasts against the others.
    """
    return (1 - sigma) * clean + sigma * noise, noise - clean


def robust_flow_loss(
    predicted: Tensor, velocity: Tensor, sigma: Tensor, weight: Tensor, threshold: float, exempt: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity, leaving out samples whose clean estimate is too far off.

    An error e of the velocity moves the clean estimate by sigma * e; a sample whose mean square of that exceeds
    `threshold` is taken for a bad one (a cut, a wrong sound) and dropped from the step.

    Args:
        predicted, velocity: [B, 4, F, h, w].
        sigma, weight: broadcast against them; the weight emphasises places.
        exempt: [B] bool, samples that stay whatever their error.

    Returns:
        The loss, and the share of samples kept.
    """
    error = (predicted - velocity).square()
    distance = (error.detach() * sigma.square()).mean(dim=(1, 2, 3, 4))
    keep = distance <= threshold
    if exempt is not None:
        keep = keep | exempt
    keep = keep.to(error.dtype)
    per_sample = (error * weight).mean(dim=(1, 2, 3, 4)) / weight.expand_as(error).mean(dim=(1, 2, 3, 4))
    return (per_sample * keep).sum() / keep.sum().clamp_min(1), keep.mean()
