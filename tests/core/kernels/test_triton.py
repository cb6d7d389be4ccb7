"""The Triton kernels against the stated equations: interpreted on the CPU, compiled where there is CUDA."""

from __future__ import annotations

import logging

import pytest
import torch
from common import thinned
from torch import Tensor

from memo_core import devices, kernels
from memo_core.kernels import fused, naive

pytest.importorskip("triton")
triton = pytest.importorskip("memo_core.kernels.triton")
if not (triton.INTERPRETED or torch.cuda.is_available()):
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU", allow_module_level=True)

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
# batch, frames, locations, heads, head width: usual; a single frame; released widths; many frames; the most frames
SHAPES = [(2, 16, 3, 2, 8), (1, 1, 3, 2, 5), (1, 4, 3, 2, 40), (1, 16, 1, 2, 80), (1, 16, 1, 1, 160), (2, 48, 1, 1, 24)]
SHAPES += [(1, 64, 1, 1, 16)]
# rows, rows of shift and scale, tokens, channels: one for all; one per sample; one per row; more than a program takes
NORMS = [(4, 1, 3, 5), (6, 2, 7, 40), (3, 3, 1, 64), (2, 2, 70, 24)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)
norms = pytest.mark.parametrize("norm", NORMS, ids=name)
dtypes = pytest.mark.parametrize("dtype", thinned(TOLERANCE, fast=[torch.float32, torch.bfloat16]), ids=str)
with_or_without_memory = pytest.mark.parametrize("with_memory", [False, True], ids=["alone", "memory"])


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel has to fill holds NaN before."""
    empty = torch.empty
    with torch.device("cpu"):
        torch.ones(1)  # the first such block looks up for good what makes tensors: not what is put in its place here

    def poisoned(*args, **options) -> Tensor:
        out = empty(*args, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*tensors: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in tensors]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Query, key and value, and a memory of two more windows."""
    *window, key, value = draw(*[shape] * 5, dtype=dtype)
    return [2 * x for x in window], naive.memory_sums(key, value)


