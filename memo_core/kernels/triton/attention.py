"""Memory-guided linear attention: `naive.memory_attention`, forward and backward.

With p = softmax of the queries over D, s = softmax of the keys over the frames, v the values, (kv, z) the memory and
gamma its decay:

    out = (p s^T v + gamma p kv) / n        n = max(1 + gamma p z, floor)

Keys sum to 1 over the window, queries over the width: so does the window's part of the normaliser n. The scale D^-0.5
on queries cancels in the quotient except at the floor, which keeps its released value. Through p s^T [F, F] it is
cheaper than through s^T v [D, D] at released sizes. For gradients G of out, u = G / n:

    d_v = (p s^T)^T u        d_kv = gamma p^T u        d_z = gamma p^T d_n
    d_n = -sum over D of u out, 0 where n is the floor
    d_p = (u v^T) s + gamma u kv^T + gamma d_n z^T        d_s = (u v^T)^T p

and through a softmax y = softmax(x): d_x = y (d_y - sum of y d_y).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...release import DECAY
from ..naive import MIN_NORMALISER, Memory
from .tools import (
    check_window,
    dot,
    grid,
    operator,
    sizes,
    softmax,
    strides,
    tile_at,
    tile_mask,
    tune,
    window_variants,
)


@tune(window_variants, stages=2)
@triton.jit
def attention_kernel(
    query, key, value, kv, z, out, floor, N, H,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    q_h: tl.constexpr, q_d: tl.constexpr, k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DECAY: tl.constexpr, MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out [B, F, N, H, D], contiguous, of query, key, value, and with MEMORY of kv [B, N, H, D, D] and z.

    Grid: (B * N * H,). A program holds one location's and head's queries and keys [FP, DP] (F and D padded) and passes
    through the columns of values and memory in blocks of BLOCK. Strides are given by axis (`tools.strides`).
    """
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = tile_mask(frames, dims, F, D)
    q = tl.load(query + b * q_b + n * q_n + h * q_h + tile_at(frames, dims, q_f, q_d), mask=whole, other=0.0)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + tile_at(frames, dims, k_f, k_d), mask=whole, other=0.0)
    q_softmax = softmax(q, dims[None, :] < D, 1)
    p = q_softmax.to(q.dtype)
    scores = dot(p, tl.trans(softmax(k, frames[:, None] < F, 0).to(q.dtype))).to(q.dtype)
    if MEMORY:
        z_row = tl.load(z + b * z_b + n * z_n + h * z_h + dims * z_d, mask=dims < D, other=0.0).to(tl.float32)
        normaliser = tl.maximum(1 + DECAY * tl.sum(q_softmax * z_row[None, :], axis=1), floor)
    value += b * v_b + n * v_n + h * v_h
    kv += b * m_b + n * m_n + h * m_h
    out += (b * F * N + n) * H * D + h * D
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = tile_mask(frames, columns, F, D)
        v = tl.load(value + tile_at(frames, columns, v_f, v_d), mask=inside, other=0.0).to(q.dtype)
        numerator = dot(scores, v)
        if MEMORY:
            m = tl.load(kv + tile_at(dims, columns, m_d, m_e), mask=tile_mask(dims, columns, D, D), other=0.0)
            numerator = (numerator + DECAY * dot(p, m.to(q.dtype))) / normaliser[:, None]
        tl.store(out + tile_at(frames, columns, N * H * D, 1), numerator.to(out.dtype.element_ty), mask=inside)


def backward_variants(given: dict[str, Any]) -> list[tuple[int, int]]:
    """As `window_variants`, for twice the sums in registers, of which 16 warps have too few."""
    warps = min(2 * window_variants(given)[0][1], 8)
    return list(dict.fromkeys([(16, warps), (min(given["DP"], 32), warps)]))


