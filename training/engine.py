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
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memo_core.checkpoint.digest import weights_digest
from memo_core.checks import shown
from memo_core.files import replace_whole

from . import batches, lora, losses, run
from .config import ConfigError, Stage, flatten, from_json, to_json
from .nets import Nets, check_encoders, checkpoint_gradients, link_encoders
from .objectives import objective_of
from .reading import fits, parse_json, read_json

AVERAGE = "average.safetensors"
# What a run has to have in common with the one it goes on from, besides its settings.
_SAME = {"started_from": "the start's weights", "data": "the data", "samples_per_step": "samples per step"}

# Settings that may differ when a stopped run goes on: none of them changes what is learned. Nor do steps, where the
# learning rate does not follow them.
_FREE = ("data.workers", "engine.save_every", "engine.keep", "engine.sample_every", "engine.samples")
_FREE += ("engine.log_every", "engine.trackers", "engine.gradient_checkpointing")


def train(
    config: Stage, data: Path | str, out: Path | str, nets: Nets, encoders: Path | str | None, base: str = ""
) -> Path:
    """Trains or resumes one stage.

    Args:
        config: of the stage.
        data: folder of shards.
        out: `checkpoint-<step>` folders, `log.jsonl`, `logs/` (TensorBoard), `samples/` and, for each process,
            `dropped-<rank>.jsonl` go there. With many machines, a folder that all of them see.
        nets: to start from; a run that goes on replaces their weights, and refuses to have started from others.
        encoders: checkpoint in the released layout whose VAE and encoders the checkpoints are completed with; None
            leaves them out, and makes no pictures.
        base: with adapters, the digest of the checkpoint they belong to (`memo_core.checkpoint.digest.base_digest`).

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: `out` was begun with other settings, weights or data; a tracker is not installed.
        CheckpointError: `encoders` lacks something.
        ShardError: the data cannot be used.
        RuntimeError: the loss was not finite ten steps in a row.
    """
    trainer = Trainer(config, Path(data), Path(out), nets, None if encoders is None else Path(encoders), base)
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

    def __init__(self, config: Stage, data: Path, out: Path, nets: Nets, encoders: Path | None, base: str) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType, ProjectConfiguration, set_seed

        self.config, self.out, self.encoders, self.base = config, out, encoders, base
        if encoders is not None:
            check_encoders(encoders)
        out.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.engine.mixed_precision,
            gradient_accumulation_steps=config.optimizer.accumulate,
            log_with=_trackers(config),
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
            # Which parameters a step uses depends on the process: its samples may all go without a reference.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if config.engine.ema and self.sharded:
            raise ConfigError(
                f"engine.ema={config.engine.ema} needs whole weights in every process, "
                f"and {accelerator.distributed_type} holds parts of them: set engine.ema=0"
            )
        set_seed(config.seed)
        self.started_from = weights_digest(nets.state_dict())[:16]
        self.set = batches.TrainingSet(
            data,
            config,
            samples_together=config.optimizer.batch * accelerator.num_processes,
            face_embedding=nets.sizes.face_embedding,
        )
        groups = prepare_to_learn(nets, config)
        self.nets, self.names = nets, list(groups)
        groups_of = [{"params": parameters} for parameters in groups.values()]
        optimizer = _adamw(groups_of, config, accelerator.device)
        if self.deepspeed:  # it takes these from its own configuration
            accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": config.optimizer.batch,
                "gradient_accumulation_steps": config.optimizer.accumulate,
                "gradient_clipping": config.optimizer.max_grad_norm,
            }
        self.model, self.optimizer = accelerator.prepare(objective_of(config, nets), optimizer)
        if accelerator.distributed_type == DistributedType.FSDP:
            gather_outside_forward(self.model)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.average = _average(self.learning, config)
        self.step, self.seconds = 0, 0.0

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        self._resume()
        if accelerator.is_main_process:
            accelerator.init_trackers(config.name, config={k: _plain(v) for k, v in flatten(config).items()})
        stream = batches.loader(
            self.set,
            config.optimizer.batch,
            self.step * config.optimizer.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
        )
        last = self._folder(self.step)
        bar = run.bar(config.name, config.steps, self.step, accelerator.is_main_process)
        began, seconds = time.monotonic(), self.seconds
        attention = sdpa_kernel([SDPBackend.MATH]) if config.engine.attention == "math" else nullcontext()
        self.model.train()
        figures, bad = _Figures(), 0
        with bar, attention:
            while self.step < config.steps:
                self._set_rates()
                gradient_norm = self._step(stream, figures)
                bad = 0 if math.isfinite(gradient_norm) else bad + 1
                if bad >= 10:
                    raise RuntimeError(
                        f"gradients were not finite for {bad} steps up to step {self.step}; lower "
                        "optimizer.learning_rate or use engine.mixed_precision=bf16"
                    )
                self.step += 1
                step, self.seconds = self.step, seconds + time.monotonic() - began
                if step % config.engine.log_every == 0 or step == config.steps:
                    self._log(figures.taken(), bar)
                bar.update()
                if step % config.engine.sample_every == 0 or step == config.steps:
                    self._show()
                if step % config.engine.save_every == 0 or step == config.steps:
                    last = self.save()
        return last

    def _step(self, stream: Iterator[batches.Batch], figures: _Figures) -> float:
        """One step of the optimiser; returns the norm of its gradient, not finite if the step was skipped for that."""
        config, accelerator = self.config, self.accelerator
        threshold = config.loss.robust_threshold if self.step >= config.loss.robust_from else math.inf
        total, kept, seen = 0.0, 0, 0
        for micro in range(config.optimizer.accumulate):
            batch = next(stream).to(accelerator.device)
            accelerator.gradient_state._set_sync_gradients(micro == config.optimizer.accumulate - 1)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                loss, error = self.model(batch)
                keep = losses.kept_by_filter(loss, error, batch.no_reference, threshold)
                whole = torch.where(keep, loss, 0).sum()
                # How many samples all processes keep: a process that keeps none still takes part in everything.
                counts = torch.stack([keep.sum(), torch.ones_like(keep).sum(), whole.detach()]).float()
                counts = accelerator.reduce(counts, "sum")
                # The sum over all kept samples; the engine averages over processes and micro-steps. It is divided by
                # their number below, when that is known; by DeepSpeed, which steps by itself, for each micro-step.
                scale = accelerator.num_processes * config.optimizer.accumulate
                if self.deepspeed:
                    scale = accelerator.num_processes / counts[0].clamp_min(1)
                accelerator.backward(whole * scale)
            kept, seen, total = kept + int(counts[0]), seen + int(counts[1]), total + float(counts[2])
            self._note_dropped(batch, error, keep)
        norm = 0.0
        if self.deepspeed:
            self.optimizer.step()  # DeepSpeed skips steps that are not finite itself, and tells no norm
        elif kept:  # a step that teaches nothing changes nothing: neither momentum nor decay
            norm = self._descend(1 / kept)
        self.optimizer.zero_grad()
        figures.add(total, kept, seen, norm)
        return norm

    def _descend(self, scale: float) -> float:
        accelerator, config = self.accelerator, self.config
        for name, group in zip(self.names, self.optimizer.param_groups):
            for parameter in group["params"]:
                if name in config.join and self.step < config.join_step:
                    parameter.grad = None  # it waits, and does not count in the norm
                elif parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm))
        finite = math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # the scaler of fp16 skips such steps itself, and learns from them
            self.optimizer.step()
        if finite and self.average is not None:
            self.average.step(self.learning)
        return norm

    def _set_rates(self) -> None:
        config = self.config
        factor = min(1.0, (self.step + 1) / max(1, config.optimizer.warmup_steps))
        if config.optimizer.schedule == "cosine":
            factor = run.warmup_cosine(self.step, config.steps, config.optimizer.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * factor

    def _note_dropped(self, batch: batches.Batch, error: Tensor, keep: Tensor) -> None:
        rows = [(key, float(e)) for key, e, kept in zip(batch.keys, error, keep.tolist()) if not kept]
        if rows:
            path = self.out / f"dropped-{self.accelerator.process_index}.jsonl"
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": self.step, "key": key, "error": e}) + "\n" for key, e in rows)

    def _log(self, figures: dict[str, float], bar: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        if not figures["kept"]:
            bar.write(
                f"step {self.step}: every sample was dropped since the last line; loss.robust_threshold="
                f"{self.config.loss.robust_threshold} is below all their errors (dropped-*.jsonl), or they are damaged"
            )
        figures = figures | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self.accelerator.log(figures, step=self.step)
        row = {"step": self.step, "seconds": round(self.seconds, 1), **figures}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _folder(self, step: int) -> Path:
        return self.out / f"checkpoint-{step:07d}"

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        from accelerate.utils import broadcast_object_list
        from safetensors.torch import load_file

        accelerator = self.accelerator
        names: list[Any] = [None]
        if accelerator.is_main_process:
            for leftover in self.out.glob("*.tmp"):
                shutil.rmtree(leftover)
            found = latest(self.out)
            names = [found and found.name]
        if (name := broadcast_object_list(names)[0]) is None:
            return
        found = self.out / name
        if not found.is_dir():
            raise ConfigError(
                f"process {accelerator.process_index} does not see {found}: --out must be a shared folder"
            )
        settings, record = begun(found)
        before, now = flatten(settings), flatten(self.config)
        free = _FREE + (("steps",) if self.config.optimizer.schedule == "constant" else ())
        other = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k not in free and before[k] != now[k]]
        mine = self._record()
        other += [f"{what} was {record[k]}, is {mine[k]}" for k, what in _SAME.items() if record[k] != mine[k]]
        if other:
            raise ConfigError(f"{self.out} was begun otherwise: {'; '.join(other)}. Use another --out, or delete it")
        accelerator.load_state(str(found / "state"))
        self.step, self.seconds = record["step"], float(record["seconds"])
        if self.average is not None:
            shadow = load_file(found / "state" / AVERAGE, device=str(accelerator.device))
            self.average.shadow_params = [shadow[str(i)] for i in range(len(shadow))]
            self.average.optimization_step = record["averaged_steps"]
        if accelerator.is_main_process:
            _truncate(self.out / "log.jsonl", self.step)

    def _record(self) -> dict[str, Any]:
        accelerator, optimizer = self.accelerator, self.config.optimizer
        return {
            "stage": self.config.name,
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "averaged_steps": 0 if self.average is None else self.average.optimization_step,
            "started_from": self.started_from,
            "data": self.set.shards.digest,
            "samples_per_step": optimizer.batch * optimizer.accumulate * accelerator.num_processes,
            "processes": accelerator.num_processes,
            "hardware": run.hardware(),
            "torch": torch.__version__,
        }

    def save(self) -> Path:
        """Writes `checkpoint-<step>` whole or not at all, then deletes all but the last `engine.keep`."""
        from safetensors.torch import save_file

        accelerator, folder = self.accelerator, self._folder(self.step)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished / "state"))
        with self._averaged():
            weights = accelerator.get_state_dict(self.model)  # gathered, where processes hold parts of it
            if accelerator.is_main_process:
                self._export(unfinished, {name.removeprefix("nets."): value for name, value in weights.items()})
        if accelerator.is_main_process:
            if self.average is not None:
                shadow = {str(i): value.contiguous() for i, value in enumerate(self.average.shadow_params)}
                save_file(shadow, unfinished / "state" / AVERAGE)
            (unfinished / "config.json").write_text(to_json(self.config), encoding="utf-8")
            (unfinished / "training.json").write_text(json.dumps(self._record(), indent=1) + "\n", encoding="utf-8")
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

    def _averaged(self) -> Any:
        return nullcontext() if self.average is None else _Swapped(self.average, self.learning)

    # --- Pictures -----------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Samples beside the truth, as a picture and in the trackers; only where one process holds all weights."""
        accelerator = self.accelerator
        if self.encoders is None or self.sharded or not accelerator.is_main_process:
            return
        from . import preview

        self.model.eval()
        with self._averaged(), torch.no_grad(), accelerator.autocast():
            sheet = preview.picture(accelerator.unwrap_model(self.model).nets, self.set, self.encoders)
        self.model.train()
        run.save_picture(sheet, self.out / "samples" / f"{self.step:07d}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images(
                    {"samples": sheet[None].permute(0, 2, 3, 1).numpy()}, step=self.step, **_layout(tracker)
                )


