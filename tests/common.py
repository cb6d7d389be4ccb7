"""What tests of all folders share."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "full")


def examples(full: int, fast: int) -> int:
    """How many examples a property test draws that costs more than others."""
    return fast if PROFILE == "fast" else full


def relative_l2(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance, the figure every comparison with the reference uses."""
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
