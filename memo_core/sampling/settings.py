"""Settings of sampling, and speed presets: named bundles of approximations. `exact` approximates nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checks import number, shown, whole
from ..errors import SamplingError
from ..nets.config import FACE_TOKEN_ROWS, NetConfig
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to sample.

    Attributes:
        steps: of the rectified flow, at least 1; `speed` may set a limit.
        guidance_scale: classifier-free guidance; 1 samples without it, in half the time.
        seed: of the noise; each window draws from (seed, number of its first frame).
        emotion_per: "window" gives every frame of a window the most frequent label, as released; "frame" its own.
        face_token_rows: with guidance the released code hands the two sets of face tokens to the Reference Net's rows
            in turn ("released"); "grouped" gives each batch row its own, as in training. None: as the checkpoint says,
            or as released where it says nothing.
        speed: which approximations are allowed: the name of a preset (`PRESETS`), or a bundle of one's own.
    """

    steps: int = 20
    guidance_scale: float = 3.5
    seed: int = 42
    emotion_per: str = "window"
    face_token_rows: str | None = None
    speed: Speed = PRESETS["exact"]

    def __post_init__(self) -> None:
        for name, low, high, what in (
            ("steps", 1, 1000, "a whole number from 1 to 1000"),
            ("seed", 0, 2**64 - 1, "a whole number from 0 to 2^64 - 1"),
        ):
            value = whole(getattr(self, name), low, high)
            if value is None:
                raise SamplingError(f"{name} must be {what}, received {shown(getattr(self, name))}")
            object.__setattr__(self, name, value)
        scale = number(self.guidance_scale, 1, 100)
        if scale is None:
            raise SamplingError(
                f"guidance_scale must be from 1 (no guidance) to 100, received {shown(self.guidance_scale)}"
            )
        object.__setattr__(self, "guidance_scale", scale)  # 3 and 3.0 are one setting
        if self.emotion_per not in ("window", "frame"):
            raise SamplingError(f"emotion_per must be 'window' or 'frame', received {shown(self.emotion_per)}")
        if self.face_token_rows not in (None, *FACE_TOKEN_ROWS):
            raise SamplingError(
                f"face_token_rows must be None or one of {FACE_TOKEN_ROWS}, received {shown(self.face_token_rows)}"
            )
        if not isinstance(self.speed, Speed):
            object.__setattr__(self, "speed", speed_named(self.speed))
        steps = self.steps if self.speed.max_steps is None else min(self.steps, self.speed.max_steps)
        object.__setattr__(self, "steps", steps)

    def for_checkpoint(self, config: NetConfig) -> Settings:
        """As the checkpoint samples: with its face token rows where none are asked for, with noise levels that it
        brings, without guidance that it has learnt.
        """
        made = self if self.face_token_rows else replace(self, face_token_rows=config.face_token_rows)
        made = replace(made, guidance_scale=1.0) if config.guidance_embedded and self.guided else made
        steps = len(config.noise_levels) - 1
        if steps < 1 or (steps == self.steps and self.speed.max_steps is None):
            return made
        return replace(made, steps=steps, speed=replace(self.speed, max_steps=None))

    @property
    def guided(self) -> bool:
        """Whether an unconditional row is computed besides."""
        return self.guidance_scale != 1

    @property
    def address(self) -> str:
        """What stored windows are found by: to the letter as the first releases wrote it, whatever has fields since."""
        s, how = self, self.speed
        speed = (
            f"Speed(max_steps={how.max_steps!r}, solver={how.solver!r}, guidance={how.guidance!r}, reuse=0.0, "
            f"fp8_sums={how.fp8_sums!r})"
        )
        return (
            f"Settings(steps={s.steps!r}, guidance_scale={s.guidance_scale!r}, seed={s.seed!r}, "
            f"emotion_per={s.emotion_per!r}, face_token_rows={s.face_token_rows or 'released'!r}, speed={speed})"
        )
