"""Memory-guided linear attention: the stated equations, and the fused kernel against them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_l2
from torch import Tensor

from memo_core.kernels import fused, naive

# batch, frames, locations, heads, head width: usual; a single frame; head wider than the window; more frames than wide
SHAPES = [(2, 16, 9, 4, 8), (1, 1, 3, 2, 4), (1, 4, 5, 1, 32), (2, 48, 2, 3, 8)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(5)]


def test_sums_follow_the_equations() -> None:
    """Two frames, one location, one head of width 1: softmax over frames, then decay on key and value both."""
    key, value = torch.tensor([0.0, math.log(3.0)]), torch.tensor([5.0, 7.0])
    kv, z = naive.memory_sums(key.view(1, 2, 1, 1, 1), value.view(1, 2, 1, 1, 1))
    # softmax gives 1/4 and 3/4; the older frame fades by 0.9 in z, by 0.9 twice in kv
    torch.testing.assert_close(kv.flatten(), torch.tensor([0.25 * 5 * 0.81 + 0.75 * 7]))
    torch.testing.assert_close(z.flatten(), torch.tensor([0.25 * 0.9 + 0.75]))


def test_attention_follows_the_equations() -> None:
    """Two frames, one location, one head of width 2, by hand."""
    log = math.log
    query = torch.tensor([[0.0, log(3.0)], [0.0, 0.0]]).view(
        1, 2, 1, 1, 2
    )  # softmax over width: (1/4, 3/4), (1/2, 1/2)
    key = torch.tensor([[0.0, 0.0], [log(3.0), 0.0]]).view(
        1, 2, 1, 1, 2
    )  # softmax over frames: columns (1/4, 3/4), (1/2, 1/2)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 1, 2)
    kv = torch.tensor([[0.25 * 1 + 0.75 * 3, 0.25 * 2 + 0.75 * 4], [0.5 * 1 + 0.5 * 3, 0.5 * 2 + 0.5 * 4]])
    alone = torch.stack([torch.tensor([0.25, 0.75]) @ kv, torch.tensor([0.5, 0.5]) @ kv])  # sums of the keys are 1
    torch.testing.assert_close(naive.memory_attention(query, key, value, None).view(2, 2), alone)
    past_kv, past_z = torch.tensor([[1.0, -1.0], [2.0, 0.5]]), torch.tensor([0.5, 2.0])
    with_memory = naive.memory_attention(query, key, value, (past_kv.view(1, 1, 1, 2, 2), past_z.view(1, 1, 1, 2)))
    total_kv, total_z = kv + 0.9 * past_kv, 1 + 0.9 * past_z
    softmaxed = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(with_memory.view(2, 2), (softmaxed @ total_kv) / (softmaxed @ total_z)[:, None])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_memory", [False, True], ids=["alone", "memory"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_fused_attention_equals_naive(shape: tuple[int, ...], with_memory: bool, dtype: torch.dtype) -> None:
    query, key, value, past_key, past_value = inputs(shape, dtype)
    exact = [tensor.float() for tensor in (query, key, value, past_key, past_value)]
    memory = naive.memory_sums(past_key, past_value) if with_memory else None
    exact_memory = tuple(part.float() for part in memory) if with_memory else None
    out = fused.memory_attention(query, key, value, memory)
    assert out.dtype == dtype and out.shape == query.shape
    assert relative_l2(out, naive.memory_attention(*exact[:3], exact_memory)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_fused_sums_equal_naive(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, _, _, key, value = inputs(shape, dtype)
    for mine, wanted in zip(fused.memory_sums(key, value), naive.memory_sums(key.float(), value.float())):
        assert mine.dtype == dtype and mine.shape == wanted.shape
        assert relative_l2(mine, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_memory", [False, True], ids=["alone", "memory"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_fused_gradients_equal_naive(shape: tuple[int, ...], with_memory: bool) -> None:
    upstream = inputs(shape, seed=1)[0].double()
    gradients = []
    for kernel in (naive, fused):
        given = [tensor.double().requires_grad_() for tensor in inputs(shape)]
        memory = kernel.memory_sums(*given[3:]) if with_memory else None
        kernel.memory_attention(*given[:3], memory).backward(upstream)
        gradients.append([tensor.grad for tensor in given[: 5 if with_memory else 3]])
    for wanted, mine in zip(*gradients):
        # Along a single frame the softmax over frames is constant: no gradient reaches the keys of either.
        assert (mine - wanted).norm() <= 1e-6 * max(float(wanted.norm()), 1e-6)


@pytest.mark.parametrize("kernel", [naive, fused], ids=["naive", "fused"])
def test_strided_inputs_give_the_same(kernel) -> None:
    shape = (2, 16, 9, 4, 8)
    contiguous = inputs(shape)
    # The same numbers, stored with frames innermost, and as a part of something larger.
    strided = [tensor.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3) for tensor in contiguous[:4]]
    strided.append(torch.cat([contiguous[4]] * 2, dim=-1)[..., :8])
    assert not any(tensor.is_contiguous() for tensor in strided)
    memories = [kernel.memory_sums(*given[3:]) for given in (contiguous, strided)]
    outputs = [kernel.memory_attention(*given[:3], memory) for given, memory in zip((contiguous, strided), memories)]
    for a, b in zip([outputs[0], *memories[0]], [outputs[1], *memories[1]]):
        assert relative_l2(b, a) < 1e-6
    halves = [torch.cat([part, part], dim=1)[:, :9] for part in memories[0]]
    assert relative_l2(kernel.memory_attention(*contiguous[:3], tuple(halves)), outputs[0]) < 1e-6


@pytest.mark.parametrize("kernel", [naive, fused], ids=["naive", "fused"])
def test_inputs_are_left_as_they_are(kernel) -> None:
    given = inputs((1, 16, 3, 2, 4))
    memory = kernel.memory_sums(*given[3:])
    before = [tensor.clone() for tensor in (*given, *memory)]
    kernel.memory_attention(*given[:3], memory)
    assert all(torch.equal(a, b) for a, b in zip((*given, *memory), before))


@pytest.mark.parametrize("kernel", [naive, fused], ids=["naive", "fused"])
def test_a_vanishing_normaliser_is_held_at_its_floor(kernel) -> None:
    """The released code divides by at least 1e-10, whatever a memory holds."""
    query, key, value, _, _ = inputs((1, 4, 1, 1, 4))
    memory = torch.zeros(1, 1, 1, 4, 4), torch.full((1, 1, 1, 4), -10.0)  # the sum with the window's own keys is -8
    out = kernel.memory_attention(query, key, value, memory)
    scaled, key = torch.softmax(query, -1)[0, :, 0, 0] / 4**0.5, torch.softmax(key, 1)[0, :, 0, 0]
    assert relative_l2(out[0, :, 0, 0], scaled @ (key.T @ value[0, :, 0, 0]) / 1e-10) < 1e-6
