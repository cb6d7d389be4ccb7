"""Layer norms: `naive.modulated_norm`, forward and backward, `naive.layer_norm` and `naive.add_norm`.

    y = (x - mean(x)) / d        d = sqrt(variance(x) + eps)        out = y w + shift

mean and variance over C; w is 1 + scale where the norm is modulated. `add_norm` first adds what a residual brings to x.
For gradients g of out:

    d_shift = sum of g        d_scale = sum of g y        d_x = (g w - mean(g w) - y mean(g w y)) / d
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import naive
from .tools import dense, differentiable, operator, tune

_CHUNK = 64  # rows whose sums one program takes; the programs' sums are added in a fixed order


def row_variants(given: dict[str, Any]) -> list[tuple[int, int]]:
    """BLOCK rows at once; the first is good anywhere."""
    warps = min(max(given["CP"] // 512, 1), 16)
    return [(4, warps), (1, warps), (2, min(2 * warps, 16))]


@tune(row_variants)
@triton.jit
def norm_kernel(
    x, y, shift, scale, total, out, eps, N, rows, x_r, x_n, y_r, y_n, shift_s, scale_s,
    x_c: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ADD: tl.constexpr, MODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out [R, N, C], contiguous: the norm of x [R, N, C] with shift and scale [S, C]; with ADD, of x + y, which
    it writes to `total`. With MODULATED the weight is 1 + scale, else scale.

    Grid: (ceil(rows / BLOCK), S), `rows` being the R * N / S that share a shift and a scale. A program normalises BLOCK
    of them, whole (C padded to CP).
    """
    s, columns = tl.program_id(1).to(tl.int64), tl.arange(0, CP)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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


@tune(row_variants)
@triton.jit
def norm_backward_kernel(
    grad, x, scale, d_x, d_shift, d_scale, eps, N, rows, x_r, x_n, scale_s,
    x_c: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a modulated norm: d_x [R, N, C], contiguous, and sums over CHUNK rows of those of shift
    and scale, [S, ceil(rows / CHUNK), C] in fp32.

    Grid: (ceil(rows / CHUNK), S), rows as in `norm_kernel`. A program passes through its CHUNK rows by BLOCK at once.
    """
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


def _launch(x, y, shift, scale, total, out, eps, modulated):
    samples, rows, width = shift.shape[0], x.shape[0] // shift.shape[0] * x.shape[1], x.shape[2]
    with torch.cuda.device_of(x):
        norm_kernel[lambda given: (triton.cdiv(rows, given["BLOCK"]), samples)](
            x, x if y is None else y, shift, scale, out if total is None else total, out, eps, x.shape[1], rows,
            x_r=x.stride(0), x_n=x.stride(1), y_r=0 if y is None else y.stride(0), y_n=0 if y is None else y.stride(1),
            shift_s=shift.stride(0), scale_s=scale.stride(0), x_c=x.stride(2),
            C=width, CP=triton.next_power_of_2(width), ADD=y is not None, MODULATED=modulated,
        )  # fmt: skip


@operator("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
def _norm(x, shift, scale, eps):
    out = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    _launch(x, None, shift, scale, None, out, eps, True)
    return out


@_norm.register_fake
def _(x, shift, scale, eps):
    return torch.empty(x.shape, dtype=shift.dtype, device=x.device)


@operator(
    "modulated_norm_backward(Tensor grad, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(grad, x, shift, scale, eps):
    samples, rows, width = shift.shape[0], x.shape[0] // shift.shape[0] * x.shape[1], x.shape[2]
    parts = (samples, triton.cdiv(rows, _CHUNK), width)
    d_shift, d_scale = (torch.empty(parts, dtype=torch.float32, device=x.device) for _ in range(2))
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        norm_backward_kernel[parts[1::-1]](
            grad.contiguous(), x, scale, d_x, d_shift, d_scale, eps, x.shape[1], rows,
            x_r=x.stride(0), x_n=x.stride(1), scale_s=scale.stride(0), x_c=x.stride(2),
            C=width, CP=triton.next_power_of_2(width), CHUNK=_CHUNK,
        )  # fmt: skip
    return d_x, d_shift.sum(dim=1).to(shift.dtype), d_scale.sum(dim=1).to(scale.dtype)


@_norm_backward.register_fake
def _(grad, x, shift, scale, eps):
    return tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (x, shift, scale))


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    return *_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


_norm.register_autograd(_gradients, setup_context=_save)


@operator("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
def _layer_norm(x, weight, bias, eps):
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch(x, None, bias[None], weight[None], None, out, eps, False)
    return out


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty(x.shape, dtype=weight.dtype, device=x.device)


differentiable(_layer_norm, naive.layer_norm)


@operator(
    "add_norm(Tensor x, Tensor y, Tensor shift, Tensor scale, float eps, ScalarType dtype, bool modulated)"
    " -> (Tensor, Tensor)"
)
def _add_norm(x, y, shift, scale, eps, dtype, modulated):
    total, out = _empty_sum_and_norm(x, y, shift, scale, eps, dtype, modulated)
    _launch(x, y, shift, scale, total, out, eps, modulated)
    return total, out


@_add_norm.register_fake
def _empty_sum_and_norm(x, y, shift, scale, eps, dtype, modulated):
    return tuple(torch.empty(x.shape, dtype=kind, device=x.device) for kind in (dtype, y.dtype))


differentiable(_add_norm, naive.add_norm)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.modulated_norm`, in the number format of the shift."""
    if x.shape[0] % shift.shape[0] or shift.shape != scale.shape or shift.shape[1:] != x.shape[2:]:
        shapes = [tuple(part.shape) for part in (x, shift, scale)]
        raise ValueError(f"x, shift and scale are {shapes}; wanted [R, N, C] and twice [a divisor of R, C]")
    return _norm(x, *dense(shift, scale), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.layer_norm`, of [R, N, C]."""
    return _layer_norm(x, weight, bias, eps)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    """As `naive.add_norm`."""
    return _add_norm(x, *dense(y, shift, scale), eps, dtype, modulated)
