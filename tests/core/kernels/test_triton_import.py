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


CUDA = "import torch; torch.backends.cuda.is_built = lambda: True\n"


def test_what_runs_on_a_cpu_imports_no_triton() -> None:
    """Though torch is built for CUDA: it takes a second."""
    result = run(
        CUDA + "import sys; import memo_core.kernels as kernels\n"
        "from memo_core.budget import counting\n"
        "x = torch.rand(3, 1, 4, 2, 1, 8); kernels.memory_attention(*x, kernels.memory_sums(*x[1:]))\n"
        "kernels.layer_norm(torch.rand(2, 3, 8), torch.ones(8), torch.zeros(8))\n"
        "assert kernels.EXPECTED and 'triton' not in sys.modules, 'imported'"
    )
    assert result.returncode == 0, result.stderr


def test_a_triton_that_is_not_known_leaves_a_card_to_torch() -> None:
    """One line says so."""
    result = run(
        CUDA + "import triton\n"
        "def autotune(*_, **__): raise ValueError('key contains names that are not kernel arguments')\n"
        "triton.autotune = triton.heuristics = autotune\n"
        "import logging; logging.basicConfig(); import memo_core.kernels as k\n"
        "k.devices.of = lambda _: k.devices._of_card((9, 0))\n"
        "assert not any(k.runs_on(torch.device('cuda', 0)) for _ in range(2))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No Triton on GPU 0, plain torch instead") == 1
