"""The kernels: the stated equations, and the fused versions against them."""

from __future__ import annotations

import math

import pytest
import torch
from common import relative_l2
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


@pytest.mark.parametrize("kernel", [naive, fused], ids=["naive", "fused"])
@pytest.mark.parametrize("memory_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_update_fades_the_memory_and_adds_the_window(kernel, dtype: torch.dtype, memory_dtype: torch.dtype) -> None:
    key, value, past_key, past_value, _ = inputs((2, 16, 9, 4, 8), dtype)
    memory = tuple(part.to(memory_dtype) for part in naive.memory_sums(past_key.float(), past_value.float()))
    sums = naive.memory_sums(key.float(), value.float())
    wanted = [0.5 * part.float() + window for part, window in zip(memory, sums)]
    before = key.clone(), value.clone()
    assert kernel.update_memory(memory, 0.5, key, value) is memory
    for mine, part in zip(memory, wanted):
        assert mine.dtype == memory_dtype
        assert relative_l2(mine, part) < max(TOLERANCE[dtype], TOLERANCE[memory_dtype])
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])
    # A memory that is a part of something larger is written where it lies.
    both = tuple(torch.cat([part, part], dim=1) for part in memory)
    kernel.update_memory(tuple(part[:, :9] for part in both), 0.5, key, value)
    kernel.update_memory(memory, 0.5, key, value)
    for part, mine in zip(both, memory):
        assert relative_l2(part[:, :9], mine) < TOLERANCE[memory_dtype] and not torch.equal(part[:, 9:], part[:, :9])


def test_norm_follows_the_equations() -> None:
    """Two rows of one token of two channels: normalised to -1 and 1; each row has its own shift and scale."""
    x = torch.tensor([[[1.0, 3.0]], [[8.0, 4.0]]])
    shift, scale = torch.tensor([[10.0, 20.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    wanted = torch.tensor([[[10.0 - 2, 20.0 + 3]], [[1.0, 1.0]]])
    torch.testing.assert_close(naive.modulated_norm(x, shift, scale), wanted)
    # One row of both serves all rows, in order: rows 0 and 1 the first, rows 2 and 3 the second.
    repeated = naive.modulated_norm(x.repeat_interleave(2, dim=0), shift, scale)
    torch.testing.assert_close(repeated, wanted.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 3, 6])
def test_fused_norm_equals_naive(samples: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, 7, generator=generator).transpose(1, 2)  # [6, 7, 40], channels apart, as maps are
    shift, scale = torch.randn(samples, 80, generator=generator).chunk(2, dim=-1)
    given = [tensor.to(dtype).requires_grad_() for tensor in (x, shift, scale)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out, wanted = fused.modulated_norm(*given), naive.modulated_norm(*exact)
    assert out.dtype == dtype and relative_l2(out.detach(), wanted.detach()) < TOLERANCE[dtype]
    upstream = torch.randn(wanted.shape, generator=generator)
    out.backward(upstream.to(dtype))
    wanted.backward(upstream.double())
    for mine, truth in zip(given, exact):
        assert relative_l2(mine.grad, truth.grad) < TOLERANCE[dtype]


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
