"""What a device can do, in one table: everything that depends on the kind of device asks here.

| | CPU | CUDA, 8.0 and up | CUDA, 7.x | CUDA, older | ROCm | MPS | XPU |
| --- | --- | --- | --- | --- | --- | --- | --- |
| number format by default | float32 | bfloat16 | float16 | float32 | bfloat16 | float32 | bfloat16 |
| 8-bit floats | yes | yes | yes | yes | yes | no | yes |
| Triton's kernels | no | yes | no | no | yes | no | no |
| fused attention | yes | asked | asked | asked | asked | no | no |
| pinned memory, copies beside | no | yes | yes | yes | yes | no | no |

Before 8.0 Triton makes no code for tensor cores, and bfloat16 is emulated. Whether attention is fused is asked of the
device itself: torch has such kernels for some cards and builds, and for others not. Where it says nothing of free
memory (`free_bytes`), nothing is planned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

TRITON_FROM = (8, 0)  # compute capability


@dataclass(frozen=True, kw_only=True, slots=True)
class Abilities:
    """What a device can do.

    Attributes:
        dtype: the number format that networks run in unless another is asked for.
        fp8: tensors of float8_e4m3fn can be made and read back.
        triton: it is of a kind that Triton's kernels are for; whether they compile there, `kernels` finds out.
        fused_attention: attention in `dtype` never makes the scores of all queries and keys at once.
        pinned: copies from locked host memory run beside computation.
    """

    dtype: torch.dtype
    fp8: bool
    triton: bool
    fused_attention: bool
    pinned: bool


def of(device: torch.device | str) -> Abilities:
    """The abilities of a device; of the meta device, on which released sizes are counted, those of a new CUDA card."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():  # tensors without data, on a machine without a card
        device = torch.device("meta")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _of(device)


@lru_cache
def _of(device: torch.device) -> Abilities:
    if device.type == "meta":
        return _of_card(TRITON_FROM)
    if device.type == "cuda":
        abilities = _of_card(torch.cuda.get_device_capability(device), torch.version.hip is not None)
        return replace(abilities, fused_attention=attention_runs(device, abilities.dtype))
    return Abilities(
        dtype=torch.bfloat16 if device.type == "xpu" else torch.float32,
        fp8=device.type in ("cpu", "xpu"),
        triton=False,
        fused_attention=device.type == "cpu",
        pinned=False,
    )


def _of_card(capability: tuple[int, int], rocm: bool = False) -> Abilities:
    """A CUDA card by its compute capability; of ROCm's numbers, which mean something else, nothing depends."""
    new = rocm or capability >= TRITON_FROM
    dtype = torch.bfloat16 if new else torch.float16 if capability >= (7, 0) else torch.float32
    return Abilities(dtype=dtype, fp8=True, triton=new, fused_attention=True, pinned=True)


FUSED_ATTENTION = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")  # torch's names


@lru_cache
def attention_runs(device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = FUSED_ATTENTION) -> bool:
    """Whether one of torch's fused attention kernels of these names runs there, with a head of the released width."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)]
    try:
        x = torch.zeros(1, 1, 64, 40, device=device, dtype=dtype)
        with sdpa_kernel(backends), torch.inference_mode():
            F.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:  # "No available kernel", or one that was not built for this card
        if "out of memory" in str(error):
            raise
        return False
    return True


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes, counting what torch keeps for itself; of the machine for the CPU.

    None where nobody says.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device.index)[0]  # torch 2.4 wants a number here, or None for the current one
        return free + cached
    if device.type == "mps":
        most = getattr(torch.mps, "recommended_max_memory", None)  # torch 2.5
        return None if most is None else most() - torch.mps.current_allocated_memory()
    if device.type == "xpu":
        info = getattr(torch.xpu, "mem_get_info", None)  # torch 2.6
        if info is None:
            return None
        return info(device)[0] + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    if device.type == "cpu":
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
        except OSError:
            pass
    return None


def empty_cache(device: torch.device) -> None:
    """Gives memory that torch keeps for itself back to the device.

    Pieces of another size than the next ones count as free, but cannot be used for them.
    """
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None and (device.type != "cuda" or torch.cuda.is_initialized()):
        empty()