def norm_inputs(norm: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows, samples, tokens, channels = norm
    return draw((rows, tokens, channels), (samples, channels), (samples, channels), dtype=dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double() for x in tensors]


def gradients(function, given: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    given = [x.detach().clone().requires_grad_() for x in given]
    out = function(*given)
    torch.autograd.backward(out, upstream)
    return [x.grad for x in given]


def assert_close(mine: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(exact(*mine), exact(*wanted), strict=True):
        assert a.shape == b.shape
        # Along a single frame the softmax over frames is constant: no gradient reaches the keys.
        assert (a - b).norm() <= tolerance * max(float(b.norm()), 0.1)


@dtypes
@with_or_without_memory
@shapes
def test_attention_equals_naive(shape: tuple[int, ...], with_memory: bool, dtype: torch.dtype) -> None:
    window, memory = inputs(shape, dtype)
    memory = memory if with_memory else None
    out = triton.memory_attention(*window, memory)
    assert out.dtype == dtype and out.is_contiguous()
    wanted = naive.memory_attention(*exact(*window), tuple(exact(*memory)) if with_memory else None)
    assert_close([out], [wanted], TOLERANCE[dtype])


@dtypes
@shapes
def test_sums_equal_naive(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, key, value = inputs(shape, dtype)[0]
    mine = triton.memory_sums(key, value)
    assert all(part.dtype == dtype for part in mine)
    assert_close(mine, naive.memory_sums(*exact(key, value)), TOLERANCE[dtype])


@dtypes
@shapes
def test_update_writes_over_the_memory_only(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (_, key, value), memory = inputs(shape, dtype)
    wanted = naive.update_memory(tuple(exact(*memory)), 0.9**16, *exact(key, value))
    before = key.clone(), value.clone()
    assert triton.update_memory(memory, 0.9**16, key, value) is memory
    assert_close(memory, wanted, TOLERANCE[dtype])
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])


@with_or_without_memory
@shapes
def test_attention_gradients_equal_naive(shape: tuple[int, ...], with_memory: bool) -> None:
    window, memory = inputs(shape)
    given = [*window, *memory] if with_memory else window
    upstream = draw(shape, seed=1)

    def run(kernel):
        return lambda query, key, value, *memory: kernel.memory_attention(query, key, value, memory or None)

    wanted = gradients(run(naive), exact(*given), exact(*upstream))
    assert_close(gradients(run(triton), given, upstream), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    window, memory = inputs((1, 16, 2, 1, 40), dtype)
    upstream = draw((1, 16, 2, 1, 40), dtype=dtype, seed=1)
    wanted, mine = (
        gradients(lambda q, k, v, kv, z: kernel.memory_attention(q, k, v, (kv, z)), given, upstream)
        for kernel, given, upstream in (
            (naive, exact(*window, *memory), exact(*upstream)),
            (triton, [*window, *memory], upstream),
        )
    )
    assert all(x.dtype == dtype for x in mine)
    assert_close(mine, wanted, 2 * TOLERANCE[dtype])


def test_a_memory_without_gradient_gets_none() -> None:
    window, memory = inputs((1, 4, 2, 1, 8))
    window = [x.requires_grad_() for x in window]
    triton.memory_attention(*window, memory).sum().backward()
    wanted = gradients(lambda q, k, v: naive.memory_attention(q, k, v, memory), window, [torch.ones_like(window[0])])
    assert_close([x.grad for x in window], wanted, 1e-5)
    assert all(part.grad is None for part in memory)


@shapes
def test_sums_gradients_equal_naive(shape: tuple[int, ...]) -> None:
    _, key, value = inputs(shape)[0]
    upstream = draw((*shape[:1], *shape[2:], shape[-1]), (*shape[:1], *shape[2:]), seed=1)
    wanted = gradients(naive.memory_sums, exact(key, value), exact(*upstream))
    assert_close(gradients(triton.memory_sums, [key, value], upstream), wanted, 1e-5)


def test_update_carries_gradients() -> None:
    (_, key, value), memory = inputs((1, 4, 2, 1, 8))
    upstream = draw(*[part.shape for part in memory], seed=1)

    def run(kernel):
        return lambda kv, z, key, value: kernel.update_memory((kv * 1, z * 1), 0.5, key, value)

    wanted = gradients(run(naive), exact(*memory, key, value), exact(*upstream))
    assert_close(gradients(run(triton), [*memory, key, value], upstream), wanted, 1e-5)


@dtypes
@norms
def test_norm_equals_naive(norm: tuple[int, ...], dtype: torch.dtype) -> None:
    given = norm_inputs(norm, dtype)
    out = triton.modulated_norm(*given)
    assert out.dtype == dtype
    assert_close([out], [naive.modulated_norm(*exact(*given))], TOLERANCE[dtype])


@norms
def test_norm_gradients_equal_naive(norm: tuple[int, ...]) -> None:
    given = norm_inputs(norm)
    upstream = draw(given[0].shape, seed=1)
    wanted = gradients(naive.modulated_norm, exact(*given), exact(*upstream))
    assert_close(gradients(triton.modulated_norm, given, upstream), wanted, 1e-5)


@pytest.mark.parametrize("layout", ["fused", "frames-innermost", "sliced"])
def test_strided_views_give_the_same(layout: str) -> None:
    shape = (2, 4, 2, 2, 8)
    batch, frames, locations, heads, dim = shape
    (query, key, value), memory = inputs(shape)
    window = [query, key, value]
    if layout == "fused":  # views of one projection [B * F, N, 3 * H * D], as a fused one makes them
        joint = torch.cat([x.reshape(batch * frames, locations, heads * dim) for x in window], dim=-1)
        window = [x.view(shape) for x in joint.chunk(3, dim=-1)]
    elif layout == "frames-innermost":
        window = [x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3) for x in window]
        memory = tuple(part.transpose(0, -1).contiguous().transpose(0, -1) for part in memory)
    else:
        window = [torch.cat([x, x], dim=-1)[..., :dim] for x in window]
        memory = tuple(torch.cat([part, part], dim=1)[:, :locations] for part in memory)
    assert not any(x.is_contiguous() for x in window)
    upstream = draw(shape, seed=1)

    def all_of(q, k, v, kv, z):
        return triton.memory_attention(q, k, v, (kv, z)), *triton.memory_sums(k, v)

    given = [query, key, value, *(part.contiguous() for part in memory)]
    views = [x.requires_grad_() for x in (*(x.detach() for x in window), *memory)]
    outs = all_of(*views), all_of(*given)
    assert_close(outs[0], outs[1], 1e-6)
    mine = torch.autograd.grad(outs[0][0], views, upstream)
    assert_close(mine, gradients(lambda *x: all_of(*x)[0], given, upstream), 1e-6)
    memory = tuple(part.detach() for part in memory)
    wanted = triton.update_memory(
        tuple(part.clone(memory_format=torch.contiguous_format) for part in memory), 0.5, key, value
    )
    assert_close(triton.update_memory(memory, 0.5, *(x.detach() for x in views[1:3])), wanted, 1e-6)


def test_a_norm_reads_views() -> None:
    x, shift, scale = norm_inputs((4, 2, 6, 10))
    modulation = torch.stack([shift, scale], dim=-1)
    maps = torch.cat([x.transpose(1, 2)] * 2, dim=1).transpose(1, 2)[..., :10]
    for parts in (torch.cat([shift, scale], dim=-1).chunk(2, dim=-1), modulation.unbind(-1)):
        assert_close([triton.modulated_norm(maps, *parts)], [naive.modulated_norm(x, shift, scale)], 2e-6)


def test_inputs_are_left_as_they_are() -> None:
    window, memory = inputs((1, 16, 2, 1, 8))
    norm = norm_inputs((4, 2, 3, 8))
    given = [*window, *memory, *norm]
    before = [x.clone() for x in given]
    triton.memory_attention(
        *[x.requires_grad_() for x in window], tuple(x.requires_grad_() for x in memory)
    ).sum().backward()
    sum(part.sum() for part in triton.memory_sums(*window[1:])).backward()
    triton.modulated_norm(*[x.requires_grad_() for x in norm]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(given, before))


def test_a_vanishing_normaliser_is_held_at_its_floor() -> None:
    """At least 1e-10, as released, and no gradient flows through what is held."""
    window, _ = inputs((1, 4, 1, 1, 4))
    kv, z = torch.zeros(1, 1, 1, 4, 4), torch.full((1, 1, 1, 4), -10.0)
    given = [*window, kv.to(DEVICE), z.to(DEVICE)]

    def run(kernel):
        return lambda q, k, v, kv, z: kernel.memory_attention(q, k, v, (kv, z))

    with torch.no_grad():
        assert_close([run(triton)(*given)], [run(naive)(*exact(*given))], 1e-5)
    upstream = draw(window[0].shape, seed=1)
    wanted = gradients(run(naive), exact(*given), exact(*upstream))
    assert wanted[4].norm() == 0
    assert_close(gradients(run(triton), given, upstream), wanted, 1e-5)


def test_a_memory_keeps_a_dtype_of_its_own() -> None:
    """Sums in fp32 for a net in bf16: they gather many windows."""
    (query, key, value), _ = inputs((1, 16, 2, 1, 8), torch.bfloat16)
    memory = inputs((1, 16, 2, 1, 8))[1]
    out = triton.memory_attention(query, key, value, memory)
    assert out.dtype == torch.bfloat16
    assert_close([out], [naive.memory_attention(*exact(query, key, value), tuple(exact(*memory)))], 2e-2)
    wanted = naive.update_memory(tuple(exact(*memory)), 0.5, *exact(key, value))
    assert_close(triton.update_memory(memory, 0.5, key, value), wanted, 1e-2)
    assert memory[0].dtype == memory[1].dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode) -> None:
    window, memory = inputs((1, 4, 2, 1, 8))
    x, shift, scale = norm_inputs((4, 2, 3, 8))
    kept = []
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        query = window[0].clone().requires_grad_()
        outs = [triton.memory_attention(query, *window[1:], memory), triton.modulated_norm(x, shift, scale)]
        outs += [*triton.memory_sums(*window[1:]), *triton.update_memory(memory, 0.5, *window[1:])]
    assert not kept and not any(out.requires_grad for out in outs)
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile is not to be had")
def test_compiled_code_keeps_them_in_one_graph() -> None:
    window, memory = inputs((1, 4, 2, 1, 8))
    x, shift, scale = norm_inputs((4, 2, 3, 8))
    upstream = draw((1, 4, 2, 1, 8), (4, 3, 8), seed=1)

    def work(q, k, v, kv, z, x, shift, scale):
        kv, z = triton.update_memory((kv * 1, z * 1), 0.5, k, v)
        past_kv, past_z = triton.memory_sums(k, v)
        out = triton.memory_attention(q * 2, k, v, (kv + past_kv, z + past_z))
        return out, triton.modulated_norm(x, shift, scale)

    given = [*window, *memory, x, shift, scale]
    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, given, upstream), gradients(work, given, upstream), 1e-5)
    with torch.no_grad():
        assert_close(compiled(*given), work(*given), 1e-6)


