"""Weights from disk into networks: strict about names and shapes, free about the number format."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import shown
from ..errors import CheckpointError
from ..files import open_regular
from .reading import MAX_DEPTH, WEIGHTS, read_json, reading

__all__ = ["WEIGHTS", "built", "check_fit", "load_strict", "on_meta", "read_json", "read_tensors"]
_Module = TypeVar("_Module", bound=nn.Module)
_SHARED = 16  # times the size of their file that the tensors of a torch file may have, where some share their numbers


def read_tensors(path: Path) -> dict:
    """Reads a .safetensors file (memory-mapped), or a torch file with `weights_only=True` (which runs no code from the
    file).

    Returns the dictionary as stored; a torch file may nest further dictionaries. Raises CheckpointError when the file
    is absent, damaged, or holds anything but tensors and plain containers.
    """
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(file):  # torch compresses nothing, who packs a file again a little
            unpacked = sum(part.file_size for part in zipfile.ZipFile(file).infolist())
            if unpacked > _SHARED * size:
                raise CheckpointError(f"{path} has {size} bytes and says that {unpacked} are in it")
        file.seek(0)
        stored = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, not a dictionary of tensors")
    _check_stored(stored, path, _SHARED * size)
    return {name: value for name, value in stored.items() if isinstance(name, str)}  # others hold no tensors


def _check_stored(stored: dict, path: Path, room: int) -> None:
    """Names are texts, tensors plain ones in memory, and all of them not much larger than their file, as views may be
    that repeat one number.
    """
    level, seen = [stored], set()
    for _ in range(MAX_DEPTH):
        following = []
        for item in (item for part in level for item in part.items()):
            value = item[1]
            if isinstance(value, Tensor):
                if not isinstance(item[0], str):
                    raise CheckpointError(f"{path} holds a tensor under {shown(item[0])}, which is no name")
                if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                    raise CheckpointError(f"{path}: {item[0]} is no plain tensor")
                room -= value.numel() * value.element_size()
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                following.append(value)
        level = following
    if level:
        raise CheckpointError(f"{path} cannot be read: it is nested too deep")
    if room < 0:
        raise CheckpointError(f"{path} holds tensors {_SHARED} times as large as the file itself")


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError, listing the first ten keys that are missing, unexpected, misshapen or of whole numbers.

    Args:
        source: where the tensors come from, for the message.
    """
    own = module.state_dict()
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    for name, value in tensors.items():
        if name not in own:
            problems.append(f"unexpected {str(name)[:200]}")
        elif not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        elif value.is_floating_point() != own[name].is_floating_point() or value.is_complex():
            problems.append(f"{name} holds {value.dtype}, expected {own[name].dtype}")
    if problems:
        listed = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit {type(module).__name__}:\n  {listed}{more}")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Fills `module` with `tensors`.

    They are copied, keeping the module's dtype and device; a module on the meta device takes them over as they are.

    Raises:
        CheckpointError: as `check_fit`.
    """
    check_fit(module, tensors, source)
    on_meta = any(value.is_meta for value in module.state_dict().values())
    module.load_state_dict(tensors, strict=True, assign=on_meta)


def built(
    build: Callable[[], _Module],
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> _Module:
    """The module of `build` with these tensors, ready to run. It takes no memory before they are found to fit.

    Raises:
        CheckpointError: as `check_fit`, or where nothing can be built.
    """
    module = on_meta(build, source)
    check_fit(module, tensors, source)
    copies = {name: value.to(device, dtype, copy=True).contiguous() for name, value in tensors.items()}
    module.load_state_dict(copies, assign=True)
    return module.eval()


def on_meta(build: Callable[[], _Module], source: Path) -> _Module:
    """The module of `build`, without memory; CheckpointError where the settings beside `source` make none."""
    try:
        with torch.device("meta"), _Unfilled():
            return build()
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}, which gives the network's size") from error
    except Exception as error:  # what libraries raise for settings that contradict each other is theirs to choose
        raise CheckpointError(f"no network fits {source} and the configuration beside it: {shown(error)}") from error


class _Unfilled(TorchFunctionMode):
    """Leaves weights as they are made: filling those without memory is of no use, and has torch import its compiler."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.normal_ or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
