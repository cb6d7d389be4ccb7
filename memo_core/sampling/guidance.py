"""How the answers to a step's two rows become one velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .settings import Settings

Row = Callable[[], Tensor]  # computes one row's velocity


class Guidance(Protocol):
    """Asks for the rows it needs.

    Attributes:
        rows: of the batch, for every video: 2, unconditional and conditional, or 1.
    """

    @property
    def rows(self) -> int: ...  # noqa: D102

    def both(self, sigma: float) -> bool:
        """Whether a step at this noise level needs both rows; otherwise the conditional one alone."""
        ...

    def combined(self, rows: Sequence[Tensor]) -> Tensor:
        """One velocity of the unconditional and the conditional one."""
        ...


@dataclass(frozen=True, slots=True)
class ClassifierFree:
    """v = unconditional + scale (conditional - unconditional), at noise levels from `low` to `high`; elsewhere the
    conditional row alone ("Applying guidance in a limited interval", arXiv 2404.07724).
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    rows: int = 2

    def both(self, sigma: float) -> bool:
        """Whether the level lies in the interval."""
        return self.low <= sigma <= self.high

    def combined(self, rows: Sequence[Tensor]) -> Tensor:
        """As stated above."""
        unconditional, conditional = rows
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class Unguided:
    """The conditional row is all there is: guidance of scale 1, or networks that have learnt their guidance."""

    rows: int = 1

    def both(self, sigma: float) -> bool:
        """Never."""
        return False

    def combined(self, rows: Sequence[Tensor]) -> Tensor:
        """The only row."""
        return rows[-1]


def guidance_of(settings: Settings) -> Guidance:
    """What the settings ask for."""
    if not settings.guided:
        return Unguided()
    return ClassifierFree(settings.guidance_scale, *settings.speed.guidance)
