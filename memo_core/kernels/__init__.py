"""Memory-guided linear attention, norms and gates: `naive` states them, `triton` and `fused` are fast.

Tensors on CUDA go to Triton where it can be imported and compiles for the card, all others to `fused`. It is imported
when the first tensor on CUDA comes. MEMO_KERNELS=torch in the environment, read when this package is imported, turns
Triton off.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import devices
from . import fused, shapes
from .naive import Memory

__all__ = [
    "add",
    "add_norm",
    "as_shapes",
    "fuses",
    "geglu",
    "geglu_linear",
    "group_norm",
    "layer_norm",
    "memory_attention",
    "memory_sums",
    "modulated_norm",
    "runs_on",
    "update_memory",
]

logger = logging.getLogger(__name__)

# Whether Triton is there for the cards that this torch is built for; whether it runs on them, the first use tells.
EXPECTED = (
    os.environ.get("MEMO_KERNELS") != "torch"
    and torch.backends.cuda.is_built()
    and importlib.util.find_spec("triton") is not None
)
_triton: Any = None  # from the first use on


@functools.cache
def _checked(index: int) -> bool:
    """Whether Triton runs on a card."""
    global _triton
    if not EXPECTED:
        return False
    try:
        if not devices.of(torch.device("cuda", index)).triton:
            version = ".".join(map(str, torch.cuda.get_device_capability(index)))
            raise RuntimeError(f"compute capability {version} has no tensor cores that Triton makes code for")
        from . import triton

        with torch.no_grad():
            triton.check(index)
        _triton = triton
    except Exception as error:  # no C compiler, a driver too old, a Triton that this code does not know, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("No Triton on GPU %d, plain torch instead; MEMO_KERNELS=torch ends this line: %s", index, reason)
        return False
    return True


def _runs(index: int) -> bool:  # the compiler takes no cached function for a constant
    return _checked(index)


# As torch.compiler.assume_constant_result, which would import the compiler: tracing asks it, and does not trace it.
_runs.__dict__["_dynamo_marked_constant"] = True


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there; on the meta device whether they are there, as on a new card."""
    return device.type == "meta" or (device.type == "cuda" and _runs(device.index or 0))


_counting: ContextVar[bool] = ContextVar("counting", default=False)


@contextmanager
def as_shapes() -> Iterator[None]:
    """Inside, tensors without data go through the kernels as on a card: only what those allocate is made."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


def _kernels(x: Tensor, windows: bool = False) -> ModuleType:
    """Those for tensors like x, which may be of windows [B, F, N, H, D]."""
    if x.is_meta:
        return shapes if _counting.get() else fused
    if not x.is_cuda or x.dtype == torch.float64 or not _runs(x.get_device()):
        return fused
    return fused if windows and not _triton.supports(x) else _triton


def memory_attention(query: Tensor, key: Tensor, value: Tensor, memory: Memory | None) -> Tensor:
    """As `naive.memory_attention`."""
    return _kernels(query, windows=True).memory_attention(query, key, value, memory)


def memory_sums(key: Tensor, value: Tensor) -> Memory:
    """As `naive.memory_sums`."""
    return _kernels(key, windows=True).memory_sums(key, value)


def update_memory(memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
    """As `naive.update_memory`."""
    return _kernels(key, windows=True).update_memory(memory, factor, key, value)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.modulated_norm`; where Triton runs, in the number format of the shift."""
    return _kernels(x).modulated_norm(x, shift, scale, eps)


def fuses(x: Tensor) -> bool:
    """Whether what follows runs as kernels of its own for x.

    It does without gradients or autocast, uncompiled, where Triton runs. Elsewhere torch's own operators do it, and the
    compiler fuses better by itself.
    """
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled() or torch.compiler.is_compiling())
    return plain and _kernels(x) is not fused


def geglu(x: Tensor) -> Tensor:
    """As `naive.geglu`."""
    return _kernels(x).geglu(x)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `naive.geglu_linear`."""
    return _kernels(x).geglu_linear(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As `naive.layer_norm`."""
    return _kernels(x).layer_norm(x, weight, bias, eps)


def add_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, modulated: bool
) -> tuple[Tensor, Tensor]:
    """As `naive.add_norm`."""
    return _kernels(x).add_norm(x, y, shift, scale, eps, dtype, modulated)


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """As `naive.add`."""
    return _kernels(x).add(x, y, dtype)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """As `naive.group_norm`; channels-last in memory where `fuses`."""
    return _kernels(x).group_norm(x, groups, weight, bias, eps, shift, silu)
