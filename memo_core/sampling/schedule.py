"""The noise levels that sampling goes through."""

from __future__ import annotations


def sigmas(steps: int) -> list[float]:
    """The released schedule (shift 1): evenly spaced from 1 to 0.001, and then 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()
