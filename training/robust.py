"""The robust filter: which samples a step leaves out, and what share of every noise level it keeps (MEMO section 4.3).

The paper leaves out samples whose loss suddenly exceeds 0.1 where it usually is about 0.03. But the error of a velocity
grows towards clean pictures, with 1 / sigma^2 as soon as the noise outweighs what cannot be known, so one limit for all
noise levels leaves out good samples of low noise for ever and lets bad ones of high noise pass. "quantile" compares a
sample with what is usual near its own noise level. Bins of noise levels are as likely as each other, so that all of
them soon know that. The first is wide: in it, as in all, errors are those of the clean estimate, which do not grow
towards low noise.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import losses
from .batches import Batch
from .config import ConfigError, Loss

BINS = 16  # of sigma, equally likely
DRAWS = 2**16  # of sigma, of which the bins' borders are quantiles
WINDOW = 256  # samples that a bin remembers
LEAST = 16  # samples without which a bin does not know what is usual: a median of so many errs by about a sixth
KEPT = 2  # column of `judged`
FILE = "robust.safetensors"


def borders_of(config: Loss) -> Tensor:
    """From 0 to 1, [BINS + 1]: between two of them falls one in `BINS` of the noise levels that are drawn.

    Many may be one and the same level, such as 1; they belong to the last bin that begins there.
    """
    drawn = losses.draw_sigma(DRAWS, config, torch.Generator().manual_seed(0)).float()
    borders = drawn.quantile(torch.linspace(0, 1, BINS + 1))
    borders[0], borders[-1] = 0, 1
    return borders


def judged(bins: Tensor, error: Tensor, kept: Tensor, exempt: Tensor, loss: Tensor) -> Tensor:
    """What the processes tell each other of their samples, [B, 5] of [B] each; the loss of one left out is 0."""
    columns = (bins, error, kept, exempt, torch.where(kept, loss.detach(), 0))
    return torch.stack([column.float() for column in columns], dim=1)


def write_dropped(path: Path, step: int, batch: Batch, error: Tensor, limit: Tensor, kept: Tensor) -> None:
    """Adds a line for each sample of a micro-step that was left out; `error`, `limit` and `kept` are [B]."""
    if bool(kept.all()):
        return
    figures = torch.stack([error, limit, batch.sigma.mean(dim=1)], dim=1).tolist()
    with open(path, "a", encoding="utf-8") as file:
        for key, (off, most, sigma), stays in zip(batch.keys, figures, kept.tolist(), strict=True):
            if not stays:
                row = {"step": step, "key": key, "error": off, "limit": most, "sigma": round(sigma, 4)}
                file.write(json.dumps(row) + "\n")


class RobustFilter:
    """What is usual near each noise level, and so how far off a sample may be.

    It remembers the last `WINDOW` samples of each bin, kept or not: were those left out forgotten, every limit would
    lower the next one, and where errors rise for all (when further parts begin to learn) no sample would pass any more.
    A quantile does not mind how bad the bad ones are, and a median moves little as long as few are: with 5% of them it
    is the good ones' 53rd percentile at most.

    Every process is shown the samples of all, so all judge alike.
    """

    def __init__(self, config: Loss) -> None:
        self.config = config
        self.borders = borders_of(config)
        self.errors = torch.full((BINS, WINDOW), math.nan)
        self.kept = torch.zeros(BINS, WINDOW, dtype=torch.bool)
        self.seen = torch.zeros(BINS, dtype=torch.int64)

    def kept_with(self, accelerator: Any) -> RobustFilter:
        """Itself, from now on saved and loaded with an accelerator's state."""

        def save(models: Any, weights: Any, folder: str) -> None:
            if accelerator.is_main_process:
                self.save(Path(folder))

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder)))
        return self

    @property
    def active(self) -> bool:
        """Whether it may ever leave out a sample that is not damaged."""
        return not math.isinf(self.config.robust_threshold)

    def bin_of(self, sigma: Tensor) -> Tensor:
        """Number [B] of the bin of each sample's noise level, the mean of its frames' [B, F]."""
        return torch.bucketize(sigma.float().mean(dim=1), self.borders[1:-1].to(sigma.device), right=True)

    def limits(self, step: int) -> Tensor:
        """Greatest error [BINS] with which a sample of each bin stays in a step; infinite where none is left out."""
        config = self.config
        if step < config.robust_from or not self.active:
            return torch.full((BINS,), math.inf)
        if config.robust_measure != "quantile":
            return torch.full((BINS,), config.robust_threshold)
        usual = torch.nanquantile(self.errors, config.robust_quantile, dim=1)
        return torch.where(self.seen >= LEAST, config.robust_factor * usual, math.inf)

    def note(self, judged: Tensor) -> tuple[int, int, float]:
        """Remembers what `judged` says of a step's samples, [N, 5], of all processes. Exempt and damaged ones say
        nothing of what is usual.

        Returns:
            How many samples stay, of how many, and the sum of their losses.
        """
        for number, error, stays, exempt, _ in judged.tolist():
            if exempt or not math.isfinite(error):
                continue
            row, place = int(number), int(self.seen[int(number)]) % WINDOW
            self.errors[row, place], self.kept[row, place] = error, bool(stays)
            self.seen[row] += 1
        return int(judged[:, KEPT].sum()), len(judged), float(judged[:, -1].sum())

    def shares(self) -> list[float | None]:
        """Share of each bin's remembered samples that were kept; None where there are none."""
        counts = self.seen.clamp(max=WINDOW).tolist()
        return [
            round(stayed / count, 3) if count else None
            for stayed, count in zip(self.kept.sum(dim=1).tolist(), counts, strict=True)
        ]

    def figures(self) -> dict[str, float]:
        """`shares` that are known by their bins' ranges of sigma, for trackers; empty where none can be left out."""
        return {f"kept_by_sigma/{name}": share for name, share in self._named()} if self.active else {}

    def row(self) -> dict[str, dict[str, float]]:
        """The same for a line of log.jsonl."""
        return {"kept_by_sigma": dict(self._named())} if self.active else {}

    def _named(self) -> list[tuple[str, float]]:
        ranges = [f"{low:.3f}-{high:.3f}" for low, high in pairwise(self.borders.tolist())]
        return [(name, share) for name, share in zip(ranges, self.shares(), strict=True) if share is not None]

    def why_nothing_stays(self) -> str:
        """What to tell who finds every sample left out."""
        config = self.config
        if config.robust_measure == "quantile":
            return f"their errors exceed {config.robust_factor} times what was usual at their noise levels"
        return f"loss.robust_threshold={config.robust_threshold} is below all their errors"

    def save(self, folder: Path) -> None:
        """Writes what it remembers into a folder."""
        save_file(self._state(), folder / FILE)

    def _state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("borders", "errors", "kept", "seen")}

    def load(self, folder: Path) -> None:
        """Takes what `save` wrote into the folder; begins anew where there is nothing, as in runs of older versions.

        Raises:
            ConfigError: the file is not what `save` writes.
        """
        if not (folder / FILE).is_file():
            return
        state = load_file(folder / FILE)
        for name, value in self._state().items():
            found = state.get(name)
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                raise ConfigError(f"{folder / FILE} has no {name} of {list(value.shape)}: delete it to begin anew")
        self.borders, self.errors, self.kept, self.seen = (state[name] for name in self._state())