def test_what_does_not_fit_is_named() -> None:
    window, (kv, z) = inputs((2, 4, 2, 1, 8))
    with pytest.raises(ValueError, match="one shape"):
        triton.memory_attention(window[0], window[1][:, :2], window[2], None)
    with pytest.raises(ValueError, match=r"\(3, 2, 1, 8\)"):
        triton.update_memory((kv, torch.zeros(3, 2, 1, 8)), 0.5, *window[1:])
    with pytest.raises(ValueError, match=r"\[R, N, C\]"):
        triton.modulated_norm(*draw((5, 2, 8), (2, 8), (2, 8)))
    # One memory serves every row of a batch, as in the equations.
    one = triton.memory_attention(*window, (kv[:1], z[:1]))
    assert_close([one], [naive.memory_attention(*window, (kv[:1], z[:1]))], 1e-5)


def test_only_what_is_on_cuda_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    window, memory = inputs((1, 4, 2, 1, 8))
    window, memory = [x.cpu() for x in window], tuple(part.cpu() for part in memory)
    wanted = fused.memory_attention(*window, memory)

    def refuse(*_):
        raise AssertionError("went to Triton")

    monkeypatch.setattr(kernels, "EXPECTED", True)
    monkeypatch.setattr(kernels, "_triton", triton)
    monkeypatch.setattr(triton, "memory_attention", refuse)
    assert torch.equal(kernels.memory_attention(*window, memory), wanted)


