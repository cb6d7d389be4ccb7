"""Speed presets: named bundles of approximations, and what they are made of. `exact` approximates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import number, shown, whole
from .errors import SamplingError
from .solvers import SOLVERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What may be approximated; the defaults do not.

    Attributes:
        max_steps: sampling takes at most so many steps, however many are asked for; None: as many as asked for.
        solver: of the flow's equation, one of `solvers.SOLVERS`.
        guidance: sigmas (lowest, highest) between which guidance is computed; outside, the conditional row alone is,
            in half the time ("Applying guidance in a limited interval", arXiv 2404.07724).
        fp8_sums: keeps the memory's sums in 8-bit floats: half the memory of bf16.
    """

    max_steps: int | None = None
    solver: str = "euler"
    guidance: tuple[float, float] = (0.0, 1.0)
    fp8_sums: bool = False

    def __post_init__(self) -> None:
        try:
            low, high = (number(value, 0, 1) for value in self.guidance)
        except (TypeError, ValueError):  # no two of anything
            low = high = None
        if low is None or high is None or low > high:
            raise SamplingError(
                f"guidance must be (lowest, highest) sigma within 0 to 1, received {shown(self.guidance)}"
            )
        object.__setattr__(self, "guidance", (low, high))  # one address for a list and a tuple
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            raise SamplingError(f"solver must be one of {', '.join(SOLVERS)}, received {shown(self.solver)}")
        if self.max_steps is not None:
            steps = whole(self.max_steps, 1)
            if steps is None:
                raise SamplingError(
                    f"max_steps must be None or a whole number from 1, received {shown(self.max_steps)}"
                )
            object.__setattr__(self, "max_steps", steps)
        if not isinstance(self.fp8_sums, bool):
            raise SamplingError(f"fp8_sums must be True or False, received {shown(self.fp8_sums)}")


# What a name means is part of every stored window's address, and tests hold it. What
# they cost on toon heads, and what else was tried, is in benchmarks/presets.json; in passes of a row, of 40:
PRESETS = {
    "exact": Speed(),
    "balanced": Speed(max_steps=10, solver="ab2", guidance=(0.0, 0.9), fp8_sums=True),  # 19 passes
    "draft": Speed(max_steps=6, guidance=(0.1, 0.85), fp8_sums=True),  # 10 passes
}


def name_of(speed: Speed) -> str:
    """The preset's name, or "custom"."""
    return next((name for name, preset in PRESETS.items() if preset == speed), "custom")


def speed_named(name: str) -> Speed:
    """The preset of that name; SamplingError names those there are."""
    if not isinstance(name, str) or name not in PRESETS:
        raise SamplingError(f"speed must be one of {', '.join(PRESETS)}, received {shown(name)}")
    return PRESETS[name]
