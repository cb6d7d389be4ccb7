"""The kernels in Triton, forward and backward: one pass over what each of them reads and writes. One file an operation.

Same functions and shapes as `naive`, in fp32, fp16 or bf16 with fp32 accumulation (products of fp32 are full fp32).
Inputs may be any strided views; outputs are contiguous, maps channels-last. A program of the attention handles one
location and head, so that queries, keys, values and memory are each read once and nothing is transposed in memory.
Frames and head width are padded to powers of two inside a tile; the D x D memory passes through in blocks of columns,
as all of it would not fit.

The operators are registered with torch (`torch.ops.memo`), so that `torch.compile` keeps them as nodes of its graph.
"""

from __future__ import annotations

import torch

from .. import naive
from .attention import attention_kernel, launch, memory_attention
from .gate import geglu, geglu_linear
from .groups import group_norm
from .norm import add_norm, layer_norm, modulated_norm, norm_kernel
from .residual import add
from .sums import memory_sums, update_memory
from .tools import INTERPRETED, supports

__all__ = [
    "INTERPRETED",
    "add",
    "add_norm",
    "check",
    "geglu",
    "geglu_linear",
    "group_norm",
    "layer_norm",
    "memory_attention",
    "memory_sums",
    "modulated_norm",
    "supports",
    "update_memory",
]


def check(device: torch.device | int) -> None:
    """Compiles and runs the smallest kernels, untuned, on a device; raises whatever stands in the way."""
    x = torch.arange(16.0, device=device)
    out = torch.zeros_like(x)
    with torch.cuda.device_of(x):
        norm_kernel.fn[1, 1](
            x, x, x, x, out, out, 1e-5, 1, 1, x_r=16, x_n=16, y_r=0, y_n=0, shift_s=16, scale_s=16, x_c=1,
            C=16, CP=16, ADD=False, MODULATED=True, BLOCK=1,
        )  # fmt: skip
    wanted = torch.nn.functional.layer_norm(x, (16,)) * (1 + x) + x
    if not torch.allclose(out, wanted, atol=1e-3):
        raise RuntimeError("a Triton kernel gave wrong numbers")
    for dtype in (torch.bfloat16, torch.float16):  # products on tensor cores, which the norm has not
        query, key, value = torch.rand(3, 1, 16, 1, 1, 16, device=device).to(dtype)
        out = torch.zeros_like(query)
        launch(attention_kernel.fn, query, key, value, None, None, out, BLOCK=16)
        wanted = naive.memory_attention(query.float(), key.float(), value.float(), None)
        if not torch.allclose(out.float(), wanted, atol=3e-2):
            raise RuntimeError(f"a Triton kernel gave wrong numbers in {dtype}")
