"""The training loop, on accelerate: one process on a laptop, or many through DDP, FSDP2 or DeepSpeed.

Which of these is accelerate's own configuration (`accelerate launch --config_file ... -m training train ...`); the loop
is the same. Every checkpoint is a folder in the released layout, with `state/` to go on from beside it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import batches, lora, losses, run
from .config import ConfigError, Stage, flatten, from_json, to_json
from .flow import FlowModel
from .nets import Nets, checkpoint_gradients, link_encoders

# Settings that may differ when a stopped run goes on: none of them changes what is learned.
_FREE = ("steps", "data.workers", "engine.save_every", "engine.keep", "engine.sample_every", "engine.samples")
_FREE += ("engine.log_every", "engine.trackers", "engine.gradient_checkpointing")


def train(
    config: Stage, data: Path | str, out: Path | str, nets: Nets, encoders: Path | str | None, started_from: str = ""
) -> Path:
    """Trains or resumes one stage.

    Args:
        config: of the stage.
        data: folder of shards.
        out: `checkpoint-<step>` folders, `log.jsonl`, `logs/` (TensorBoard), `samples/` and `dropped.jsonl` go there.
        nets: to start from; a run that goes on replaces their weights.
        encoders: checkpoint in the released layout whose VAE and encoders the checkpoints are completed with; None
            leaves them out, and makes no pictures.
        started_from: what `nets` are, for the record; a run that goes on refuses another. With adapters, the digest of
            the checkpoint they belong to (`memo_core.checkpoint.base_digest`).

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: `out` was begun with other settings.
        ShardError: the data cannot be used.
        RuntimeError: the loss was not finite ten steps in a row.
    """
    trainer = Trainer(config, Path(data), Path(out), nets, None if encoders is None else Path(encoders), started_from)
    try:
        return trainer.run()
    finally:
        trainer.accelerator.end_training()
        _forget_precision()


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


class Trainer:
    """One run of one stage; see `train`."""

    def __init__(
        self, config: Stage, data: Path, out: Path, nets: Nets, encoders: Path | None, started_from: str
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import ProjectConfiguration, set_seed

        self.config, self.out, self.encoders, self.started_from = config, out, encoders, started_from
        out.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=config.engine.mixed_precision,
            gradient_accumulation_steps=config.optimizer.accumulate,
            log_with=[*config.engine.trackers],
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
            # Which parameters a step uses depends on the process: its samples may all go without a reference.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(config.seed)
        accelerator = self.accelerator
        groups = prepare_to_learn(nets, config)
        self.nets, self.names = nets, list(groups)
        self.set = batches.TrainingSet(
            data,
            config,
            samples_per_step=config.optimizer.batch * accelerator.num_processes,
            face_embedding=nets.sizes.face_embedding,
        )
        optimizer = _adamw([{"params": parameters} for parameters in groups.values()], config)
        if accelerator.state.deepspeed_plugin is not None:
            plugin = accelerator.state.deepspeed_plugin.deepspeed_config
            plugin["train_micro_batch_size_per_gpu"] = config.optimizer.batch
        if config.engine.ema and accelerator.distributed_type in _sharded():
            raise ConfigError(
                f"engine.ema={config.engine.ema} needs whole weights in every process, "
                f"and {accelerator.distributed_type} holds parts of them: set engine.ema=0"
            )
        self.model, self.optimizer = accelerator.prepare(FlowModel(nets, config.loss), optimizer)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.average = _average(self.learning, config)
        self.progress = _Progress()
        accelerator.register_for_checkpointing(self.progress)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        self._resume()
        if accelerator.is_main_process:
            accelerator.init_trackers(config.name, config={k: _plain(v) for k, v in flatten(config).items()})
        step, accumulate = self.progress.step, config.optimizer.accumulate
        stream = batches.loader(
            self.set, config.optimizer.batch, step * accumulate, accelerator.process_index, accelerator.num_processes
        )
        last = self._folder(step)
        bar = run.bar(config.name, config.steps, step, accelerator.is_main_process)
        began, seconds = time.monotonic(), self.progress.seconds
        attention = sdpa_kernel([SDPBackend.MATH]) if config.engine.attention == "math" else nullcontext()
        self.model.train()
        bad = 0
        with bar, attention:
            while step < config.steps:
                self._set_rates(step)
                figures = self._step(stream, step)
                if not math.isfinite(figures["gradient_norm"]):
                    bad += 1
                    if bad >= 10:
                        raise RuntimeError(
                            f"gradients were not finite for {bad} steps up to step {step}; lower "
                            "optimizer.learning_rate or use engine.mixed_precision=bf16"
                        )
                else:
                    bad = 0
                step += 1
                self.progress.step, self.progress.seconds = step, seconds + time.monotonic() - began
                if step % config.engine.log_every == 0 or step == config.steps:
                    self._log(step, figures, bar)
                bar.update()
                if step % config.engine.sample_every == 0 or step == config.steps:
                    self._show(step)
                if step % config.engine.save_every == 0 or step == config.steps:
                    last = self.save(step)
        return last

    def _step(self, stream: Any, step: int) -> dict[str, float]:
        """One step of the optimiser; what happened in it, over all processes."""
        config, accelerator = self.config, self.accelerator
        threshold = config.loss.robust_threshold if step >= config.loss.robust_from else math.inf
        total, kept, seen = 0.0, 0, 0
        for micro in range(config.optimizer.accumulate):
            batch = next(stream).to(accelerator.device)
            accelerator.gradient_state._set_sync_gradients(micro == config.optimizer.accumulate - 1)
            context = nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model)
            with context:
                loss, error = self.model(batch)
                keep = losses.kept_by_filter(error, batch.no_reference, threshold)
                # How many samples all processes keep: a process that keeps none still takes part in everything.
                counts = accelerator.reduce(torch.stack([keep.sum(), torch.ones_like(keep).sum()]).float(), "sum")
                mean = torch.where(keep, loss, 0).sum() / counts[0].clamp_min(1)
                # Gradients are averaged over the processes, and each holds only its share of the sum.
                accelerator.backward(mean * accelerator.num_processes)
            total += float(accelerator.reduce(mean.detach(), "sum"))
            kept, seen = kept + int(counts[0]), seen + int(counts[1])
            self._note_dropped(step, batch, error, keep)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm)
        norm = float("nan") if norm is None else float(norm)
        finite = math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # the scaler of fp16 skips such steps itself, and learns from them
            self.optimizer.step()
        if finite and self.average is not None:
            self.average.step(self.learning)
        self.optimizer.zero_grad()
        return {"loss": total / config.optimizer.accumulate, "gradient_norm": norm, "kept": kept / seen}

    def _set_rates(self, step: int) -> None:
        config = self.config
        factor = min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))
        if config.optimizer.schedule == "cosine":
            factor = run.warmup_cosine(step, config.steps, config.optimizer.warmup_steps)
        for name, group in zip(self.names, self.optimizer.param_groups):
            waits = step < config.join_step and name in config.join
            group["lr"] = 0.0 if waits else config.optimizer.learning_rate * factor

    def _note_dropped(self, step: int, batch: batches.Batch, error: Tensor, keep: Tensor) -> None:
        rows = [(key, float(e)) for key, e, kept in zip(batch.keys, error, keep.tolist()) if not kept]
        if rows:
            path = self.out / f"dropped-{self.accelerator.process_index}.jsonl"
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "key": key, "error": e}) + "\n" for key, e in rows)

    def _log(self, step: int, figures: dict[str, float], bar: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        figures = figures | {"learning_rate": max(group["lr"] for group in self.optimizer.param_groups)}
        bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self.accelerator.log(figures, step=step)
        row = {"step": step, "seconds": round(self.progress.seconds, 1), **figures}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _folder(self, step: int) -> Path:
        return self.out / f"checkpoint-{step:07d}"

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        if self.accelerator.is_main_process:
            for leftover in self.out.glob("*.tmp"):
                shutil.rmtree(leftover)
        self.accelerator.wait_for_everyone()
        found = latest(self.out)
        if found is None:
            return
        begun = from_json((found / "config.json").read_text(encoding="utf-8"))
        before, now = flatten(begun), flatten(self.config)
        other = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k not in _FREE and before[k] != now[k]]
        record = json.loads((found / "training.json").read_text(encoding="utf-8"))
        if record["started_from"] != self.started_from:
            other.append(f"it started from {record['started_from']!r}, not {self.started_from!r}")
        if record["samples_per_step"] != self._samples_per_step:
            other.append(
                f"a step had {record['samples_per_step']} samples over all processes, now {self._samples_per_step}"
            )
        if other:
            raise ConfigError(f"{self.out} was begun otherwise: {'; '.join(other)}. Use another --out, or delete it")
        self.accelerator.load_state(str(found / "state"))

    @property
    def _samples_per_step(self) -> int:
        optimizer = self.config.optimizer
        return optimizer.batch * optimizer.accumulate * self.accelerator.num_processes

    def save(self, step: int) -> Path:
        """Writes `checkpoint-<step>` whole or not at all, then deletes all but the last `engine.keep`."""
        accelerator, folder = self.accelerator, self._folder(step)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished / "state"))
        with self._averaged():
            weights = accelerator.get_state_dict(self.model)  # gathered, where processes hold parts of it
            if accelerator.is_main_process:
                self._export(unfinished, {name.removeprefix("nets."): value for name, value in weights.items()})
        if accelerator.is_main_process:
            (unfinished / "config.json").write_text(to_json(self.config), encoding="utf-8")
            record = {
                "stage": self.config.name,
                "step": step,
                "seconds": round(self.progress.seconds),
                "started_from": self.started_from,
                "samples_per_step": self._samples_per_step,
                "processes": accelerator.num_processes,
                "hardware": run.hardware(),
                "torch": torch.__version__,
            }
            (unfinished / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
            for old in checkpoints(self.out)[: -self.config.engine.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return folder

    def _export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        if self.config.lora.rank:
            lora.save(self.nets, folder / "adapter.safetensors", self.started_from, to_json(self.config), state=weights)
            return
        self.nets.save(folder, torch.float16 if self.config.engine.ema else torch.float32, weights)
        if self.encoders is not None:
            link_encoders(self.encoders, folder)

    def _averaged(self) -> Any:
        return nullcontext() if self.average is None else _Swapped(self.average, self.learning)

    # --- Pictures -----------------------------------------------------------------------------------------------------

    def _show(self, step: int) -> None:
        """Samples beside the truth, as a picture and in the trackers; only where one process holds all weights."""
        accelerator = self.accelerator
        if self.encoders is None or accelerator.distributed_type in _sharded() or not accelerator.is_main_process:
            return
        from . import preview

        self.model.eval()
        with self._averaged(), torch.no_grad(), accelerator.autocast():
            sheet = preview.picture(accelerator.unwrap_model(self.model).nets, self.set, self.encoders)
        self.model.train()
        run.save_picture(sheet, self.out / "samples" / f"{step:07d}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": sheet[None].permute(0, 2, 3, 1).numpy()}, step=step, **_layout(tracker))


def _layout(tracker: Any) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")


def latest(out: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    found = checkpoints(out)
    return found[-1] if found else None


def _sharded() -> tuple[Any, ...]:
    """Kinds of distribution where no process holds all the weights."""
    from accelerate.utils import DistributedType

    return DistributedType.FSDP, DistributedType.DEEPSPEED


def _forget_precision() -> None:
    """Lets the next stage in this process have another precision: accelerate keeps one for as long as it remembers."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


class _Progress:
    """How far a run is; saved with its state."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


class _Swapped:
    """The averaged weights in place of the model's, for a while."""

    def __init__(self, average: Any, parameters: list[nn.Parameter]):
        self.average, self.parameters = average, parameters

    def __enter__(self) -> None:
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)

    def __exit__(self, *_: object) -> None:
        self.average.restore(self.parameters)


def _average(parameters: list[nn.Parameter], config: Stage) -> Any:
    from diffusers.training_utils import EMAModel

    if not config.engine.ema or config.lora.rank:
        return None
    return EMAModel(parameters, decay=config.engine.ema, foreach=True)


def _adamw(groups: list[dict[str, Any]], config: Stage) -> torch.optim.Optimizer:
    settings = config.optimizer
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.bits == 32:
        return torch.optim.AdamW(groups, **arguments)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.bits=8 needs bitsandbytes: pip install bitsandbytes, or set optimizer.bits=32"
        ) from error
    return AdamW8bit(groups, **arguments)


def _plain(value: Any) -> Any:
    """What TensorBoard takes as a setting."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)
