"""What tests of all folders share."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"


def relative_l2(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance, the figure every comparison with the reference uses."""
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
