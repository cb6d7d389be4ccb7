"""Networks that wait in host memory, so that another one may have the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_away: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def leave(module: nn.Module) -> None:
    """Moves a network's weights from the device to host memory, pinned for a CUDA device. Nothing for one that is there
    already, or on the CPU."""
    tensors = _tensors(module)
    if not tensors or all(tensor.device.type == "cpu" for tensor in tensors):
        return
    _away.add(module)  # first: of a network that an interrupt left halfway, `enter` brings back the rest
    for tensor in tensors:
        with _as_made(tensor):
            tensor.data = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def enter(module: nn.Module, device: torch.device) -> None:
    """Brings a network back that had left; nothing for any other one, whose place is someone else's affair."""
    if module not in _away:
        return
    for tensor in _tensors(module):
        with _as_made(tensor):
            tensor.data = tensor.data.to(device, non_blocking=True)
    _away.discard(module)


@contextmanager
def _as_made(tensor: Tensor) -> Iterator[None]:
    """In inference mode if the tensor was made in it, else outside: what moved there could never be trained again."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
