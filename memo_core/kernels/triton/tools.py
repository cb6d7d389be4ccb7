"""What the kernels share: how they are tuned and registered with torch, and functions that they call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)  # TRITON_INTERPRET=1 when Triton was first imported
MAX_TILE_BYTES = 10 * 1024  # of frames x head width; much more spills, and consumer cards have no room for it
_WIDEN = tl.constexpr(INTERPRETED)

logger = logging.getLogger(__name__)


# --- Tuning: every kernel has an argument BLOCK, how much of something it holds at once -------------------------------

Variants = Callable[[dict[str, Any]], list[tuple[int, int]]]  # (BLOCK, warps) to try, of a kernel's arguments by name


def tune(variants: Variants, stages: int = 1) -> Any:
    """Decorator: the fastest of `variants`, per head width and padded frames (a partial window tunes nothing again).

    Warps decide the order of sums: one machine computes equal bits only where the choice outlives the process.
    """
    if INTERPRETED or "cache_results" not in inspect.signature(triton.autotune).parameters:
        return first(variants, stages)

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


def first(variants: Variants, stages: int = 1) -> Any:
    """Decorator: always the first of `variants`."""
    return triton.heuristics(
        {
            "BLOCK": lambda given: variants(given)[0][0],
            "num_warps": lambda given: variants(given)[0][1],
            "num_stages": lambda _: stages,
        }
    )


def window_variants(given: dict[str, Any]) -> list[tuple[int, int]]:
    """Of kernels over windows, BLOCK columns at once; the first is good anywhere: registers for frames x head width."""
    numbers = given["FP"] * given["DP"] * given["key"].element_size() // 2  # products of fp32 take twice the registers
    warps = min(max(numbers // 1024, 1), 16)
    narrow, wide = min(given["DP"], 32), min(given["DP"], 64)
    return list(dict.fromkeys([(narrow, warps), (wide, warps), (narrow, min(2 * warps, 16))]))


def flat_variants(_: dict[str, Any]) -> list[tuple[int, int]]:
    """Of kernels that treat every number by itself, BLOCK of them at once."""
    return [(1024, 4), (2048, 8), (512, 4)]


# --- Registration with torch ------------------------------------------------------------------------------------------


def operator(schema: str, mutates: tuple[str, ...] = ()) -> Any:
    """Decorator: makes a function `torch.ops.memo.<name>`, of that name, arguments and results.

    Args:
        schema: "name(arguments) -> results", as torch writes them.
        mutates: names of the arguments that it writes.
    """
    name, arguments = schema.split("(", 1)
    return torch.library.custom_op(f"memo::{name}", mutates_args=mutates, schema=f"({arguments}")


def differentiable(operator: Any, stated: Callable[..., Any]) -> None:
    """Gives an operator the gradients of what it states, computed from its inputs once more.

    They take memory and time as torch takes without it.
    """

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


# --- What a launch is given -------------------------------------------------------------------------------------------


def supports(x: Tensor) -> bool:
    """Whether windows like x [B, F, N, H, D] fit: at D 160, 16 frames in fp32 and 32 in bf16; at D 80 twice as many."""
    return x.dtype != torch.float64 and x.shape[1] * x.shape[4] * x.element_size() <= MAX_TILE_BYTES


def check_window(*window: Tensor) -> None:
    """Raises ValueError unless query, key and value have one shape."""
    if len({x.shape for x in window}) > 1:
        raise ValueError(f"query, key and value must have one shape, not {[tuple(x.shape) for x in window]}")


def grid(x: Tensor) -> tuple[int]:
    """A program for each batch row, location and head of x [B, F, N, H, D]."""
    return (x.shape[0] * x.shape[2] * x.shape[3],)


def sizes(x: Tensor) -> dict[str, int]:
    """Of x [B, F, N, H, D], as it is and padded as products of tiles require."""
    _, frames, locations, heads, dim = x.shape
    return {"N": locations, "H": heads, "F": frames, "FP": _padded(frames), "D": dim, "DP": _padded(dim)}


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """By axis: of windows [B, F, N, H, D], of `m` [B, N, H, D, D], of `z` [B, N, H, D]; zeros where there is none."""
    axes = {"m": "bnhde", "z": "bnhd"}
    return {
        f"{name}_{axis}": 0 if tensor is None else tensor.stride(i)
        for name, tensor in tensors.items()
        for i, axis in enumerate(axes.get(name, "bfnhd"))
    }


def dense(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last axis is contiguous."""
    return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in parts)


# --- Functions that kernels call --------------------------------------------------------------------------------------


@triton.jit
def tile_at(rows, columns, row_stride, column_stride):
    """Offsets [R, C] of the numbers at rows [R] and columns [C]."""
    return rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def tile_mask(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of rows [R] x columns [C] lie inside a matrix of ROWS x COLUMNS: [R, C]."""
    return (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)


@triton.jit
def softmax(x, valid, AXIS: tl.constexpr):
    """Softmax of x [R, C] along AXIS over what is valid, in fp32."""
    x = tl.where(valid, x.to(tl.float32), float("-inf"))
    x = tl.exp(x - tl.max(x, axis=AXIS, keep_dims=True))
    return x / tl.sum(x, axis=AXIS, keep_dims=True)


@triton.jit
def dot(a, b):
    """a [R, K] times b [K, C], added up in fp32."""
    if _WIDEN:  # the interpreter would multiply the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
