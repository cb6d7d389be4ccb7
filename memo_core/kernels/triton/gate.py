"""Gated linear units: `naive.geglu` and `naive.geglu_linear`.

    out = a gelu(b)        [a, b] = x, or x W^T + bias        gelu(b) = b / 2 (1 + erf(b / sqrt(2)))

The gradients are those of the naive functions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import naive
from .tools import differentiable, dot, flat_variants, operator, tune


@triton.jit
def gelu(x):
    """GELU of x of any shape, as torch's exact one."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@tune(flat_variants)
@triton.jit
def geglu_kernel(x, out, total, C: tl.constexpr, BLOCK: tl.constexpr):
    """Writes out [rows, C] of x [rows, 2 C], both contiguous; total = rows * C.

    Grid: (ceil(total / BLOCK),). A program makes BLOCK numbers of out.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    source = x + (at // C) * (2 * C) + at % C
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * gelu(gate)).to(out.dtype.element_ty), mask=inside)


@operator("geglu(Tensor x) -> Tensor")
def _geglu(x):
    out = _empty_geglu(x)
    with torch.cuda.device_of(x):
        geglu_kernel[lambda given: (triton.cdiv(out.numel(), given["BLOCK"]),)](
            x.contiguous(), out, out.numel(), C=out.shape[-1]
        )
    return out


@_geglu.register_fake
def _empty_geglu(x):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


differentiable(_geglu, naive.geglu)


def product_variants(_: dict[str, Any]) -> list[tuple[int, int]]:
    """BLOCK rows at once; COLUMNS of either half besides."""
    return [(128, 8), (64, 4), (128, 4)]


@tune(product_variants, stages=3)
@triton.jit
def geglu_linear_kernel(
    x, weight, bias, out, rows, x_m, C: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out [rows, N], contiguous, of x [rows, C], weight [2 N, C] and bias [2 N]; rows of x lie x_m apart.

    Grid: (ceil(rows / BLOCK) * ceil(N / COLUMNS),). A program makes BLOCK rows x COLUMNS columns of both halves, DEPTH
    of the C at once. Programs of the same rows follow each other, so that x comes from memory once and the weights stay
    in the cache.
    """
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
        value += dot(a, tl.load(at, mask=inside, other=0.0))
        gate += dot(a, tl.load(at + N * C, mask=inside, other=0.0))
    value += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    value *= gelu(gate)
    inside = (row[:, None] < rows) & (column[None, :] < N)
    tl.store(out + row[:, None] * N + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@operator("geglu_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def _geglu_linear(x, weight, bias):
    out = _empty_geglu_linear(x, weight, bias)
    width, columns, depth = weight.shape[1], 64, 32
    x = x.reshape(-1, width)
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        geglu_linear_kernel[
            lambda given: (triton.cdiv(len(x), given["BLOCK"]) * triton.cdiv(out.shape[-1], columns),)
        ](
            x, weight.contiguous(), bias, out, len(x), x.stride(0),
            C=width, N=out.shape[-1], COLUMNS=columns, DEPTH=depth,
        )  # fmt: skip
    return out


@_geglu_linear.register_fake
def _empty_geglu_linear(x, weight, bias):
    return torch.empty((*x.shape[:-1], len(weight) // 2), dtype=x.dtype, device=x.device)


differentiable(_geglu_linear, naive.geglu_linear)


def geglu(x: Tensor) -> Tensor:
    """As `naive.geglu`."""
    return _geglu(x)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `naive.geglu_linear`, in half precision: in float32 torch multiplies faster."""
    if x.dtype.itemsize == 2:
        return _geglu_linear(x, weight, bias)
    return _geglu(torch.nn.functional.linear(x, weight, bias))
