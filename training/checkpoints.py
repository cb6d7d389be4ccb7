"""A run's checkpoints: folders in the released layout, with `state/` to go on from beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memo_core.checks import shown

from . import lora, run
from .config import ConfigError, Stage, flatten, from_json, to_json
from .learning import Average
from .logs import truncate
from .nets import Nets, link_encoders
from .reading import fits, read_json

AVERAGE = "average.safetensors"
# What a run has to have in common with the one it goes on from, besides its settings.
_SAME = {"started_from": "the start's weights", "data": "the data", "samples_per_step": "samples per step"}

# Settings that may differ when a stopped run goes on: none of them changes what is learned. Nor do steps, where the
# learning rate does not follow them.
_FREE = ("data.workers", "engine.save_every", "engine.keep", "engine.sample_every", "engine.samples")
_FREE += ("engine.log_every", "engine.trackers", "engine.gradient_checkpointing")


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")


def latest(out: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    found = checkpoints(out)
    return found[-1] if found else None


def begun(folder: Path) -> tuple[Stage, dict[str, Any]]:
    """Settings and record of a run's checkpoint; ConfigError where they are not such."""
    settings = from_json(json.dumps(read_json(folder / "config.json", ConfigError)))
    record = read_json(folder / "training.json", ConfigError)
    kinds = {"step": int, "seconds": float, "averaged_steps": int}
    for name in (*kinds, *_SAME):
        if not fits(record.get(name), kinds.get(name, int | str)):
            raise ConfigError(f"{folder / 'training.json'} is not a run's record: {name} is {shown(record.get(name))}")
    return settings, record


class Checkpoints:
    """Writes and reads those of one run.

    Args:
        out: the run's folder.
        config: of the stage.
        accelerator: accelerate's, which keeps weights, optimiser and random numbers.
        nets: what learns, for the released layout.
        average: of the weights, which checkpoints hold in their place; None: the weights themselves.
        started_from, data: digests of the weights that the run began with, and of its data.
        encoders: checkpoint whose VAE and encoders complete those of the run; None leaves them out.
        base: with adapters, the digest of the checkpoint they belong to.
    """

    def __init__(
        self,
        out: Path,
        config: Stage,
        accelerator: Any,
        nets: Nets,
        average: Average | None,
        started_from: str,
        data: str,
        encoders: Path | None,
        base: str,
    ) -> None:
        self.out, self.config, self.accelerator, self.nets, self.average = out, config, accelerator, nets, average
        self.started_from, self.data, self.encoders, self.base = started_from, data, encoders, base

    def folder(self, step: int) -> Path:
        return self.out / f"checkpoint-{step:07d}"

    def resume(self) -> tuple[int, float]:
        """Goes on from the newest one, if there is one; the run's steps and seconds until then.

        Raises:
            ConfigError: the run was begun with other settings, weights or data.
        """
        from accelerate.utils import broadcast_object_list

        accelerator = self.accelerator
        names: list[Any] = [None]
        if accelerator.is_main_process:
            for leftover in self.out.glob("*.tmp"):
                shutil.rmtree(leftover)
            found = latest(self.out)
            names = [found and found.name]
        if (name := broadcast_object_list(names)[0]) is None:
            return 0, 0.0
        found = self.out / name
        if not found.is_dir():
            raise ConfigError(
                f"process {accelerator.process_index} does not see {found}: --out must be a shared folder"
            )
        record = self._check(found)
        accelerator.load_state(str(found / "state"))
        step, seconds = record["step"], float(record["seconds"])
        if self.average is not None:
            self.average.load(found / "state" / AVERAGE, record["averaged_steps"], accelerator.device)
        if accelerator.is_main_process:
            truncate(self.out / "log.jsonl", step)
        return step, seconds

    def _check(self, found: Path) -> dict[str, Any]:
        """The checkpoint's record; ConfigError where this run is another one."""
        settings, record = begun(found)
        before, now = flatten(settings), flatten(self.config)
        free = _FREE + (("steps",) if self.config.optimizer.schedule == "constant" else ())
        other = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k not in free and before[k] != now[k]]
        mine = self._record(record["step"], record["seconds"])
        other += [f"{what} was {record[k]}, is {mine[k]}" for k, what in _SAME.items() if record[k] != mine[k]]
        if other:
            raise ConfigError(f"{self.out} was begun otherwise: {'; '.join(other)}. Use another --out, or delete it")
        return record

    def _record(self, step: int, seconds: float) -> dict[str, Any]:
        accelerator, optimizer = self.accelerator, self.config.optimizer
        return {
            "stage": self.config.name,
            "step": step,
            "seconds": round(seconds, 1),
            "averaged_steps": 0 if self.average is None else self.average.steps,
            "started_from": self.started_from,
            "data": self.data,
            "samples_per_step": optimizer.batch * optimizer.accumulate * accelerator.num_processes,
            "processes": accelerator.num_processes,
            "hardware": run.hardware(),
            "torch": torch.__version__,
        }

    def save(self, model: nn.Module, step: int, seconds: float) -> Path:
        """Writes `checkpoint-<step>` whole or not at all, then deletes all but the last `engine.keep`."""
        accelerator, folder = self.accelerator, self.folder(step)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished / "state"))
        with Average.swapped(self.average):
            weights = accelerator.get_state_dict(model)  # gathered, where processes hold parts of it
            if accelerator.is_main_process:
                self._export(unfinished, {name.removeprefix("nets."): value for name, value in weights.items()})
        if accelerator.is_main_process:
            if self.average is not None:
                self.average.save(unfinished / "state" / AVERAGE)
            (unfinished / "config.json").write_text(to_json(self.config), encoding="utf-8")
            record = json.dumps(self._record(step, seconds), indent=1) + "\n"
            (unfinished / "training.json").write_text(record, encoding="utf-8")
            os.replace(unfinished, folder)
            for old in checkpoints(self.out)[: -self.config.engine.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return folder

    def _export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        if self.config.lora.rank:
            lora.save(self.nets, folder / "adapter.safetensors", self.base, to_json(self.config), state=weights)
            return
        self.nets.save(folder, torch.float32, weights)
        if self.encoders is not None:
            link_encoders(self.encoders, folder)
