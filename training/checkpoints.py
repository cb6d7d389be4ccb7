"""A run's checkpoints: folders whose `state/` it goes on from.

The state is written often, the weights in the released layout, beside it, rarely: the last checkpoint of a run has
them (`engine.export_every`: others, too), and `training.export` reads those of any.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memo_core.checks import shown

from . import disk, lora, run
from .config import ConfigError, Stage, flatten, from_json, to_json
from .learning import Average
from .logs import truncate
from .nets import Nets, link_encoders
from .reading import fits, read_json
from .shards import Shards

STATE, WEIGHTS, AVERAGE, SIZES = "state", "model.safetensors", "average.safetensors", "sizes.json"
LEARNED = "learned.json"
# What a run has to have in common with the one it goes on from, besides its settings.
_SAME = {"started_from": "the start's weights", "data": "the data", "samples_per_step": "samples per step"}

# Settings that may differ when a stopped run goes on: none of them changes what is learned. Nor do steps, where the
# learning rate does not follow them.
_FREE = ("data.workers", "engine.save_every", "engine.keep", "engine.sample_every", "engine.samples")
_FREE += ("engine.log_every", "engine.trackers", "engine.gradient_checkpointing")
_FREE += ("engine.save_minutes", "engine.export_every")
_FREE += ("engine.guidance", "engine.validated")


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
    history = record.setdefault("history", [])
    if not fits(history, list[dict[str, int | str]]) or not all(fits(data.get("step"), int) for data in history):
        raise ConfigError(f"{folder / 'training.json'} is not a run's record: history is {shown(history)}")
    return settings, record


def learned_before(out: Path, data: Path) -> frozenset[str]:
    """Keys of the clips that the run in `out` has trained on before the data in these shards came.

    Raises:
        ConfigError: its state says so in no way that makes sense. ShardError: the data cannot be used.
    """
    found = latest(out)
    if found is None or not (path := found / STATE / LEARNED).is_file():
        return frozenset()
    told = read_json(path, ConfigError)
    if not isinstance(told.get("data"), str) or not all(fits(told.get(k), list[str]) for k in ("before", "now")):
        raise ConfigError(f"{path} does not say what the run has learned from: it is {shown(told)}")
    return frozenset(told["before"] if told["data"] == Shards(data).digest else told["before"] + told["now"])


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
        size: of a checkpoint.
        always: exports every checkpoint. Adapters are small, and of weights that processes hold parts of the state is
            in parts, too.

    Attributes:
        new_data: whether a run that was begun with other data may go on.
        history: the data that the run had before: their digests, and the steps at which others came.
        learned: keys of the clips trained on in the data before, and in these; None where nothing is held out.
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
        size: disk.CheckpointSize,
        always: bool,
    ) -> None:
        self.out, self.config, self.accelerator, self.nets, self.average = out, config, accelerator, nets, average
        self.started_from, self.data, self.encoders, self.base = started_from, data, encoders, base
        self.size, self.always = size, always
        self.new_data, self.history = False, list[dict[str, Any]]()
        self.learned: tuple[list[str], list[str]] | None = None

    def folder(self, step: int) -> Path:
        return self.out / f"checkpoint-{step:07d}"

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest one, from which the run goes on, and its record; None where it begins.

        Raises:
            ConfigError: the run was begun with other settings, weights or data.
        """
        from accelerate.utils import broadcast_object_list

        accelerator = self.accelerator
        names: list[Any] = [None]
        if accelerator.is_main_process:
            for leftover in self.out.glob("checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            found = latest(self.out)
            names = [found and found.name]
        if (name := broadcast_object_list(names)[0]) is None:
            return None
        found = self.out / name
        if not found.is_dir():
            raise ConfigError(
                f"process {accelerator.process_index} does not see {found}: --out must be a shared folder"
            )
        if not (found / STATE).is_dir():
            raise ConfigError(
                f"{found} holds weights and no {STATE}/ to go on from: use another --out, with --start {found}"
            )
        return found, self._check(found)

    def load(self, found: Path, record: dict[str, Any]) -> None:
        """Takes over what `find` found."""
        self.accelerator.load_state(str(found / STATE))
        if self.average is not None:
            self.average.load(found / STATE / AVERAGE, record["averaged_steps"], self.accelerator.device)
        if self.accelerator.is_main_process:
            for name in ("log.jsonl", "validation.jsonl"):
                truncate(self.out / name, record["step"])

    def require_room(self) -> None:
        """DiskError where all checkpoints of the run do not find room; says how much they take."""
        if self.accelerator.is_main_process:
            print(disk.plan(self.size, self.config, self.out, self.always), file=sys.stderr)
        remedy = "free some, keep fewer (engine.keep), or use another --out"
        more = disk.most(self.size, self.config, self.always) - disk.taken(checkpoints(self.out))
        disk.require_room(more, self.out, remedy)

    def _check(self, found: Path) -> dict[str, Any]:
        """The checkpoint's record; ConfigError where this run is another one."""
        settings, record = begun(found)
        before, now = flatten(settings), flatten(self.config)
        free = _FREE + (("steps",) if self.config.optimizer.schedule == "constant" else ())
        other = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k not in free and before[k] != now[k]]
        mine = self._record(record["step"], record["seconds"])
        self.history = record["history"]
        if self.new_data and record["data"] != mine["data"]:
            self.history = [*self.history, {"step": record["step"], "data": record["data"]}]
            mine["data"] = record["data"]
        other += [f"{what} was {record[k]}, is {mine[k]}" for k, what in _SAME.items() if record[k] != mine[k]]
        if other == [f"the data was {record['data']}, is {mine['data']}"]:
            other[0] += " (--new-data goes on with these)"
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
            "encoders": None if self.encoders is None else str(self.encoders.absolute()),
            "history": self.history,
            "samples_per_step": optimizer.batch * optimizer.accumulate * accelerator.num_processes,
            "processes": accelerator.num_processes,
            "hardware": run.hardware(),
            "torch": torch.__version__,
        }

    def save(self, model: nn.Module, step: int, seconds: float) -> Path:
        """Writes `checkpoint-<step>` whole or not at all, then deletes all but the last `engine.keep`.

        Raises:
            DiskError: it could not be written; those before it are as they were.
        """
        accelerator, folder = self.accelerator, self.folder(step)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        exported = self.always or step == self.config.steps or self._stays(step)
        accelerator.wait_for_everyone()
        try:
            if accelerator.is_main_process:
                needed = self.size.state + (self.size.export if exported else 0)
                disk.require_room(needed, self.out, "free some")
            accelerator.save_state(str(unfinished / STATE))
            if exported:
                self._export(unfinished, model)
            if accelerator.is_main_process:
                self._describe(unfinished, step, seconds)
            accelerator.wait_for_everyone()  # each process writes a part of the state
        except Exception as error:  # whatever torch and safetensors make of a full disk
            if accelerator.is_main_process:  # the others write there, too
                shutil.rmtree(unfinished, ignore_errors=True)
            last = latest(self.out)
            raise disk.DiskError(
                f"the checkpoint of step {step} could not be written: {error}. The same command, when there is room, "
                f"goes on from {'the start' if last is None else last}"
            ) from error
        if accelerator.is_main_process:
            os.replace(unfinished, folder)
            self._delete_old()
        accelerator.wait_for_everyone()
        return folder

    def _stays(self, step: int) -> bool:
        """Whether the weights of that step are kept for good."""
        return bool(self.config.engine.export_every) and step % self.config.engine.export_every == 0

    def _export(self, folder: Path, model: nn.Module) -> None:
        with nullcontext() if self.average is None else self.average.swapped():
            weights = self.accelerator.get_state_dict(model)  # gathered, where processes hold parts of it
            weights = {name.removeprefix("nets."): value for name, value in weights.items()}
            if not self.accelerator.is_main_process:
                return
            if self.config.lora.rank:
                file = folder / "adapter.safetensors"
                about = self.nets.diffusion_config
                lora.save(self.nets, file, self.base, to_json(self.config), config=about, state=weights)
                return
            self.nets.save(folder, torch.float32, weights)
            if self.encoders is not None:
                link_encoders(self.encoders, folder)

    def _describe(self, folder: Path, step: int, seconds: float) -> None:
        """Writes what a checkpoint has besides accelerate's state and the weights."""
        if self.average is not None:
            self.average.save(folder / STATE / AVERAGE)
        (folder / STATE / SIZES).write_text(json.dumps(asdict(self.nets.sizes), indent=1) + "\n", encoding="utf-8")
        if self.learned is not None:
            before, now = self.learned
            told = json.dumps({"data": self.data, "before": before, "now": now})
            (folder / STATE / LEARNED).write_text(told, encoding="utf-8")
        (folder / "config.json").write_text(to_json(self.config), encoding="utf-8")
        record = json.dumps(self._record(step, seconds), indent=1) + "\n"
        (folder / "training.json").write_text(record, encoding="utf-8")

    def _delete_old(self) -> None:
        for old in checkpoints(self.out)[: -self.config.engine.keep]:
            if not self._stays(int(old.name.rsplit("-", 1)[1])):
                shutil.rmtree(old)
            elif _is_exported(old) and (old / STATE).is_dir():
                shutil.rmtree(old / STATE)


def _is_exported(folder: Path) -> bool:
    """Whether a checkpoint has its weights beside the state."""
    return (folder / "diffusion_net").is_dir() or (folder / "adapter.safetensors").is_file()
