"""Sums of a window for the memory: `naive.memory_sums` and `naive.update_memory`, forward and backward.

With s = softmax of the keys over the frames, v the values, w_j = gamma^(F - j) the weight of frame j = 1, ..., F:

    kv = (w w s)^T v        z = sum over j of w_j s_j        an update: kv <- factor kv + kv', z <- factor z + z'

For gradients g_kv, g_z of them:

    d_v = (w w s) g_kv        d_s = w (w v g_kv^T + g_z)        d_k = s (d_s - sum over j of s_j d_s_j)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...release import DECAY
from ..naive import Memory
from .tools import (
    check_window,
    dot,
    first,
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

_LOG2_DECAY = math.log2(DECAY)


@triton.jit
def weights(frames, F: tl.constexpr, LOG2_DECAY: tl.constexpr):
    """Weights [FP, 1] of frames [FP], counted from 0: gamma^(F - 1 - frame), and 0 from F on."""
    return tl.where(frames < F, tl.exp2(LOG2_DECAY * (F - 1 - frames).to(tl.float32)), 0.0)[:, None]


@triton.jit
def sums_kernel(
    key, value, kv, z, factor, N, H,
    k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    LOG2_DECAY: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes kv [B, N, H, D, D] and z [B, N, H, D] of key and value [B, F, N, H, D]; with UPDATE, adds them to `factor`
    times what is there.

    Grid: (B * N * H,). A program holds one location's and head's keys [FP, DP] (F and D padded) and passes through the
    columns of values and memory in blocks of BLOCK. Strides are given by axis (`tools.strides`).
    """
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = tile_mask(frames, dims, F, D)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + tile_at(frames, dims, k_f, k_d), mask=whole, other=0.0)
    weight = weights(frames, F, LOG2_DECAY)
    s = softmax(k, frames[:, None] < F, 0) * weight
    z_at = z + b * z_b + n * z_n + h * z_h + dims * z_d
    z_row = tl.sum(s, axis=0)
    if UPDATE:
        z_row += factor * tl.load(z_at, mask=dims < D, other=0.0).to(tl.float32)
    tl.store(z_at, z_row.to(z.dtype.element_ty), mask=dims < D)
    s = tl.trans((s * weight).to(k.dtype))  # kv holds the weight of key and value both
    value += b * v_b + n * v_n + h * v_h
    kv += b * m_b + n * m_n + h * m_h
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = tile_mask(frames, columns, F, D)
        v = tl.load(value + tile_at(frames, columns, v_f, v_d), mask=inside, other=0.0).to(k.dtype)
        m = dot(s, v)
        m_at = kv + tile_at(dims, columns, m_d, m_e)
        square = tile_mask(dims, columns, D, D)
        if UPDATE:
            m += factor * tl.load(m_at, mask=square, other=0.0).to(tl.float32)
        tl.store(m_at, m.to(kv.dtype.element_ty), mask=square)


# Twice the same kernel: what writes over its input could be tuned on copies only, and a memory is large.
_sums = tune(window_variants)(sums_kernel)
_update = first(window_variants)(sums_kernel)


