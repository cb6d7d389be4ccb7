"""The noise levels that sampling goes through."""

from __future__ import annotations

import numpy as np

from ..nets.config import NetConfig


def of(config: NetConfig, steps: int) -> list[float]:
    """The checkpoint's own noise levels, or the released schedule of so many steps: sigmas from noise to 0."""
    return list(config.noise_levels) or sigmas(steps)


def sigmas(steps: int) -> list[float]:
    """The released schedule (shift 1): evenly spaced from 1 to 0.001, and then 0.

    In float32, and to the last bit what diffusers' FlowMatchEulerDiscreteScheduler makes of so many steps.
    """
    lowest = 1000 * float(np.float32(0.001))  # of a thousand training timesteps
    return [*(np.linspace(1000.0, lowest, steps) / 1000).astype(np.float32).tolist(), 0.0]