@tune(backward_variants)
@triton.jit
def attention_backward_kernel(
    query, key, value, kv, z, grad, d_query, d_key, d_value, d_kv, d_z, floor, N, H,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    q_h: tl.constexpr, q_d: tl.constexpr, k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DECAY: tl.constexpr, MEMORY: tl.constexpr, MEMORY_GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of query, key and value [B, F, N, H, D], and with MEMORY_GRADS those of kv and z, all
    contiguous, of `grad` (contiguous) and what went forward, which it computes again.

    Grid: (B * N * H,). A program does what `attention_kernel` does, in one pass through the columns.
    """
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = tile_mask(frames, dims, F, D)
    q = tl.load(query + b * q_b + n * q_n + h * q_h + tile_at(frames, dims, q_f, q_d), mask=whole, other=0.0)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + tile_at(frames, dims, k_f, k_d), mask=whole, other=0.0)
    q_softmax, k_softmax = softmax(q, dims[None, :] < D, 1), softmax(k, frames[:, None] < F, 0)
    p, s = q_softmax.to(q.dtype), k_softmax.to(q.dtype)
    scores = dot(p, tl.trans(s)).to(q.dtype)
    d_p, d_scores = tl.zeros([FP, DP], tl.float32), tl.zeros([FP, FP], tl.float32)
    if MEMORY:
        z_row = tl.load(z + b * z_b + n * z_n + h * z_h + dims * z_d, mask=dims < D, other=0.0).to(tl.float32)
        raw = 1 + DECAY * tl.sum(q_softmax * z_row[None, :], axis=1)
        normaliser = tl.maximum(raw, floor)
        d_normaliser = tl.zeros([FP], tl.float32)
    value += b * v_b + n * v_n + h * v_h
    kv += b * m_b + n * m_n + h * m_h
    window = (b * F * N + n) * H * D + h * D  # where this location and head start in [B, F, N, H, D]
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = tile_mask(frames, columns, F, D)
        at = window + tile_at(frames, columns, N * H * D, 1)
        v = tl.load(value + tile_at(frames, columns, v_f, v_d), mask=inside, other=0.0).to(q.dtype)
        d_numerator = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if MEMORY:
            d_numerator = d_numerator / normaliser[:, None]
        g = d_numerator.to(q.dtype)
        d_scores += dot(g, tl.trans(v))
        tl.store(d_value + at, dot(tl.trans(scores), g).to(d_value.dtype.element_ty), mask=inside)
        if MEMORY:
            square = tile_mask(dims, columns, D, D)
            m = tl.load(kv + tile_at(dims, columns, m_d, m_e), mask=square, other=0.0).to(q.dtype)
            numerator = dot(scores, v) + DECAY * dot(p, m)
            d_normaliser -= tl.sum(d_numerator * numerator, axis=1) / normaliser
            d_p += DECAY * dot(g, tl.trans(m))
            if MEMORY_GRADS:
                d_m = DECAY * dot(tl.trans(p), g)
                d_m_at = d_kv + program * D * D + tile_at(dims, columns, D, 1)
                tl.store(d_m_at, d_m.to(d_kv.dtype.element_ty), mask=square)
    d_scores = d_scores.to(q.dtype)
    d_p += dot(d_scores, s)
    if MEMORY:
        d_normaliser = tl.where(raw >= floor, d_normaliser, 0.0)
        d_p += DECAY * d_normaliser[:, None] * z_row[None, :]
        if MEMORY_GRADS:
            d_z_row = DECAY * tl.sum(q_softmax * d_normaliser[:, None], axis=0)
            tl.store(d_z + program * D + dims, d_z_row.to(d_z.dtype.element_ty), mask=dims < D)
    whole_at = window + tile_at(frames, dims, N * H * D, 1)
    d_q = q_softmax * (d_p - tl.sum(q_softmax * d_p, axis=1, keep_dims=True))
    tl.store(d_query + whole_at, d_q.to(d_query.dtype.element_ty), mask=whole)
    d_s = dot(tl.trans(d_scores), p)
    d_k = k_softmax * (d_s - tl.sum(k_softmax * d_s, axis=0, keep_dims=True))
    tl.store(d_key + whole_at, d_k.to(d_key.dtype.element_ty), mask=whole)


def launch(kernel, query, key, value, kv, z, *others, **constants):
    """Runs one of these kernels, or its untuned `fn`.

    Args:
        kernel: `attention_kernel` or `attention_backward_kernel`.
        query, key, value: [B, F, N, H, D].
        kv, z: the memory, [B, N, H, D, D] and [B, N, H, D], or None twice.
        others: tensors that it takes after these.
        constants: of its own.
    """
    memory = (query, query) if kv is None else (kv, z)  # pointers that nothing reads, where there is no memory
    with torch.cuda.device_of(query):
        kernel[grid(query)](
            query, key, value, *memory, *others, MIN_NORMALISER * query.shape[-1] ** 0.5,
            **strides(q=query, k=key, v=value, m=kv, z=z), **sizes(query),
            DECAY=DECAY, MEMORY=kv is not None, **constants,
        )  # fmt: skip


@operator("memory_attention(Tensor query, Tensor key, Tensor value, Tensor? kv, Tensor? z) -> Tensor")
def _attention(query, key, value, kv, z):
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch(attention_kernel, query, key, value, kv, z, out)
    return out


@_attention.register_fake
def _(query, key, value, kv, z):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@operator(
    "memory_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? kv, Tensor? z,"
    " bool memory_grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _attention_backward(grad, query, key, value, kv, z, memory_grads):
    grads = _empty_gradients(grad, query, key, value, kv, z, memory_grads)
    given = (query, key, value, kv, z, grad.contiguous())
    launch(attention_backward_kernel, *given, *grads, MEMORY_GRADS=memory_grads)
    return grads


@_attention_backward.register_fake
def _empty_gradients(grad, query, key, value, kv, z, memory_grads):
    window = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    given = (kv, z) if memory_grads else (query[:0], query[:0])
    return *window, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    memory_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    *window, kv, z = _attention_backward(grad, *ctx.saved_tensors, memory_grads)
    return *window, *((kv, z) if memory_grads else (None, None))


_attention.register_autograd(_gradients, setup_context=_save)


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
    """As `naive.memory_attention`, for what `supports` allows. The memory may have a dtype of its own."""
    check_window(query, key, value)
    if memory is None:
        return _attention(query, key, value, None, None)
    batch, _, locations, heads, dim = query.shape
    kv, z = memory
    kv, z = kv.expand(batch, locations, heads, dim, dim), z.expand(batch, locations, heads, dim)
    return _attention(query, key, value, kv, z)
