"""Writes networks in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replace_whole
from ..nets.weights import WEIGHTS
from ..tensorfile import save_tensors


def save_module(folder: Path, module: nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Writes config.json and the weights as the released layout has them."""
    save_weights(folder, module.state_dict(), config, dtype)


def save_weights(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> None:
    """As `save_module`, of weights by name. Files are replaced, never written into: others may be linked to them."""
    folder.mkdir(parents=True, exist_ok=True)
    with replace_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