# --- Between the products ---------------------------------------------------------------------------------------------

# rows, channels, height, width, groups, rows of the shift (0: none): a group of one channel; odd sizes; many pixels
MAPS = [(2, 8, 3, 5, 8, 0), (4, 10, 7, 6, 2, 2), (2, 24, 13, 14, 4, 1), (3, 20, 1, 1, 5, 3)]
CARRIED = [torch.float32, torch.bfloat16, torch.float16]
carried = pytest.mark.parametrize("dtype", thinned(CARRIED, fast=[torch.float32, torch.bfloat16]), ids=str)


def map_inputs(size: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """Maps in float32 far from zero, groups, weight, bias and shift in `dtype`."""
    rows, channels, height, width, groups, shifts = size
    x, weight, bias, shift = draw((rows, channels, height, width), (channels,), (channels,), (max(1, shifts), channels))
    weight, bias, shift = (part.to(dtype) for part in (weight, bias, shift))
    return 3 * x + 20, groups, weight, bias, shift if shifts else None


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("silu", thinned([False, True], fast=[True]), ids=["", "silu"])
@pytest.mark.parametrize("dtype", thinned(CARRIED, fast=[torch.bfloat16]), ids=str)
@pytest.mark.parametrize("size", MAPS, ids=name)
def test_group_norm(size: tuple[int, ...], dtype: torch.dtype, silu: bool, last: bool) -> None:
    x, groups, weight, bias, shift = map_inputs(size, dtype)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    out = triton.group_norm(x, groups, weight, bias, 1e-5, shift, silu)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    exact_shift = None if shift is None else shift.double()
    wanted = naive.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5, exact_shift, silu)
    assert_close([out], [wanted], 10 * TOLERANCE[dtype] if dtype == torch.float32 else TOLERANCE[dtype])


