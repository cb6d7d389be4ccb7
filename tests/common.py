"""What tests of all folders share."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "full")


def examples(full: int, fast: int) -> int:
    """How many examples a property test draws that costs more than others."""
    return fast if PROFILE == "fast" else full


def thinned(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Values to parametrize with, all but the `fast` ones marked slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def relative_l2(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance, the figure every comparison with the reference uses."""
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
