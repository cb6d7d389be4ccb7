"""Reading weights and settings from disk: strict about names and shapes, free about the number format."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names it


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not settings by name")
    return content


def read_tensors(path: Path) -> dict:
    """Reads a .safetensors file (memory-mapped), or a torch file with `weights_only=True` (which runs no code from the
    file).

    Returns the dictionary as stored; a torch file may nest further dictionaries. Raises CheckpointError when the file
    is absent, damaged, or holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors, which are never run; "
            "re-save it with tensors only"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, not a dictionary of tensors")
    return stored


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Fills `module` with `tensors`.

    They are copied, keeping the module's dtype and device; a module on the meta device takes them over as they are.

    Args:
        source: where the tensors come from, for the message.

    Raises:
        CheckpointError: listing the first ten missing, unexpected or misshapen keys.
    """
    own = module.state_dict()
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    for name, value in tensors.items():
        if name not in own:
            problems.append(f"unexpected {name}")
        elif not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
    if problems:
        listed = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit {type(module).__name__}:\n  {listed}{more}")
    module.load_state_dict(tensors, strict=True, assign=any(value.is_meta for value in own.values()))
