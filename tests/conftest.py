"""Shared fixtures: the small checkpoint in the released layout and what the reference implementation computes from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def memo_tiny() -> Path:
    """Folder of a complete small checkpoint in the released layout, random weights."""
    return FIXTURES / "memo_tiny"


@pytest.fixture(scope="session")
def expected(memo_tiny: Path) -> dict[str, torch.Tensor]:
    """What the reference implementation computes from `memo_tiny`, by name."""
    return load_file(memo_tiny / "expected.safetensors")


def relative_l2(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance, the figure every comparison with the reference uses."""
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
