"""The package imports as it does on a machine with a card, where Triton compiles instead of interpreting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from common import ROOT

pytest.importorskip("triton")


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_kernels_can_be_imported_where_they_are_compiled() -> None:
    result = run("import memo_core.kernels.triton as t; assert not t.INTERPRETED")
    assert result.returncode == 0, result.stderr


def test_the_package_starts_with_a_triton_that_it_does_not_know() -> None:
    """One line says so, and plain torch computes."""
    result = run(
        "import torch, triton; torch.backends.cuda.is_built = lambda: True\n"
        "def autotune(*_, **__): raise ValueError('key contains names that are not kernel arguments')\n"
        "triton.autotune = triton.heuristics = autotune\n"
        "import logging; logging.basicConfig(); import memo_core.kernels as k; assert k._triton is None"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No Triton, plain torch instead") == 1
