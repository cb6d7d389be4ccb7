"""Networks that wait in host memory, so that another one may have the device.

Weights hardly ever change, so what was copied to the host once stays there: a network that leaves again is let go of on
the device, and nothing is copied but what comes back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .host_memory import HostMemory


@dataclass
class _Home:
    """A network's weights in host memory.

    copied: fingerprints of what lies there; None where nothing does yet.
    """

    memories: list[HostMemory]
    views: list[Tensor]
    copied: list[int | None]


_homes: weakref.WeakKeyDictionary[nn.Module, _Home] = weakref.WeakKeyDictionary()
_away: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def start_on_host(module: nn.Module) -> None:
    """Of a network whose weights were read into host memory, though it belongs on a device: `to_device` brings it."""
    tensors = _tensors(module)
    _homes[module] = _Home([], [tensor.data for tensor in tensors], [None] * len(tensors))
    _away.add(module)


def to_host(module: nn.Module) -> None:
    """Moves a network's weights from the device to host memory, locked for a CUDA device.

    Nothing for one that is there already, or on the CPU.
    """
    tensors = _tensors(module)
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return
    home = _homes.get(module)
    like = [(tensor.shape, tensor.dtype) for tensor in tensors]
    if home is None or not home.memories or [(view.shape, view.dtype) for view in home.views] != like:
        home = _homes[module] = _Home([], list(tensors), [None] * len(tensors))
        for made in (False, True):  # views of a tensor made in inference mode are such tensors, too
            places = [place for place, tensor in enumerate(tensors) if tensor.is_inference() is made]
            with torch.inference_mode(made):
                memory, views = HostMemory.for_([tensors[place] for place in places], device)
            home.memories.append(memory)
            for place, view in zip(places, views):
                home.views[place] = view
    _away.add(module)  # first: of a network that an interrupt left halfway, `to_device` brings back the rest
    here = [place for place, (t, view) in enumerate(zip(tensors, home.views)) if t.data_ptr() != view.data_ptr()]
    for place, now in zip(here, _fingerprints([tensors[place] for place in here])):
        tensor, view = tensors[place], home.views[place]
        with _as_made(tensor):
            if home.copied[place] != now:
                view.copy_(tensor)
                home.copied[place] = now
            tensor.data = view


def to_device(module: nn.Module, device: torch.device) -> None:
    """Brings a network back that had left; nothing for any other one, whose place is someone else's affair."""
    if module not in _away:
        return
    views = {view.data_ptr(): view for view in _homes[module].views if view.numel()}
    for tensor in _tensors(module):
        if tensor.device != device:  # also what somebody has replaced since
            with _as_made(tensor):
                tensor.data = views.get(tensor.data_ptr(), tensor.data).to(device, non_blocking=True)
    _away.discard(module)


def free_host_copy(module: nn.Module) -> None:
    """Gives a network's host memory back where the network is on the device."""
    if module not in _away:
        _homes.pop(module, None)


def _fingerprints(tensors: list[Tensor]) -> list[int]:
    """A number for each of them that changes when theirs do.

    All bits added up, and those in even places once more, where they lie.
    """
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        flat = flat.view(_WHOLE[flat.itemsize])
        sums.append(flat.sum(dtype=torch.int64) + 3 * flat[::2].sum(dtype=torch.int64))
    # One answer from each device that has some: of a network that came back in part, the CPU's, too.
    found: list[int] = [0] * len(sums)
    for device in {part.device for part in sums}:
        places = [place for place, part in enumerate(sums) if part.device == device]
        for place, number in zip(places, torch.stack([sums[place] for place in places]).tolist()):
            found[place] = number
    return found


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def _as_made(tensor: Tensor) -> Iterator[None]:
    """In inference mode if the tensor was made in it, else outside: what moved there could never be trained again."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