@tune(window_variants)
@triton.jit
def sums_backward_kernel(
    g_kv, g_z, key, value, d_key, d_value, N, H,
    k_b, k_f, k_n, v_b, v_f, v_n,
    k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    LOG2_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of key and value [B, F, N, H, D], contiguous, of g_kv [B, N, H, D, D] and g_z [B, N, H, D],
    contiguous.

    Grid: (B * N * H,). A program does what `sums_kernel` does, in one pass through the columns.
    """
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = tile_mask(frames, dims, F, D)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + tile_at(frames, dims, k_f, k_d), mask=whole, other=0.0)
    weight = weights(frames, F, LOG2_DECAY)
    k_softmax = softmax(k, frames[:, None] < F, 0)
    s = (k_softmax * weight * weight).to(k.dtype)
    d_s = tl.zeros([FP, DP], tl.float32)
    value += b * v_b + n * v_n + h * v_h
    window = (b * F * N + n) * H * D + h * D  # where this location and head start in [B, F, N, H, D]
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = tile_mask(frames, columns, F, D)
        v = tl.load(value + tile_at(frames, columns, v_f, v_d), mask=inside, other=0.0).to(k.dtype)
        g_at = g_kv + program * D * D + tile_at(dims, columns, D, 1)
        g = tl.load(g_at, mask=tile_mask(dims, columns, D, D), other=0.0).to(k.dtype)
        at = window + tile_at(frames, columns, N * H * D, 1)
        tl.store(d_value + at, dot(s, g).to(d_value.dtype.element_ty), mask=inside)
        d_s += dot(v, tl.trans(g))
    g_row = tl.load(g_z + program * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    d_s = weight * (weight * d_s + g_row[None, :])
    d_k = k_softmax * (d_s - tl.sum(k_softmax * d_s, axis=0, keep_dims=True))
    tl.store(d_key + window + tile_at(frames, dims, N * H * D, 1), d_k.to(d_key.dtype.element_ty), mask=whole)


def _launch(kernel, key, value, kv, z, factor, update):
    with torch.cuda.device_of(key):
        kernel[grid(key)](
            key, value, kv, z, factor,
            **strides(k=key, v=value, m=kv, z=z), **sizes(key), LOG2_DECAY=_LOG2_DECAY, UPDATE=update,
        )  # fmt: skip


@operator("memory_sums(Tensor key, Tensor value) -> (Tensor, Tensor)")
def _window_sums(key, value):
    kv, z = _empty_sums(key, value)
    _launch(_sums, key, value, kv, z, 0.0, False)
    return kv, z


@_window_sums.register_fake
def _empty_sums(key, value):
    batch, _, locations, heads, dim = key.shape
    shape = (batch, locations, heads, dim)
    return tuple(torch.empty(x, dtype=key.dtype, device=key.device) for x in ((*shape, dim), shape))


@operator("memory_sums_backward(Tensor g_kv, Tensor g_z, Tensor key, Tensor value) -> (Tensor, Tensor)")
def _window_sums_backward(g_kv, g_z, key, value):
    grads = _empty_gradients(g_kv, g_z, key, value)
    with torch.cuda.device_of(key):
        sums_backward_kernel[grid(key)](
            g_kv.contiguous(), g_z.contiguous(), key, value, *grads,
            **strides(k=key, v=value), **sizes(key), LOG2_DECAY=_LOG2_DECAY,
        )  # fmt: skip
    return grads


@_window_sums_backward.register_fake
def _empty_gradients(g_kv, g_z, key, value):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, g_kv, g_z):
    return _window_sums_backward(g_kv, g_z, *ctx.saved_tensors)


_window_sums.register_autograd(_gradients, setup_context=_save)


@operator("update_memory(Tensor(a!) kv, Tensor(b!) z, float factor, Tensor key, Tensor value) -> ()", ("kv", "z"))
def _carry(kv, z, factor, key, value):
    _launch(_update, key, value, kv, z, factor, True)


@_carry.register_fake
def _(kv, z, factor, key, value):
    return None


def memory_sums(key: Tensor, value: Tensor) -> Memory:
    """As `naive.memory_sums`, for what `supports` allows."""
    check_window(key, value)
    return _window_sums(key, value)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
    """As `naive.update_memory`, for what `supports` allows. The memory may have a dtype of its own."""
    check_window(key, value)
    kv, z = memory
    if kv.shape != (*z.shape, z.shape[-1]) or z.shape != key[:, 0].shape:
        raise ValueError(f"a memory of {tuple(kv.shape)} and {tuple(z.shape)} for keys of {tuple(key.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (kv, z, key, value)):
        for part, window in zip(memory, memory_sums(key, value)):
            part.mul_(factor).add_(window)
    else:
        _carry(kv, z, factor, key, value)
    return memory
