"""The Triton kernels at released sizes on a GPU, through the public functions, against the stated equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memo_core import kernels
from memo_core.kernels import naive

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("triton")

# The three widths of the released net at 512 x 512, with both rows of guidance.
SHAPES = [(2, 16, 4096, 8, 40), (2, 16, 1024, 8, 80), (2, 16, 256, 8, 160)]
NORMS = [(32, 2, 4096, 320), (32, 2, 256, 1280), (32, 32, 160, 768)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)
norms = pytest.mark.parametrize("norm", NORMS, ids=name)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def compiled_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is what the public functions choose, and memory that it has to fill holds NaN before."""
    assert kernels._kernels(torch.zeros(1, device="cuda")) is kernels._triton is not None
    assert not kernels._triton.INTERPRETED
    empty = torch.empty

    def poisoned(*args, **options) -> Tensor:
        out = empty(*args, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Query, key and value as views of one projection [B * F, N, 3 * H * D], and a memory of another window."""
    batch, frames, locations, heads, dim = shape
    joint, past = draw((batch * frames, locations, 3 * heads * dim), (2, *shape), dtype=dtype)
    return [x.view(shape) for x in (2 * joint).chunk(3, dim=-1)], naive.memory_sums(past[0], past[1])


def norm_inputs(norm: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, samples, tokens, channels = norm
    x, modulation = draw((rows, tokens, channels), (samples, 2 * channels), dtype=dtype)
    return [x, *modulation.chunk(2, dim=-1)]


def exact(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().float() for x in tensors]


def gradients(function, given: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in given]
    torch.autograd.backward(function(*given), upstream)
    return [x.grad for x in given]


def assert_close(mine: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(mine, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("with_memory", [False, True], ids=["alone", "memory"])
@dtypes
@shapes
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, with_memory: bool) -> None:
    window, memory = inputs(shape, dtype)
    out = kernels.memory_attention(*window, memory if with_memory else None)
    assert out.dtype == dtype and out.is_contiguous()
    wanted = naive.memory_attention(*exact(*window), tuple(exact(*memory)) if with_memory else None)
    assert_close([out], [wanted], TOLERANCE[dtype])


@dtypes
@shapes
def test_attention_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    window, memory = inputs(shape, dtype)
    upstream = draw(shape, dtype=dtype, seed=1)
    wanted, mine = (
        gradients(lambda q, k, v, kv, z: kernel.memory_attention(q, k, v, (kv, z)), given, grad)
        for kernel, given, grad in (
            (naive, exact(*window, *memory), exact(*upstream)),
            (kernels, [*window, *memory], upstream),
        )
    )
    assert_close(mine, wanted, 2 * TOLERANCE[dtype])


@dtypes
@shapes
def test_sums_and_their_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (_, key, value), memory = inputs(shape, dtype)
    assert_close(kernels.memory_sums(key, value), naive.memory_sums(*exact(key, value)), TOLERANCE[dtype])
    upstream = draw(*[part.shape for part in memory], dtype=dtype, seed=1)
    wanted = gradients(naive.memory_sums, exact(key, value), exact(*upstream))
    assert_close(gradients(kernels.memory_sums, [key, value], upstream), wanted, 2 * TOLERANCE[dtype])


@dtypes
@shapes
def test_update(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (_, key, value), memory = inputs(shape, dtype)
    wanted = naive.update_memory(tuple(exact(*memory)), 0.9**16, *exact(key, value))
    kernels.update_memory(memory, 0.9**16, key, value)
    assert_close(memory, wanted, TOLERANCE[dtype])


@dtypes
@norms
def test_norm_and_its_gradients(norm: tuple[int, ...], dtype: torch.dtype) -> None:
    given = norm_inputs(norm, dtype)
    assert_close([kernels.modulated_norm(*given)], [naive.modulated_norm(*exact(*given))], TOLERANCE[dtype])
    upstream = draw(given[0].shape, dtype=dtype, seed=1)
    wanted = gradients(naive.modulated_norm, exact(*given), exact(*upstream))
    assert_close(gradients(kernels.modulated_norm, given, upstream), wanted, 2 * TOLERANCE[dtype])


def work(q, k, v, kv, z, x, shift, scale):
    """Every kernel once."""
    past_kv, past_z = kernels.memory_sums(k, v)
    kernels.update_memory((past_kv, past_z), 0.5, k, v)
    out = kernels.memory_attention(q, k, v, (kv + past_kv, z + past_z))
    return out, kernels.modulated_norm(x, shift, scale)


@torch.no_grad()
def test_no_call_waits_for_the_device_and_a_graph_repeats_it() -> None:
    window, memory = inputs(SHAPES[2], torch.bfloat16)
    given = [*window, *memory, *norm_inputs(NORMS[1], torch.bfloat16)]
    wanted = work(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = work(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work(*given)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted))


@torch.no_grad()
def test_compiled_code_keeps_them_in_one_graph() -> None:
    window, memory = inputs(SHAPES[2], torch.bfloat16)
    given = [*window, *memory, *norm_inputs(NORMS[1], torch.bfloat16)]
    assert_close(torch.compile(work, fullgraph=True)(*given), exact(*work(*given)), 1e-2)


def test_what_triton_does_not_take_is_computed_all_the_same() -> None:
    """Doubles, and windows of more frames than a tile holds."""
    for shape, dtype in (((1, 4, 3, 2, 8), torch.float64), ((1, 100, 3, 2, 8), torch.float32)):
        query, key, value = draw(*[shape] * 3, dtype=dtype)
        memory = kernels.memory_sums(key, value)
        wanted = naive.memory_attention(*exact(query, key, value), tuple(exact(*memory)))
        assert_close([kernels.memory_attention(query, key, value, memory)], [wanted], 1e-5)
