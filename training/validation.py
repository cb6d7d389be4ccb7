"""The loss on clips that a run holds out: of the same samples, under the same noise, at the same noise levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .batches import HeldOut

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of five bins: the error of one tells nothing of another's


@torch.no_grad()
def validate(model: nn.Module, data: HeldOut, count: int, accelerator: Any) -> dict[str, float]:
    """Mean loss of the first `count` samples: `validation` over all noise levels, `validation_0.1` at one of them.

    Every process takes its share of the samples, and as many as the others; those of damaged data do not count.

    Args:
        model: answers a batch with (loss, error), as in training; wrapped by accelerate.
        data: the clips held out.
        count: how many samples.
        accelerator: accelerate's.
    """
    sums = torch.zeros(len(LEVELS), 2, device=accelerator.device)
    processes = accelerator.num_processes
    for turn in range(-(-count // processes)):
        number = turn * processes + accelerator.process_index
        batch = data[number % count].to(accelerator.device)
        for place, level in enumerate(LEVELS):
            loss, error = model(replace(batch, sigma=torch.full_like(batch.sigma, level)))
            if number < count and torch.isfinite(error).all():
                sums[place] += torch.stack([loss.float().mean(), torch.ones_like(sums[place, 1])])
    sums = accelerator.reduce(sums, "sum")
    means = (sums[:, 0] / sums[:, 1]).tolist()
    return {"validation": sum(means) / len(means)} | {f"validation_{s:g}": mean for s, mean in zip(LEVELS, means)}
