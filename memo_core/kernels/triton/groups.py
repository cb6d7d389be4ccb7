"""Group norm of maps: `naive.group_norm`.

    out = silu((x + shift - mean) / sqrt(variance + eps) weight + bias)

mean and variance over a group of channels and all pixels, in three passes: statistics of each channel over pieces of
the map, those joined for each group, and the norm. With n numbers of mean m and sum of squared differences q here and
n', m', q' there, both together have (Chan et al. 1979)

    m <- m + (m' - m) n' / (n + n')        q <- q + q' + (m' - m)^2 n n' / (n + n')

The gradients are those of `naive.group_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import naive
from .tools import dense, differentiable, operator, tune

PIXELS = 128  # of a map, whose statistics one program takes; the programs' are joined in a fixed order


def pixel_variants(given: dict[str, Any]) -> list[tuple[int, int]]:
    """BLOCK pixels at once, all channels of each."""
    warps = min(max(given["CP"] // 128, 1), 8)
    block = max(1, min(16, 8192 // given["CP"]))
    return list(dict.fromkeys([(block, warps), (max(1, block // 2), warps), (block, min(2 * warps, 16))]))


@tune(pixel_variants)
@triton.jit
def group_statistics_kernel(
    x, shift, mean, spread, pixels, each, x_r, x_p, x_c, shift_s,
    C: tl.constexpr, CP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes, of each channel over CHUNK pixels, mean and sum of squared differences, [R, ceil(pixels / CHUNK), C].

    Grid: (ceil(pixels / CHUNK), R). A program passes through its CHUNK pixels of a map of x [R, pixels, C], given by
    its strides, by BLOCK at once (C padded to CP). With SHIFTED, row r // each of shift [S, C] is added to the mean.
    """
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
def join_statistics_kernel(
    mean, spread, found, pixels, chunks, eps,
    C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes mean and 1 / sqrt(variance + eps) of each group, found [R, G, 2], of its channels' statistics.

    Grid: (G, R). A program passes through the chunks of one map by BLOCK at once, all D channels of a group (padded to
    DP) of each.
    """
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


@tune(pixel_variants)
@triton.jit
def group_norm_kernel(
    x, shift, weight, bias, found, out, pixels, each, x_r, x_p, x_c, shift_s,
    C: tl.constexpr, CP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out [R, pixels, C], contiguous, of x [R, pixels, C], given by its strides, and what was found of it.

    Grid: (ceil(pixels / BLOCK), R). A program normalises BLOCK pixels of one map, all channels of each (padded to CP).
    """
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


@operator("group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? shift, bool silu) -> Tensor")
def _group_norm(x, groups, weight, bias, eps, shift, silu):
    rows, width, height, breadth = x.shape
    if x.stride(2) != breadth * x.stride(3):  # pixels one after the other, whatever their distance
        x = x.contiguous(memory_format=torch.channels_last)
    pixels, chunks = height * breadth, triton.cdiv(height * breadth, PIXELS)
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
        group_statistics_kernel[(chunks, rows)](x, given, mean, spread, pixels, each, **where, **sizes, CHUNK=PIXELS)
        join_statistics_kernel[(groups, rows)](
            mean, spread, found, pixels, chunks, eps, C=width, **group,
            DP=triton.next_power_of_2(width // groups), CHUNK=PIXELS, BLOCK=32,
        )  # fmt: skip
        group_norm_kernel[lambda chosen: (triton.cdiv(pixels, chosen["BLOCK"]), rows)](
            x, given, weight, bias, found, out, pixels, each, **where, **sizes, **group, SILU=silu
        )
    return out


@_group_norm.register_fake
def _empty_maps(x, groups, weight, bias, eps, shift, silu):
    rows, width, height, breadth = x.shape
    out = torch.empty((rows, height, breadth, width), dtype=weight.dtype, device=x.device)
    return out.permute(0, 3, 1, 2)


differentiable(_group_norm, naive.group_norm)


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
    return _group_norm(x, groups, weight, bias, eps, None if shift is None else dense(shift)[0], silu)
