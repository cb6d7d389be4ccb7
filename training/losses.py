"""Rectified flow, and the filter that keeps bad samples out (MEMO sections 3 and 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Loss


def draw_sigma(count: int, config: Loss, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1], drawn as the weighting says (Esser et al. 2024, section 3.1), or 1."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheme = "none" if config.weighting == "uniform" else config.weighting
    sigma = compute_density_for_timestep_sampling(
        scheme, count, config.logit_mean, config.logit_std, config.mode_scale, generator=generator
    )
    if not config.pure_noise:  # and nothing is drawn for it: settings from before it was one draw the same numbers
        return sigma
    return sigma.masked_fill(torch.rand(count, generator=generator) < config.pure_noise, 1.0)


def sigma_weight(sigma: Tensor, config: Loss) -> Tensor:
    """Weight of each noise level in the loss, the same shape."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return compute_loss_weighting_for_sd3(config.weighting, sigma)


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The point at `sigma` on the straight path from clean (0) to noise (1), and the velocity along it.

    `sigma` broadcasts against the others.
    """
    return (1 - sigma) * clean + sigma * noise, noise - clean


def flow_errors(
    predicted: Tensor, velocity: Tensor, sigma: Tensor, weight: Tensor, config: Loss
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the error by which the robust filter judges it.

    An error e of the velocity moves the clean estimate by sigma * e. Measured there (`robust_measure` "clean" and
    "quantile") it changes less with the noise level than the velocity's own.

    Args:
        predicted, velocity: [B, 4, F, h, w].
        sigma, weight: broadcast against them; the weight emphasises places.

    Returns:
        Weighted mean squared error [B], and the unweighted error [B] without gradient.
    """
    error = (predicted - velocity).square()
    seen = error.detach() if config.robust_measure == "loss" else error.detach() * sigma.square()
    weighted = error * weight * sigma_weight(sigma, config)
    return weighted.mean(dim=(1, 2, 3, 4)) / weight.expand_as(error).mean(dim=(1, 2, 3, 4)), seen.mean(dim=(1, 2, 3, 4))


def kept_by_filter(loss: Tensor, error: Tensor, exempt: Tensor, threshold: float | Tensor) -> Tensor:
    """Which samples [B] stay in the step: those whose error is at most `threshold` (one, or [B]), and the exempt ones.

    Exempt are samples without a portrait: what they should look like is anybody's guess, so their error says nothing.
    One that is not finite never stays.
    """
    return ((error <= threshold) | exempt) & torch.isfinite(error) & torch.isfinite(loss)
