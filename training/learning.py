"""What learns in a stage, the optimiser that changes it, and the average of what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import lora
from .config import ConfigError, Stage
from .nets import Nets, checkpoint_gradients


def prepare_to_learn(nets: Nets, config: Stage) -> dict[str, list[nn.Parameter]]:
    """Freezes what does not learn, puts in adapters and recomputation as asked; returns what learns, by part."""
    if config.lora.rank:
        nets.requires_grad_(False).to(torch.bfloat16 if config.lora.base == "bf16" else torch.float32)
        settings = config.lora
        groups = {"lora": lora.add(nets, settings.rank, settings.alpha, settings.targets, settings.dropout)}
    else:
        parts = nets.parts()
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in config.train)
        groups = {name: parts[name] for name in config.train}
    if config.engine.gradient_checkpointing:
        checkpoint_gradients(nets)
    return groups


def adamw(groups: list[dict[str, Any]], config: Stage, device: torch.device) -> torch.optim.Optimizer:
    """AdamW as the stage has it; ConfigError where 8-bit moments are asked for and bitsandbytes is not installed."""
    settings = config.optimizer
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.bits == 32:
        # On CUDA one pass over parameters and moments; torch's default there makes several, and copies of them all.
        return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None, **arguments)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.bits=8 needs bitsandbytes: pip install bitsandbytes, or set optimizer.bits=32"
        ) from error
    return AdamW8bit(groups, **arguments)


def moments(numbers: int, bits: int) -> int:
    """Bytes of Adam's two moments of a tensor: float32, or a byte and a scale per 256 (bitsandbytes; not for tensors
    below 4096 numbers).
    """
    return 8 * numbers if bits == 32 or numbers < 4096 else 2 * (numbers + 4 * -(-numbers // 256))


class Average:
    """Moving average of what learns, in float32.

    Args:
        parameters: what learns.
        decay: of the average, in [0, 1].
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = parameters
        self._average = EMAModel(parameters, decay=decay, foreach=True)

    @classmethod
    def of(cls, parameters: list[nn.Parameter], config: Stage) -> Average | None:
        """As the stage has it; None where it has none."""
        return cls(parameters, config.engine.ema) if config.engine.ema and not config.lora.rank else None

    @property
    def steps(self) -> int:
        return self._average.optimization_step

    def step(self) -> None:
        self._average.step(self._parameters)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights in place of the model's, for a while."""
        self._average.store(self._parameters)
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            self._average.restore(self._parameters)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({str(i): value.contiguous() for i, value in enumerate(self._average.shadow_params)}, path)

    def load(self, path: Path, steps: int, device: torch.device) -> None:
        from safetensors.torch import load_file

        shadow = load_file(path, device=str(device))
        self._average.shadow_params = [shadow[str(i)] for i in range(len(shadow))]
        self._average.optimization_step = steps