def _trackers(config: Stage) -> list[str]:
    """TensorBoard and those asked for; ConfigError for one that is not installed."""
    from accelerate.tracking import get_available_trackers

    wanted = list(dict.fromkeys(["tensorboard", *config.engine.trackers]))
    available = [str(tracker) for tracker in get_available_trackers()]
    if absent := [name for name in wanted if name not in available]:
        raise ConfigError(f"not installed: {', '.join(absent)} (engine.trackers); pip install {' '.join(absent)}")
    return wanted


def _layout(tracker: Any) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")


def latest(out: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    found = checkpoints(out)
    return found[-1] if found else None


def _forget_precision() -> None:
    """Lets the next stage in this process have another precision: accelerate keeps one for as long as it remembers."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def gather_outside_forward(model: nn.Module) -> None:
    """Lets FSDP2, which gathers a module's weights for its forward alone, gather them for its other methods, too.

    Args:
        model: of which FSDP2 may shard, each by itself, the Diffusion Net, residual blocks and the modules beside them;
            those that are not sharded by themselves stay as they are.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in list(model.modules()):
        for method in getattr(module, "outside_forward", ()):
            register_fsdp_forward_method(module, method)


def begun(folder: Path) -> tuple[Stage, dict[str, Any]]:
    """Settings and record of a run's checkpoint; ConfigError where they are not such."""
    settings = from_json(json.dumps(read_json(folder / "config.json", ConfigError)))
    record = read_json(folder / "training.json", ConfigError)
    kinds = {"step": int, "seconds": float, "averaged_steps": int}
    for name in (*kinds, *_SAME):
        if not fits(record.get(name), kinds.get(name, int | str)):
            raise ConfigError(f"{folder / 'training.json'} is not a run's record: {name} is {shown(record.get(name))}")
    return settings, record


def _truncate(log: Path, step: int) -> None:
    """Takes out of a log what comes after a step: it is done again."""
    if log.is_file():
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            kept = [row for row in rows if row.endswith("\n") and float(parse_json(row)["step"]) <= step]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"{log} is no log of a run ({error}): repair or delete it") from error
        with replace_whole(log) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class _Figures:
    """What happened since it was last written down, over all processes."""

    def __init__(self) -> None:
        self.loss, self.kept, self.seen, self.skipped, self.norm = 0.0, 0, 0, 0, 0.0

    def add(self, loss: float, kept: int, seen: int, norm: float) -> None:
        self.loss, self.kept, self.seen = self.loss + loss, self.kept + kept, self.seen + seen
        self.skipped, self.norm = self.skipped + (not math.isfinite(norm)), norm

    def taken(self) -> dict[str, float]:
        """Mean loss of the samples kept (NaN: none), share of them, the last gradient's norm, and steps skipped because
        theirs was not finite.
        """
        figures = {
            "loss": self.loss / self.kept if self.kept else math.nan,
            "gradient_norm": self.norm,
            "kept": self.kept / self.seen,
            "skipped": float(self.skipped),
        }
        self.__init__()
        return figures


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


def _adamw(groups: list[dict[str, Any]], config: Stage, device: torch.device) -> torch.optim.Optimizer:
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


def _plain(value: Any) -> Any:
    """What TensorBoard takes as a setting."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)
