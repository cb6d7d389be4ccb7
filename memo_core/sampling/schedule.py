"""The noise levels that sampling goes through."""

from __future__ import annotations

from ..nets.config import NetConfig


def of(config: NetConfig, steps: int) -> list[float]:
    """The checkpoint's own noise levels, or the released schedule of so many steps: sigmas from noise to 0."""
    return list(config.noise_levels) or sigmas(steps)


def sigmas(steps: int) -> list[float]:
    """The released schedule (shift 1): evenly spaced from 1 to 0.001, and then 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()
