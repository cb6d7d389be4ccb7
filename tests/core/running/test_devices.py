"""What each kind of device is taken for; the kinds that are not here are played by stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import relative_l2
from torch import Tensor

from memo_core import devices
from memo_core.budget.counting import GIB, needs, peak_of
from memo_core.nets import layers
from memo_core.sampling.settings import Settings


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a CUDA card of a compute capability, as torch would describe it."""

    def plug_in(capability: tuple[int, int], hip: str | None = None, fused: bool = True) -> None:
        devices._of.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(devices, "attention_runs", lambda *_: fused)

    yield plug_in
    devices._of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "triton"),
    [
        ((6, 1), torch.float32, False),
        ((7, 5), torch.float16, False),
        ((8, 0), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
    ],
    ids=str,
)
def test_cuda_by_compute_capability(machine, capability: tuple[int, int], dtype: torch.dtype, triton: bool) -> None:
    machine(capability)
    found = devices.of("cuda")
    assert (found.dtype, found.triton, found.fp8, found.pinned) == (dtype, triton, True, True)


def test_rocm_without_fused_attention(machine) -> None:
    machine((11, 0), hip="6.4", fused=False)
    found = devices.of("cuda:0")
    assert found.dtype == torch.bfloat16 and found.triton and not found.fused_attention


def test_devices_that_are_not_cuda() -> None:
    assert [devices.of(name).dtype for name in ("cpu", "mps", "xpu")] == [torch.float32, torch.float32, torch.bfloat16]
    assert [devices.of(name).fp8 for name in ("cpu", "mps", "xpu")] == [True, False, True]
    assert [devices.of(name).fused_attention for name in ("cpu", "mps", "xpu")] == [True, False, False]
    assert not any(devices.of(name).pinned or devices.of(name).triton for name in ("cpu", "mps", "xpu"))


def test_attention_that_no_kernel_fuses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the device itself, by trying."""
    assert devices.attention_runs(torch.device("cpu"), torch.float32)

    def refused(*_: Tensor) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refused)
    assert not devices.attention_runs(torch.device("cpu"), torch.float64)


def test_an_xpu_says_its_own_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        mem_get_info=lambda _: (700, 1000), memory_reserved=lambda _: 50, memory_allocated=lambda _: 20
    )
    monkeypatch.setattr(torch, "xpu", card)
    assert devices.free_bytes(torch.device("xpu")) == 730
    monkeypatch.setattr(torch, "xpu", SimpleNamespace())  # before torch 2.6: nobody says, and the machine's is not it
    assert devices.free_bytes(torch.device("xpu")) is None


# --- Attention in pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [2**30, 4 * 24 * 40, 4 * 24 * 7], ids=["whole", "heads", "queries"])
def test_attention_in_pieces_is_attention(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    query, key, value = torch.randn(3, 2, 4, 40, 16, generator=torch.Generator().manual_seed(0))
    key, value = key[:, :, :24], value[:, :, :24]
    pieces, whole = [], F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces.append(4 * q.shape[:-1].numel() * k.shape[-2])
        return whole(q, k, v)

    monkeypatch.setattr(layers, "SCORES", scores)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with layers.attention_fused(False):
        out = layers.attend(query, key, value)
    assert relative_l2(out, whole(query, key, value)) < 1e-6
    assert max(pieces) <= scores


def test_where_kernels_are_fused_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SCORES", 1)
    calls, whole = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x: calls.append(1) or whole(*x))
    layers.attend(*torch.zeros(3, 2, 2, 8, 8))
    assert calls == [1]


def test_pieces_keep_the_scores_of_released_sizes_small() -> None:
    """The rows that see the portrait, at the finest level: scores and their softmax at once would take 32 GiB."""
    query = torch.empty(16, 8, 4096, 40, dtype=torch.bfloat16, device="meta")
    key = torch.empty(16, 8, 8192, 40, dtype=torch.bfloat16, device="meta")
    assert peak_of(lambda: layers.attend(query, key, key), fused=False)[0] < 0.7 * GIB
    at_once = peak_of(lambda: F.scaled_dot_product_attention(query, key, key), fused=False)[0]
    assert at_once > 30 * GIB


def test_the_plan_counts_what_will_run(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 2 MB in pieces, in 64 x 64 latents, are more than a step takes with a fused kernel."""
    monkeypatch.setattr(layers, "SCORES", 2**31)
    settings = Settings()
    fused = needs(pipe.nets, 512, 512, settings)
    with layers.attention_fused(False):
        whole = needs(pipe.nets, 512, 512, settings)
    assert whole.step > 2 * fused.step
    assert needs(pipe.nets, 512, 512, settings) == fused