@carried
@norms
def test_layer_norm_and_the_residual_sum_before_it(norm: tuple[int, ...], dtype: torch.dtype) -> None:
    """x and the sum in float32, what is added and the norm in `dtype`."""
    x, shift, scale = norm_inputs(norm)
    y = draw(x.shape, dtype=dtype, seed=1)[0]
    shift, scale = shift.to(dtype), scale.to(dtype)
    out = triton.layer_norm(x, scale[0], shift[0])
    assert out.dtype == dtype
    assert_close([out], [naive.layer_norm(x.double(), scale[0].double(), shift[0].double())], TOLERANCE[dtype])
    for modulated in (True, False):
        if not modulated:
            shift, scale = shift[:1], scale[:1]
        total, normed = triton.add_norm(x, y, shift, scale, 1e-5, torch.float32, modulated)
        assert (total.dtype, normed.dtype) == (torch.float32, dtype)
        given = [part.double() for part in (x, y, shift, scale)]
        wanted = naive.add_norm(*given, 1e-5, torch.float64, modulated)
        assert_close([total], [wanted[0]], 2e-6)
        assert_close([normed], [wanted[1]], TOLERANCE[dtype])


@carried
def test_gates_and_sums(dtype: torch.dtype) -> None:
    (x,) = draw((3, 5, 2 * 37), dtype=dtype)
    assert_close([triton.geglu(x)], [naive.geglu(x.double())], TOLERANCE[dtype])
    x, y = draw((2, 6, 5, 3), (2, 6, 5, 3))
    for one, other in ((x, y), (x.to(memory_format=torch.channels_last), y.to(dtype))):
        out = triton.add(one, other, dtype)
        assert out.dtype == dtype and out.stride() == one.stride()
        assert_close([out], [one.double() + other.double()], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(7, 40, 36), (130, 33, 70), (3, 64, 64)], ids=name)
