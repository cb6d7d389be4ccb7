"""Solvers of the rectified flow's equation dx/dsigma = v(x, sigma), from noise (sigma 1) to the picture (sigma 0).

Each takes `velocity(x, step)`, the net's answer at sigmas[step], and does one step per pair of neighbouring sigmas. It
asks for every step but the last sigma, which is 0, once and in order: progress counts what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler's method, as released."""
    for step, (here, there) in enumerate(pairwise(sigmas)):
        x = x + (there - here) * velocity(x, step)
    return x


def ab2(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Adams-Bashforth's method of second order for uneven steps: one evaluation a step, as Euler's."""
    before, width_before = None, 0.0
    for step, (here, there) in enumerate(pairwise(sigmas)):
        v, width = velocity(x, step), there - here
        ahead = v if before is None else v + width / (2 * width_before) * (v - before)
        x, before, width_before = x + width * ahead, v, width
    return x


SOLVERS = {"euler": euler, "ab2": ab2}
