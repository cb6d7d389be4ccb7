"""The kernels in Triton, forward and backward: one pass over what each of them reads and writes.

Same functions and shapes as `naive`, in fp32, fp16 or bf16 with fp32 accumulation (products of fp32 are full fp32).
Inputs may be any strided views; outputs are contiguous, maps channels-last. A program of the attention handles one
location and head, so that queries, keys, values and memory are each read once and nothing is transposed in memory.
Frames and head width are padded to powers of two inside a tile; the D x D memory passes through in blocks of columns,
as all of it would not fit.

The operators are registered with torch (`torch.ops.memo`), so that `torch.compile` keeps them as nodes of its graph.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..release import DECAY
from . import naive
from .naive import MIN_NORMALISER

MAX_TILE_BYTES = 10 * 1024  # of frames x head width; much more spills, and consumer cards have no room for it
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)  # TRITON_INTERPRET=1 when Triton was first imported
_WIDEN = tl.constexpr(INTERPRETED)
_Variants = Callable[[dict[str, Any]], list[tuple[int, int]]]

logger = logging.getLogger(__name__)


def supports(x: Tensor) -> bool:
    """Whether windows like x [B, F, N, H, D] fit: at D 160, 16 frames in fp32 and 32 in bf16; at D 80 twice as many."""
    return x.dtype != torch.float64 and x.shape[1] * x.shape[4] * x.element_size() <= MAX_TILE_BYTES


def _tune(variants: _Variants, stages: int = 1) -> Any:
    """Decorator: the fastest of `variants`, per head width and padded frames (a partial window tunes nothing again).

    Warps decide the order of sums: one machine computes equal bits only where the choice outlives the process.
    """
    if INTERPRETED or "cache_results" not in inspect.signature(triton.autotune).parameters:
        return _first(variants, stages)

    def chosen(_: list[triton.Config], named: dict[str, Any], **given: Any) -> list[triton.Config]:
        given |= named
        tried = variants(given)
        sizes = {size: given[size] for size in ("D", "FP", "C") if size in given}
        logger.info(
            "Triton kernel for %s: the best of %d, as kept before or tried now (seconds each)", sizes, len(tried)
        )
        return [triton.Config({"BLOCK": block}, num_warps=warps, num_stages=stages) for block, warps in tried]

    def tuned(kernel: Any) -> Any:
        return triton.autotune(
            [triton.Config({"BLOCK": block}) for block in (32, 64)],  # all replaced; of a single one it would try none
            key=[name for name in ("D", "FP", "C") if name in kernel.arg_names],  # from 3.9 on Triton refuses others
            prune_configs_by={"early_config_prune": chosen},
            cache_results=True,
        )(kernel)

    return tuned


def _first(variants: _Variants, stages: int = 1) -> Any:
    """Decorator: always the first of `variants`."""
    return triton.heuristics(
        {
            "BLOCK": lambda given: variants(given)[0][0],
            "num_warps": lambda given: variants(given)[0][1],
            "num_stages": lambda _: stages,
        }
    )


def _columns(given: dict[str, Any]) -> list[tuple[int, int]]:
    """(BLOCK, warps) of kernels over windows, the first good anywhere: registers for frames x padded head."""
    numbers = given["FP"] * given["DP"] * given["key"].element_size() // 2  # products of fp32 take twice the registers
    warps = min(max(numbers // 1024, 1), 16)
    narrow, wide = min(given["DP"], 32), min(given["DP"], 64)
    return list(dict.fromkeys([(narrow, warps), (wide, warps), (narrow, min(2 * warps, 16))]))


def _narrow_columns(given: dict[str, Any]) -> list[tuple[int, int]]:
    """As `_columns`, for gradients of the attention: twice the sums in registers, of which 16 warps have too few."""
    warps = min(2 * _columns(given)[0][1], 8)
    return list(dict.fromkeys([(16, warps), (min(given["DP"], 32), warps)]))


def _rows(given: dict[str, Any]) -> list[tuple[int, int]]:
    """(BLOCK, warps) of the norms, the first good anywhere."""
    warps = min(max(given["CP"] // 512, 1), 16)
    return [(4, warps), (1, warps), (2, min(2 * warps, 16))]


@triton.jit
def _offsets(rows, columns, row_stride, column_stride):
    return rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def _inside(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)


@triton.jit
def _softmax(x, valid, AXIS: tl.constexpr):
    x = tl.where(valid, x.to(tl.float32), float("-inf"))
    x = tl.exp(x - tl.max(x, axis=AXIS, keep_dims=True))
    return x / tl.sum(x, axis=AXIS, keep_dims=True)


@triton.jit
def _dot(a, b):
    if _WIDEN:  # the interpreter would multiply the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@_tune(_columns, stages=2)
@triton.jit
def _attention_kernel(
    query, key, value, kv, z, out, decay, floor, N, H,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    q_h: tl.constexpr, q_d: tl.constexpr, k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = _inside(frames, dims, F, D)
    q = tl.load(query + b * q_b + n * q_n + h * q_h + _offsets(frames, dims, q_f, q_d), mask=whole, other=0.0)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + _offsets(frames, dims, k_f, k_d), mask=whole, other=0.0)
    q_softmax = _softmax(q, dims[None, :] < D, 1)
    p = q_softmax.to(q.dtype)
    scores = _dot(p, tl.trans(_softmax(k, frames[:, None] < F, 0).to(q.dtype))).to(q.dtype)
    if MEMORY:
        # Keys sum to 1 over the window, queries over the width: so does the window's part of the normaliser.
        z_row = tl.load(z + b * z_b + n * z_n + h * z_h + dims * z_d, mask=dims < D, other=0.0).to(tl.float32)
        normaliser = tl.maximum(1 + decay * tl.sum(q_softmax * z_row[None, :], axis=1), floor)
    value += b * v_b + n * v_n + h * v_h
    kv += b * m_b + n * m_n + h * m_h
    out += (b * F * N + n) * H * D + h * D
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = _inside(frames, columns, F, D)
        v = tl.load(value + _offsets(frames, columns, v_f, v_d), mask=inside, other=0.0).to(q.dtype)
        numerator = _dot(scores, v)
        if MEMORY:
            m = tl.load(kv + _offsets(dims, columns, m_d, m_e), mask=_inside(dims, columns, D, D), other=0.0)
            numerator = (numerator + decay * _dot(p, m.to(q.dtype))) / normaliser[:, None]
        tl.store(out + _offsets(frames, columns, N * H * D, 1), numerator.to(out.dtype.element_ty), mask=inside)


@_tune(_narrow_columns)
@triton.jit
def _attention_backward_kernel(
    grad, query, key, value, kv, z, d_query, d_key, d_value, d_kv, d_z, decay, floor, N, H,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    q_h: tl.constexpr, q_d: tl.constexpr, k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    MEMORY: tl.constexpr, MEMORY_GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = _inside(frames, dims, F, D)
    q = tl.load(query + b * q_b + n * q_n + h * q_h + _offsets(frames, dims, q_f, q_d), mask=whole, other=0.0)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + _offsets(frames, dims, k_f, k_d), mask=whole, other=0.0)
    q_softmax, k_softmax = _softmax(q, dims[None, :] < D, 1), _softmax(k, frames[:, None] < F, 0)
    p, s = q_softmax.to(q.dtype), k_softmax.to(q.dtype)
    scores = _dot(p, tl.trans(s)).to(q.dtype)
    d_p, d_scores = tl.zeros([FP, DP], tl.float32), tl.zeros([FP, FP], tl.float32)
    if MEMORY:
        z_row = tl.load(z + b * z_b + n * z_n + h * z_h + dims * z_d, mask=dims < D, other=0.0).to(tl.float32)
        raw = 1 + decay * tl.sum(q_softmax * z_row[None, :], axis=1)
        normaliser = tl.maximum(raw, floor)
        d_normaliser = tl.zeros([FP], tl.float32)
    value += b * v_b + n * v_n + h * v_h
    kv += b * m_b + n * m_n + h * m_h
    window = (b * F * N + n) * H * D + h * D  # where this location and head start in [B, F, N, H, D]
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = _inside(frames, columns, F, D)
        at = window + _offsets(frames, columns, N * H * D, 1)
        v = tl.load(value + _offsets(frames, columns, v_f, v_d), mask=inside, other=0.0).to(q.dtype)
        d_numerator = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if MEMORY:
            d_numerator = d_numerator / normaliser[:, None]
        g = d_numerator.to(q.dtype)
        d_scores += _dot(g, tl.trans(v))
        tl.store(d_value + at, _dot(tl.trans(scores), g).to(d_value.dtype.element_ty), mask=inside)
        if MEMORY:
            square = _inside(dims, columns, D, D)
            m = tl.load(kv + _offsets(dims, columns, m_d, m_e), mask=square, other=0.0).to(q.dtype)
            numerator = _dot(scores, v) + decay * _dot(p, m)
            d_normaliser -= tl.sum(d_numerator * numerator, axis=1) / normaliser
            d_p += decay * _dot(g, tl.trans(m))
            if MEMORY_GRADS:
                d_m = decay * _dot(tl.trans(p), g)
                d_m_at = d_kv + program * D * D + _offsets(dims, columns, D, 1)
                tl.store(d_m_at, d_m.to(d_kv.dtype.element_ty), mask=square)
    d_scores = d_scores.to(q.dtype)
    d_p += _dot(d_scores, s)
    if MEMORY:
        d_normaliser = tl.where(raw >= floor, d_normaliser, 0.0)
        d_p += decay * d_normaliser[:, None] * z_row[None, :]
        if MEMORY_GRADS:
            d_z_row = decay * tl.sum(q_softmax * d_normaliser[:, None], axis=0)
            tl.store(d_z + program * D + dims, d_z_row.to(d_z.dtype.element_ty), mask=dims < D)
    whole_at = window + _offsets(frames, dims, N * H * D, 1)
    d_q = q_softmax * (d_p - tl.sum(q_softmax * d_p, axis=1, keep_dims=True))
    tl.store(d_query + whole_at, d_q.to(d_query.dtype.element_ty), mask=whole)
    d_s = _dot(tl.trans(d_scores), p)
    d_k = k_softmax * (d_s - tl.sum(k_softmax * d_s, axis=0, keep_dims=True))
    tl.store(d_key + whole_at, d_k.to(d_key.dtype.element_ty), mask=whole)


@triton.jit
def _sums_kernel(
    key, value, kv, z, log2_decay, factor, N, H,
    k_b, k_f, k_n, v_b, v_f, v_n, m_b, m_n, z_b, z_n,
    k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    m_h: tl.constexpr, m_d: tl.constexpr, m_e: tl.constexpr, z_h: tl.constexpr, z_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = _inside(frames, dims, F, D)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + _offsets(frames, dims, k_f, k_d), mask=whole, other=0.0)
    weight = tl.where(frames < F, tl.exp2(log2_decay * (F - 1 - frames).to(tl.float32)), 0.0)[:, None]
    s = _softmax(k, frames[:, None] < F, 0) * weight
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
        inside = _inside(frames, columns, F, D)
        v = tl.load(value + _offsets(frames, columns, v_f, v_d), mask=inside, other=0.0).to(k.dtype)
        m = _dot(s, v)
        m_at = kv + _offsets(dims, columns, m_d, m_e)
        square = _inside(dims, columns, D, D)
        if UPDATE:
            m += factor * tl.load(m_at, mask=square, other=0.0).to(tl.float32)
        tl.store(m_at, m.to(kv.dtype.element_ty), mask=square)


# Twice the same kernel: what writes over its input could be tuned on copies only, and a memory is large.
_sums = _tune(_columns)(_sums_kernel)
_update = _first(_columns)(_sums_kernel)


@_tune(_columns)
@triton.jit
def _sums_backward_kernel(
    g_kv, g_z, key, value, d_key, d_value, log2_decay, N, H,
    k_b, k_f, k_n, v_b, v_f, v_n,
    k_h: tl.constexpr, k_d: tl.constexpr, v_h: tl.constexpr, v_d: tl.constexpr,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, n, h = program // H // N, program // H % N, program % H
    frames, dims = tl.arange(0, FP), tl.arange(0, DP)
    whole = _inside(frames, dims, F, D)
    k = tl.load(key + b * k_b + n * k_n + h * k_h + _offsets(frames, dims, k_f, k_d), mask=whole, other=0.0)
    weight = tl.where(frames < F, tl.exp2(log2_decay * (F - 1 - frames).to(tl.float32)), 0.0)[:, None]
    k_softmax = _softmax(k, frames[:, None] < F, 0)
    s = (k_softmax * weight * weight).to(k.dtype)
    d_s = tl.zeros([FP, DP], tl.float32)
    value += b * v_b + n * v_n + h * v_h
    window = (b * F * N + n) * H * D + h * D
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = _inside(frames, columns, F, D)
        v = tl.load(value + _offsets(frames, columns, v_f, v_d), mask=inside, other=0.0).to(k.dtype)
        g_at = g_kv + program * D * D + _offsets(dims, columns, D, 1)
        g = tl.load(g_at, mask=_inside(dims, columns, D, D), other=0.0).to(k.dtype)
        at = window + _offsets(frames, columns, N * H * D, 1)
        tl.store(d_value + at, _dot(s, g).to(d_value.dtype.element_ty), mask=inside)
        d_s += _dot(v, tl.trans(g))
    g_row = tl.load(g_z + program * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    d_s = weight * (weight * d_s + g_row[None, :])
    d_k = k_softmax * (d_s - tl.sum(k_softmax * d_s, axis=0, keep_dims=True))
    tl.store(d_key + window + _offsets(frames, dims, N * H * D, 1), d_k.to(d_key.dtype.element_ty), mask=whole)


@_tune(_rows)
@triton.jit
def _norm_kernel(
    x, y, shift, scale, total, out, eps, N, rows, x_r, x_n, y_r, y_n, shift_s, scale_s,
    x_c: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ADD: tl.constexpr, MODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    s, columns = tl.program_id(1).to(tl.int64), tl.arange(0, CP)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of those that share a shift and a scale
    inside = (row[:, None] < rows) & (columns[None, :] < C)
    row = s * rows + row
    at = x + (row // N)[:, None] * x_r + (row % N)[:, None] * x_n + columns[None, :] * x_c
    centred = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    out_at = row[:, None] * C + columns[None, :]
    if ADD:
        at = y + (row // N)[:, None] * y_r + (row % N)[:, None] * y_n + columns[None, :]
        centred += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + out_at, centred.to(total.dtype.element_ty), mask=inside)
    centred = tl.where(inside, centred - tl.sum(centred, axis=1, keep_dims=True) / C, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)
    weight = tl.load(scale + s * scale_s + columns, mask=columns < C, other=0.0).to(tl.float32)
    if MODULATED:
        weight += 1
    bias = tl.load(shift + s * shift_s + columns, mask=columns < C, other=0.0).to(tl.float32)
    tl.store(out + out_at, (normed * weight[None, :] + bias[None, :]).to(out.dtype.element_ty), mask=inside)


@_tune(_rows)
@triton.jit
def _norm_backward_kernel(
    grad, x, scale, d_x, d_shift, d_scale, eps, N, rows, x_r, x_n, scale_s,
    x_c: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, columns = tl.program_id(1).to(tl.int64), tl.arange(0, CP)
    weight = 1 + tl.load(scale + s * scale_s + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift_sum, scale_sum = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        row = tl.program_id(0) * CHUNK + start + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (columns[None, :] < C)
        row = s * rows + row
        at = x + (row // N)[:, None] * x_r + (row % N)[:, None] * x_n + columns[None, :] * x_c
        centred = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, centred - tl.sum(centred, axis=1, keep_dims=True) / C, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)
        normed = centred / deviation
        out_at = row[:, None] * C + columns[None, :]
        g = tl.load(grad + out_at, mask=inside, other=0.0).to(tl.float32)
        shift_sum += tl.sum(g, axis=0)
        scale_sum += tl.sum(g * normed, axis=0)
        g = g * weight[None, :]
        along = tl.sum(g * normed, axis=1, keep_dims=True) / C
        d = (g - tl.sum(g, axis=1, keep_dims=True) / C - normed * along) / deviation
        tl.store(d_x + out_at, d.to(d_x.dtype.element_ty), mask=inside)
    part = (s * tl.num_programs(0) + tl.program_id(0)) * C + columns
    tl.store(d_shift + part, shift_sum, mask=columns < C)
    tl.store(d_scale + part, scale_sum, mask=columns < C)


def _operator(schema: str, mutates: tuple[str, ...] = ()) -> Any:
    name, arguments = schema.split("(", 1)
    return torch.library.custom_op(f"memo::{name}", mutates_args=mutates, schema=f"({arguments}")


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """By axis: of windows [B, F, N, H, D], of `m` [B, N, H, D, D], of `z` [B, N, H, D]; zeros where there is none."""
    axes = {"m": "bnhde", "z": "bnhd"}
    return {
        f"{name}_{axis}": 0 if tensor is None else tensor.stride(i)
        for name, tensor in tensors.items()
        for i, axis in enumerate(axes.get(name, "bfnhd"))
    }


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _sizes(x: Tensor) -> dict[str, int]:
    """Of x [B, F, N, H, D], as it is and padded as products of tiles require."""
    _, frames, locations, heads, dim = x.shape
    return {"N": locations, "H": heads, "F": frames, "FP": _padded(frames), "D": dim, "DP": _padded(dim)}


def _grid(x: Tensor) -> tuple[int]:
    return (x.shape[0] * x.shape[2] * x.shape[3],)


def _log2(decay: float) -> float:
    return math.log2(max(decay, 1e-30))  # 0 to the power 0 is 1


def _floor(x: Tensor) -> float:
    # The scale D^-0.5 on queries cancels in the quotient except at the floor, which keeps its released value.
    return MIN_NORMALISER * x.shape[-1] ** 0.5


@_operator("memory_attention(Tensor query, Tensor key, Tensor value, Tensor? kv, Tensor? z, float decay) -> Tensor")
def _attention(query, key, value, kv, z, decay):
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    memory = (query, query) if kv is None else (kv, z)  # a pointer that nothing reads, where there is no memory
    with torch.cuda.device_of(query):
        _attention_kernel[_grid(query)](
            query, key, value, *memory, out, decay, _floor(query),
            **_strides(q=query, k=key, v=value, m=kv, z=z), **_sizes(query), MEMORY=kv is not None,
        )  # fmt: skip
    return out


@_attention.register_fake
def _(query, key, value, kv, z, decay):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@_operator(
    "memory_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? kv, Tensor? z, float decay,"
    " bool memory_grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _attention_backward(grad, query, key, value, kv, z, decay, memory_grads):
    grads = _empty_gradients(grad, query, key, value, kv, z, decay, memory_grads)
    memory = (query, query) if kv is None else (kv, z)
    with torch.cuda.device_of(query):
        _attention_backward_kernel[_grid(query)](
            grad.contiguous(), query, key, value, *memory, *grads, decay, _floor(query),
            **_strides(q=query, k=key, v=value, m=kv, z=z), **_sizes(query),
            MEMORY=kv is not None, MEMORY_GRADS=memory_grads,
        )  # fmt: skip
    return grads


@_attention_backward.register_fake
def _empty_gradients(grad, query, key, value, kv, z, decay, memory_grads):
    window = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    given = (kv, z) if memory_grads else (query[:0], query[:0])
    return *window, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given)


def _save_attention(ctx, inputs, output):
    *tensors, ctx.decay = inputs
    ctx.save_for_backward(*tensors)


def _attention_gradients(ctx, grad):
    memory_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    *window, kv, z = _attention_backward(grad, *ctx.saved_tensors, ctx.decay, memory_grads)
    return *window, *((kv, z) if memory_grads else (None, None)), None


_attention.register_autograd(_attention_gradients, setup_context=_save_attention)


@_operator("memory_sums(Tensor key, Tensor value, float decay) -> (Tensor, Tensor)")
def _window_sums(key, value, decay):
    kv, z = _empty_sums(key, value, decay)
    with torch.cuda.device_of(key):
        _sums[_grid(key)](
            key, value, kv, z, _log2(decay), 0.0, **_strides(k=key, v=value, m=kv, z=z), **_sizes(key), UPDATE=False
        )
    return kv, z


@_window_sums.register_fake
def _empty_sums(key, value, decay):
    batch, _, locations, heads, dim = key.shape
    shape = (batch, locations, heads, dim)
    return tuple(torch.empty(x, dtype=key.dtype, device=key.device) for x in ((*shape, dim), shape))


@_operator("memory_sums_backward(Tensor g_kv, Tensor g_z, Tensor key, Tensor value, float decay) -> (Tensor, Tensor)")
def _window_sums_backward(g_kv, g_z, key, value, decay):
    grads = _empty_sums_gradients(g_kv, g_z, key, value, decay)
    with torch.cuda.device_of(key):
        _sums_backward_kernel[_grid(key)](
            g_kv.contiguous(), g_z.contiguous(), key, value, *grads, _log2(decay),
            **_strides(k=key, v=value), **_sizes(key),
        )  # fmt: skip
    return grads


@_window_sums_backward.register_fake
def _empty_sums_gradients(g_kv, g_z, key, value, decay):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))


def _save_sums(ctx, inputs, output):
    key, value, ctx.decay = inputs
    ctx.save_for_backward(key, value)


def _sums_gradients(ctx, g_kv, g_z):
    return *_window_sums_backward(g_kv, g_z, *ctx.saved_tensors, ctx.decay), None


_window_sums.register_autograd(_sums_gradients, setup_context=_save_sums)


@_operator(
    "update_memory(Tensor(a!) kv, Tensor(b!) z, float factor, Tensor key, Tensor value, float decay) -> ()", ("kv", "z")
)
def _carry(kv, z, factor, key, value, decay):
    with torch.cuda.device_of(key):
        _update[_grid(key)](
            key, value, kv, z, _log2(decay), factor, **_strides(k=key, v=value, m=kv, z=z), **_sizes(key), UPDATE=True
        )


@_carry.register_fake
def _(kv, z, factor, key, value, decay):
    return None


def _launch_norm(x, y, shift, scale, total, out, eps, modulated):
    samples, rows, width = shift.shape[0], x.shape[0] // shift.shape[0] * x.shape[1], x.shape[2]
    with torch.cuda.device_of(x):
        _norm_kernel[lambda given: (triton.cdiv(rows, given["BLOCK"]), samples)](
            x, x if y is None else y, shift, scale, out if total is None else total, out, eps, x.shape[1], rows,
            x_r=x.stride(0), x_n=x.stride(1), y_r=0 if y is None else y.stride(0), y_n=0 if y is None else y.stride(1),
            shift_s=shift.stride(0), scale_s=scale.stride(0), x_c=x.stride(2),
            C=width, CP=triton.next_power_of_2(width), ADD=y is not None, MODULATED=modulated,
        )  # fmt: skip


@_operator("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
def _norm(x, shift, scale, eps):
    out = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    _launch_norm(x, None, shift, scale, None, out, eps, True)
    return out


@_norm.register_fake
def _(x, shift, scale, eps):
    return torch.empty(x.shape, dtype=shift.dtype, device=x.device)


@_operator(
    "modulated_norm_backward(Tensor grad, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(grad, x, shift, scale, eps):
    samples, rows, width = shift.shape[0], x.shape[0] // shift.shape[0] * x.shape[1], x.shape[2]
    chunk = 64  # rows whose sums one program takes; the programs' sums are added in a fixed order
    parts = (samples, triton.cdiv(rows, chunk), width)
    d_shift, d_scale = (torch.empty(parts, dtype=torch.float32, device=x.device) for _ in range(2))
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[parts[1::-1]](
            grad.contiguous(), x, scale, d_x, d_shift, d_scale, eps, x.shape[1], rows,
            x_r=x.stride(0), x_n=x.stride(1), scale_s=scale.stride(0), x_c=x.stride(2),
            C=width, CP=triton.next_power_of_2(width), CHUNK=chunk,
        )  # fmt: skip
    return d_x, d_shift.sum(dim=1).to(shift.dtype), d_scale.sum(dim=1).to(scale.dtype)


@_norm_backward.register_fake
def _(grad, x, shift, scale, eps):
    return tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (x, shift, scale))


def _save_norm(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradients(ctx, grad):
    return *_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


def _differentiable(operator: Any, stated: Callable[..., Any]) -> None:
    """Gives an operator the gradients of what it states, computed from its inputs once more: memory and time as torch
    takes without it."""

    def keep(ctx, inputs, output):
        ctx.given = inputs

    def gradients(ctx, *upstream):
        with torch.enable_grad():
            given = [
                x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in ctx.given
            ]
            made = stated(*given)
            made = made if isinstance(made, tuple) else (made,)
            pairs = [(part, grad) for part, grad in zip(made, upstream) if grad is not None]
            wanted = [x for x in given if isinstance(x, Tensor)]
            found = torch.autograd.grad([p for p, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        found = iter(found)
        return tuple(next(found) if isinstance(x, Tensor) else None for x in given)

    operator.register_autograd(gradients, setup_context=keep)


# --- What a step does between its products: norms, gates, sums -------------------------------------------------------


@_operator("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
def _layer_norm(x, weight, bias, eps):
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch_norm(x, None, bias[None], weight[None], None, out, eps, False)
    return out


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty(x.shape, dtype=weight.dtype, device=x.device)


_differentiable(_layer_norm, naive.layer_norm)


@_operator(
    "add_norm(Tensor x, Tensor y, Tensor shift, Tensor scale, float eps, ScalarType dtype, bool modulated)"
    " -> (Tensor, Tensor)"
)
def _add_norm(x, y, shift, scale, eps, dtype, modulated):
    total, out = _empty_sum_and_norm(x, y, shift, scale, eps, dtype, modulated)
    _launch_norm(x, y, shift, scale, total, out, eps, modulated)
    return total, out


@_add_norm.register_fake
def _empty_sum_and_norm(x, y, shift, scale, eps, dtype, modulated):
    return tuple(torch.empty(x.shape, dtype=kind, device=x.device) for kind in (dtype, y.dtype))


_differentiable(_add_norm, naive.add_norm)


def _flat(_: dict[str, Any]) -> list[tuple[int, int]]:
    """(BLOCK, warps) of what treats every number by itself."""
    return [(1024, 4), (2048, 8), (512, 4)]


@_tune(_flat)
@triton.jit
def _geglu_kernel(x, out, total, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    source = x + (at // C) * (2 * C) + at % C
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + at, (value * gelu).to(out.dtype.element_ty), mask=inside)


@_operator("geglu(Tensor x) -> Tensor")
def _geglu(x):
    out = _empty_geglu(x)
    with torch.cuda.device_of(x):
        _geglu_kernel[lambda given: (triton.cdiv(out.numel(), given["BLOCK"]),)](
            x.contiguous(), out, out.numel(), C=out.shape[-1]
        )
    return out


@_geglu.register_fake
def _empty_geglu(x):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


_differentiable(_geglu, naive.geglu)


def _tiles(_: dict[str, Any]) -> list[tuple[int, int]]:
    """(BLOCK, warps) of the gated product: rows at once; 64 columns of either half besides."""
    return [(128, 8), (64, 4), (128, 4)]


@_tune(_tiles, stages=3)
@triton.jit
def _geglu_linear_kernel(
    x, weight, bias, out, rows, x_m, C: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Programs of the same rows follow each other, so that x comes from memory once and the weights stay in the cache.
    across = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    value, gate = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, C, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = (row[:, None] < rows) & (depth[None, :] < C)
        a = tl.load(x + row[:, None] * x_m + depth[None, :], mask=inside, other=0.0)
        at = weight + column[None, :] * C + depth[:, None]
        inside = (column[None, :] < N) & (depth[:, None] < C)
        value += _dot(a, tl.load(at, mask=inside, other=0.0))
        gate += _dot(a, tl.load(at + N * C, mask=inside, other=0.0))
    value += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    inside = (row[:, None] < rows) & (column[None, :] < N)
    tl.store(out + row[:, None] * N + column[None, :], (value * gelu).to(out.dtype.element_ty), mask=inside)


@_operator("geglu_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def _geglu_linear(x, weight, bias):
    out = _empty_geglu_linear(x, weight, bias)
    width, columns, depth = weight.shape[1], 64, 32
    x = x.reshape(-1, width)
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        _geglu_linear_kernel[
            lambda given: (triton.cdiv(len(x), given["BLOCK"]) * triton.cdiv(out.shape[-1], columns),)
        ](
            x, weight.contiguous(), bias, out, len(x), x.stride(0),
            C=width, N=out.shape[-1], COLUMNS=columns, DEPTH=depth,
        )  # fmt: skip
    return out


@_geglu_linear.register_fake
def _empty_geglu_linear(x, weight, bias):
    return torch.empty((*x.shape[:-1], len(weight) // 2), dtype=x.dtype, device=x.device)


_differentiable(_geglu_linear, naive.geglu_linear)


@_tune(_flat)
@triton.jit
def _add_kernel(x, y, out, total, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@_operator("add(Tensor x, Tensor y, ScalarType dtype) -> Tensor")
def _add(x, y, dtype):
    out = torch.empty_like(x, dtype=dtype)
    y = y if y.stride() == out.stride() else torch.empty_like(out, dtype=y.dtype).copy_(y)
    x = x if x.stride() == out.stride() else torch.empty_like(out, dtype=x.dtype).copy_(x)
    with torch.cuda.device_of(x):
        _add_kernel[lambda given: (triton.cdiv(out.numel(), given["BLOCK"]),)](x, y, out, out.numel(), C=1)
    return out


@_add.register_fake
def _(x, y, dtype):
    return torch.empty_like(x, dtype=dtype)


_differentiable(_add, naive.add)

_PIXELS = 128  # of a map, whose statistics one program takes; the programs' are joined in a fixed order


def _pixels(given: dict[str, Any]) -> list[tuple[int, int]]:
    """(BLOCK, warps) of the group norm's passes: pixels at once, all channels of each."""
    warps = min(max(given["CP"] // 128, 1), 8)
    block = max(1, min(16, 8192 // given["CP"]))
    return list(dict.fromkeys([(block, warps), (max(1, block // 2), warps), (block, min(2 * warps, 16))]))


@_tune(_pixels)
@triton.jit
def _group_statistics_kernel(
    x, shift, mean, spread, pixels, each, x_r, x_p, x_c, shift_s,
    C: tl.constexpr, CP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each channel over CHUNK pixels: their mean, and the sum of squared differences from it (Chan et al. 1979)."""
    r, columns = tl.program_id(1).to(tl.int64), tl.arange(0, CP)
    first = tl.program_id(0) * CHUNK
    channel = columns < C
    count, average, squares = 0.0, tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        pixel = first + start + tl.arange(0, BLOCK)
        inside = (pixel[:, None] < pixels) & channel[None, :]
        at = x + r * x_r + pixel.to(tl.int64)[:, None] * x_p + columns[None, :] * x_c
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        more = tl.minimum(tl.maximum(pixels - first - start, 0), BLOCK).to(tl.float32)
        here = tl.sum(value, axis=0) / tl.maximum(more, 1.0)
        off = tl.where(inside, value - here[None, :], 0.0)
        together = tl.maximum(count + more, 1.0)
        squares += tl.sum(off * off, axis=0) + (here - average) * (here - average) * (count * more / together)
        average += (here - average) * (more / together)
        count += more
    if SHIFTED:
        average += tl.load(shift + (r // each) * shift_s + columns, mask=channel, other=0.0).to(tl.float32)
    at = (r * tl.num_programs(0) + tl.program_id(0)) * C + columns
    tl.store(mean + at, average, mask=channel)
    tl.store(spread + at, squares, mask=channel)


@triton.jit
def _join_statistics_kernel(
    mean, spread, found, pixels, chunks, eps,
    C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of each group, of what the programs found of its channels."""
    r, g = tl.program_id(1).to(tl.int64), tl.program_id(0)
    columns = tl.arange(0, DP)
    count, average, squares = 0.0, 0.0, 0.0
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk[:, None] < chunks) & (columns[None, :] < D)
        at = (r * chunks + chunk)[:, None] * C + g * D + columns[None, :]
        weight = tl.minimum(tl.maximum(pixels - chunk * CHUNK, 0), CHUNK).to(tl.float32)[:, None]
        weight = tl.where(inside, weight, 0.0)
        value = tl.load(mean + at, mask=inside, other=0.0)
        more = tl.sum(tl.sum(weight, axis=1), axis=0)
        here = tl.sum(tl.sum(value * weight, axis=1), axis=0) / tl.maximum(more, 1.0)
        off = value - here
        within = tl.sum(tl.sum(tl.load(spread + at, mask=inside, other=0.0) + off * off * weight, axis=1), axis=0)
        together = tl.maximum(count + more, 1.0)
        squares += within + (here - average) * (here - average) * (count * more / together)
        average += (here - average) * (more / together)
        count += more
    tl.store(found + (r * G + g) * 2, average)
    tl.store(found + (r * G + g) * 2 + 1, 1 / tl.sqrt(squares / count + eps))


@_tune(_pixels)
@triton.jit
def _group_norm_kernel(
    x, shift, weight, bias, found, out, pixels, each, x_r, x_p, x_c, shift_s,
    C: tl.constexpr, CP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r, columns = tl.program_id(1).to(tl.int64), tl.arange(0, CP)
    channel = columns < C
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (pixel[:, None] < pixels) & channel[None, :]
    at = x + r * x_r + pixel.to(tl.int64)[:, None] * x_p + columns[None, :] * x_c
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    of_group = found + (r * G + columns // D) * 2
    average = tl.load(of_group, mask=channel, other=0.0)
    factor = tl.load(of_group + 1, mask=channel, other=0.0)
    factor *= tl.load(weight + columns, mask=channel, other=0.0).to(tl.float32)
    if SHIFTED:
        average -= tl.load(shift + (r // each) * shift_s + columns, mask=channel, other=0.0).to(tl.float32)
    value = (value - average[None, :]) * factor[None, :]
    value += tl.load(bias + columns, mask=channel, other=0.0).to(tl.float32)[None, :]
    if SILU:
        value = value / (1 + tl.exp(-value))
    at = out + (r * pixels + pixel)[:, None] * C + columns[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside)


@_operator(
    "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? shift, bool silu) -> Tensor"
)
def _group_norm(x, groups, weight, bias, eps, shift, silu):
    rows, width, height, breadth = x.shape
    if x.stride(2) != breadth * x.stride(3):  # pixels one after the other, whatever their distance
        x = x.contiguous(memory_format=torch.channels_last)
    pixels, chunks = height * breadth, triton.cdiv(height * breadth, _PIXELS)
    out = _empty_maps(x, groups, weight, bias, eps, shift, silu)
    mean, spread = torch.empty((2, rows, chunks, width), dtype=torch.float32, device=x.device)
    found = torch.empty((rows, groups, 2), dtype=torch.float32, device=x.device)
    given, each = (weight, 1) if shift is None else (shift, rows // shift.shape[0])
    where = {
        "x_r": x.stride(0),
        "x_p": x.stride(3 if breadth > 1 else 2),
        "x_c": x.stride(1),
        "shift_s": given.stride(0),
    }
    sizes = {"C": width, "CP": triton.next_power_of_2(width), "SHIFTED": shift is not None}
    group = {"G": groups, "D": width // groups}
    with torch.cuda.device_of(x):
        _group_statistics_kernel[(chunks, rows)](x, given, mean, spread, pixels, each, **where, **sizes, CHUNK=_PIXELS)
        _join_statistics_kernel[(groups, rows)](
            mean, spread, found, pixels, chunks, eps, C=width, **group,
            DP=triton.next_power_of_2(width // groups), CHUNK=_PIXELS, BLOCK=32,
        )  # fmt: skip
        _group_norm_kernel[lambda chosen: (triton.cdiv(pixels, chosen["BLOCK"]), rows)](
            x, given, weight, bias, found, out, pixels, each, **where, **sizes, **group, SILU=silu
        )
    return out


@_group_norm.register_fake
def _empty_maps(x, groups, weight, bias, eps, shift, silu):
    rows, width, height, breadth = x.shape
    out = torch.empty((rows, height, breadth, width), dtype=weight.dtype, device=x.device)
    return out.permute(0, 3, 1, 2)


_differentiable(_group_norm, naive.group_norm)


def check(device: torch.device | int) -> None:
    """Compiles and runs the smallest kernels, untuned, on a device; raises whatever stands in the way."""
    x = torch.arange(16.0, device=device)
    out = torch.zeros_like(x)
    with torch.cuda.device_of(x):
        _norm_kernel.fn[1, 1](
            x,
            x,
            x,
            x,
            out,
            out,
            1e-5,
            1,
            1,
            x_r=16,
            x_n=16,
            y_r=0,
            y_n=0,
            shift_s=16,
            scale_s=16,
            x_c=1,
            C=16,
            CP=16,
            ADD=False,
            MODULATED=True,
            BLOCK=1,
        )
    wanted = torch.nn.functional.layer_norm(x, (16,)) * (1 + x) + x
    if not torch.allclose(out, wanted, atol=1e-3):
        raise RuntimeError("a Triton kernel gave wrong numbers")
    for dtype in (torch.bfloat16, torch.float16):  # products on tensor cores, which the norm has not
        query, key, value = torch.rand(3, 1, 16, 1, 1, 16, device=device).to(dtype)
        out = torch.zeros_like(query)
        memory = (query, query)  # pointers that nothing reads
        with torch.cuda.device_of(query):
            _attention_kernel.fn[_grid(query)](
                query, key, value, *memory, out, DECAY, _floor(query),
                **_strides(q=query, k=key, v=value, m=None, z=None), **_sizes(query), MEMORY=False, BLOCK=16,
            )  # fmt: skip
        wanted = naive.memory_attention(query.float(), key.float(), value.float(), None)
        if not torch.allclose(out.float(), wanted, atol=3e-2):
            raise RuntimeError(f"a Triton kernel gave wrong numbers in {dtype}")


def _check_window(*window: Tensor) -> None:
    if len({x.shape for x in window}) > 1:
        raise ValueError(f"query, key and value must have one shape, not {[tuple(x.shape) for x in window]}")


def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor] | None, decay: float = DECAY
) -> Tensor:
    """As `naive.memory_attention`, for what `supports` allows. The memory may have a dtype of its own."""
    _check_window(query, key, value)
    if memory is None:
        return _attention(query, key, value, None, None, decay)
    batch, _, locations, heads, dim = query.shape
    kv, z = memory
    kv, z = kv.expand(batch, locations, heads, dim, dim), z.expand(batch, locations, heads, dim)
    return _attention(query, key, value, kv, z, decay)


def memory_sums(key: Tensor, value: Tensor, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """As `naive.memory_sums`, for what `supports` allows."""
    _check_window(key, value)
    return _window_sums(key, value, decay)


def update_memory(
    memory: tuple[Tensor, Tensor], factor: float, key: Tensor, value: Tensor, decay: float = DECAY
) -> tuple[Tensor, Tensor]:
    """As `naive.update_memory`, for what `supports` allows. The memory may have a dtype of its own."""
    _check_window(key, value)
    kv, z = memory
    if kv.shape != (*z.shape, z.shape[-1]) or z.shape != key[:, 0].shape:
        raise ValueError(f"a memory of {tuple(kv.shape)} and {tuple(z.shape)} for keys of {tuple(key.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (kv, z, key, value)):
        for part, window in zip(memory, memory_sums(key, value, decay)):
            part.mul_(factor).add_(window)
    else:
        _carry(kv, z, factor, key, value, decay)
    return memory


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.modulated_norm`, in the number format of the shift."""
    if x.shape[0] % shift.shape[0] or shift.shape != scale.shape or shift.shape[1:] != x.shape[2:]:
        shapes = [tuple(part.shape) for part in (x, shift, scale)]
        raise ValueError(f"x, shift and scale are {shapes}; wanted [R, N, C] and twice [a divisor of R, C]")
    return _norm(x, *_dense(shift, scale), eps)


def _dense(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last axis is contiguous."""
    return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in parts)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.layer_norm`, of [R, N, C]."""
    return _layer_norm(x, weight, bias, eps)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    """As `naive.add_norm`."""
    return _add_norm(x, *_dense(y, shift, scale), eps, dtype, modulated)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """As `naive.add`; the sum lies in memory as x does."""
    return _add(x, y, dtype)


def geglu(x: Tensor) -> Tensor:
    """As `naive.geglu`."""
    return _geglu(x)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `naive.geglu_linear`, in half precision: in float32 torch multiplies faster."""
    return (
        _geglu_linear(x, weight, bias) if x.dtype.itemsize == 2 else _geglu(torch.nn.functional.linear(x, weight, bias))
    )


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """As `naive.group_norm`; what comes back is channels-last in memory."""
    return _group_norm(x, groups, weight, bias, eps, None if shift is None else _dense(shift)[0], silu)