def test_a_gated_product(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rows, width, columns of either half: partial tiles in all of them, and rows that do not follow each other."""
    rows, width, columns = size
    x, weight, bias = draw((1, rows, 2 * width), (2 * columns, width), (2 * columns,), dtype=dtype)
    x = x[..., :width]
    wanted = naive.geglu_linear(*(part.double() for part in (x, weight, bias)))
    assert_close([triton.geglu_linear(x, weight, bias)], [wanted], 3 * TOLERANCE[dtype])


def test_their_gradients() -> None:
    x, groups, weight, bias, shift = map_inputs((4, 10, 7, 6, 2, 2), torch.float32)
    tokens, scale, offset, other, pairs = draw((2, 5, 12), (2, 12), (2, 12), (2, 5, 12), (3, 5, 14))
    for run, given in (
        (lambda k, x, w, b, s: k.group_norm(x, groups, w, b, 1e-5, s, True), [x, weight, bias, shift]),
        (lambda k, x, w, b: k.layer_norm(x, w, b, 1e-5), [tokens, scale[0], offset[0]]),
        (lambda k, x, y, b, w: sum(k.add_norm(x, y, b, w, 1e-5, x.dtype, True)), [tokens, other, offset, scale]),
        (lambda k, x: k.geglu(x), [pairs]),
        (lambda k, x, w, b: k.geglu_linear(x, w, b), [tokens, *draw((10, 12), (10,), seed=2)]),
        (lambda k, x, y: k.add(x, y, x.dtype), [tokens, other]),
    ):
        upstream = draw(run(naive, *given).shape, seed=1)
        wanted = gradients(lambda *g, run=run: run(naive, *g), exact(*given), exact(*upstream))
        mine = gradients(lambda *g, run=run: run(triton, *g), given, upstream)
        assert_close(mine, wanted, 2e-5)


# --- The networks as they run on a card -------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_networks_on_the_kernels_are_the_same_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of both rows and of one, and the Reference Net: maps channels-last, hidden states as `precision` says."""
    dtype, tolerance = torch.bfloat16, 4e-2  # in float32, 2e-5 holds
    from benchmarks import networks
    from memo_core.nets.conditions import Conditions
    from memo_core.nets.past import in_turn, rows_of
    from memo_core.running import precision
    from memo_core.running.options import Options, optimise

    plain, fast = networks.tiny(dtype=dtype), networks.tiny(dtype=dtype)
    optimise(fast, Options(channels_last=True, fuse_qkv=True))
    side, frames = 4, 2
    noise, face, past = draw((1, 4, frames, side, side), (2, 4, 16), (2 * frames, 4, side, side))
    tokens = draw((2, frames, 4, 16), seed=3)[0].to(dtype)
    passed: list[str] = []

    def run(nets: networks.Networks) -> list[Tensor]:
        net, pictures = nets.diffusion_net, past.to(dtype)
        features = nets.reference_net(pictures, face.to(dtype).repeat_interleave(frames, dim=0))
        memory = [layer.carries.of_window(*pair) for layer, *pair in net.past(features, side, side, frames)]
        conditions = Conditions(
            reference=[feature[:2][None] for feature in features],
            face_tokens=face.to(dtype),
            audio_tokens=tokens,
            emotion=torch.tensor([9, 3], device=DEVICE),
            frames=frames,
        )
        prepared = net.prepare(conditions)
        shifts = net.time_shifts(torch.tensor([700.0], device=DEVICE), dtype)
        latents = noise.to(precision.carried(dtype))
        second = [rows_of(pair, slice(1, None)) for pair in memory]
        return [
            net(latents, shifts, prepared, in_turn(memory)),
            net(latents, shifts, prepared.guidance_row(1), in_turn(second)),
            features[0],
            features[-1],
        ]

    wanted = run(plain)
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "_kernels", lambda x, windows=False: triton)
        for name in ("group_norm", "add_norm", "add", "layer_norm", "geglu_linear", "memory_attention"):
            kernel = getattr(triton, name)
            patched.setattr(triton, name, lambda *x, name=name, kernel=kernel: passed.append(name) or kernel(*x))
        mine = run(fast)
    assert {"group_norm", "add_norm", "add", "layer_norm", "geglu_linear", "memory_attention"} <= set(passed)
    for a, b in zip(mine, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


class OnCuda(Tensor):
    """Numbers on the CPU that say they are on a GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Lets the public functions see a card of a compute capability, on which `check` does as given."""

    def insert(capability: tuple[int, int], check) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(devices, "of", lambda _: devices._of_card(capability))
        monkeypatch.setattr(triton, "check", check)

    monkeypatch.setattr(kernels, "EXPECTED", True)
    kernels._checked.cache_clear()
    yield insert
    kernels._checked.cache_clear()


def no_compiler(_) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.mark.parametrize(
    "capability, check, reason", [((9, 0), no_compiler, "C compiler"), ((6, 1), lambda _: None, "6.1")]
)
def test_where_triton_does_not_run_torch_does_and_says_so_once(card, caplog, capability, check, reason: str) -> None:
    window, memory = inputs((1, 4, 2, 1, 8))
    window, memory = [x.cpu() for x in window], tuple(part.cpu() for part in memory)
    wanted = fused.memory_attention(*window, memory)
    card(capability, check)
    with caplog.at_level(logging.WARNING, "memo_core.kernels"):
        for _ in range(2):
            out = kernels.memory_attention(*[x.as_subclass(OnCuda) for x in window], memory)
            assert torch.equal(out.as_subclass(Tensor), wanted)
    (line,) = caplog.messages
    assert "MEMO_KERNELS" in line and reason in line and "\n" not in line


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0), (12, 0)], ids=str)
def test_triton_from_8_0_on(card, capability: tuple[int, int]) -> None:
    """Before, its products would not run on tensor cores: torch's do."""
    card(capability, lambda _: None)
    takes = triton if capability >= (8, 0) else fused
    for dtype, wanted in ((torch.float16, takes), (torch.bfloat16, takes), (torch.float64, fused)):
        assert kernels._kernels(torch.zeros(1, dtype=dtype).as_subclass(OnCuda)) is wanted


def test_compiled_code_asks_once_and_keeps_no_trace_of_it(card) -> None:
    """The check itself is the real one: a kernel, compiled and run in the midst of tracing."""
    asked, check = [], triton.check

    def counted(index: int) -> None:
        asked.append(index)
        check(torch.device(DEVICE))

    card((8, 0), counted)
    graph = torch.compile(lambda x: x + kernels._runs(0), backend="eager", fullgraph=True)
    assert graph(torch.zeros(1)).item() == graph(torch.zeros(2, 2))[0, 0].item() == 1
    assert asked == [0]
