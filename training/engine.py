"""The training loop, on accelerate: one process on a laptop, or many through DDP, FSDP2 or DeepSpeed.

Which of these is accelerate's own configuration (`accelerate launch --config_file ... -m training train ...`); the loop
is the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from memo_core.checkpoint.digest import weights_digest

from . import batches, disk, logs, losses, robust, run
from .checkpoints import Checkpoints, begun, checkpoints, latest, learned_before
from .config import ConfigError, Stage, flatten
from .learning import Average, adamw, prepare_to_learn
from .nets import Nets, check_encoders
from .objectives import objective_of
from .validation import validate

__all__ = ["Trainer", "begun", "checkpoints", "latest", "train"]

# How long processes wait for the one that writes a checkpoint or draws pictures: 51 GB at 7 MB a second.
TIMEOUT = timedelta(hours=2)


def train(
    config: Stage,
    data: Path | str,
    out: Path | str,
    nets: Nets,
    encoders: Path | str | None,
    base: str = "",
    new_data: bool = False,
) -> Path:
    """Trains or resumes one stage.

    Args:
        config: of the stage.
        data: folder of shards.
        out: `checkpoint-<step>` folders, `log.jsonl`, `validation.jsonl`, `logs/` (TensorBoard), `samples/` and, for
            each process, `dropped-<rank>.jsonl` go there. With many machines, a folder that all of them see.
        nets: to start from; a run that goes on replaces their weights, and refuses to have started from others.
        encoders: checkpoint in the released layout whose VAE and encoders the checkpoints are completed with; None
            leaves them out, and makes no pictures.
        base: with adapters, the digest of the checkpoint they belong to (`memo_core.checkpoint.digest.base_digest`).
        new_data: a run that was begun with other data goes on with these, and its record says so.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: `out` was begun with other settings, weights or data; a tracker is not installed.
        CheckpointError: `encoders` lacks something.
        ShardError: the data cannot be used.
        DiskError: there is no room for the checkpoints; those that were written are as they were.
        RuntimeError: the loss was not finite ten steps in a row.
    """
    encoders = None if encoders is None else Path(encoders)
    trainer = Trainer(config, Path(data), Path(out), nets, encoders, base, new_data)
    try:
        return trainer.run()
    finally:
        trainer.accelerator.end_training()
        _forget_precision()


class Trainer:
    """One run of one stage; see `train`."""

    def __init__(
        self,
        config: Stage,
        data: Path,
        out: Path,
        nets: Nets,
        encoders: Path | None,
        base: str,
        new_data: bool = False,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        from accelerate.utils import DistributedType, ProjectConfiguration, set_seed

        self.config, self.out, self.encoders = config, out, encoders
        if encoders is not None:
            check_encoders(encoders)
        out.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.engine.mixed_precision,
            gradient_accumulation_steps=config.optimizer.accumulate,
            log_with=logs.trackers(config),
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                # Which parameters a step uses depends on the process: its samples may all go without a reference.
                # Gradients lie in the buckets that are exchanged, instead of beside them.
                DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            ],
        )
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if config.engine.ema and self.sharded:
            raise ConfigError(
                f"engine.ema={config.engine.ema} needs whole weights in every process, "
                f"and {accelerator.distributed_type} holds parts of them: set engine.ema=0"
            )
        set_seed(config.seed)
        started_from = weights_digest(nets.state_dict())[:16]
        self.set = batches.TrainingSet(
            data,
            config,
            samples_together=config.optimizer.batch * accelerator.num_processes,
            face_embedding=nets.sizes.face_embedding,
            window=nets.window,
            learned=(learned := learned_before(out, data)),
        )
        self.held_out = batches.HeldOut(self.set) if self.set.held_out else None
        if config.data.held_out and self.held_out is None and accelerator.is_main_process:
            print(
                f"no clip is held out (data.held_out={config.data.held_out:g}): the clips of "
                f"{self.set.length} frames or more show no two videos or faces that the run may choose between"
            )
        if self.set.shards.crop_scale is not None:
            nets.crop_to(self.set.shards.crop_scale)
        if (fps := self.set.shards.fps) not in (None, nets.diffusion_net.config.fps):
            if accelerator.is_main_process:
                print(f"the clips have {fps} frames a second: so will what this run's checkpoints make")
            nets.play_at(fps)
        groups = prepare_to_learn(nets, config)
        learning = [parameter for parameter in nets.parameters() if parameter.requires_grad]
        self.waiting = self._hold_back(groups)
        self.names = list(groups)
        groups_of = [{"params": parameters} for parameters in groups.values()]
        optimizer = adamw(groups_of, config, accelerator.device)
        if self.deepspeed:  # it takes these from its own configuration
            accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": config.optimizer.batch,
                "gradient_accumulation_steps": config.optimizer.accumulate,
                "gradient_clipping": config.optimizer.max_grad_norm,
            }
        self.model, self.optimizer = accelerator.prepare(objective_of(config, nets), optimizer)
        if accelerator.distributed_type == DistributedType.FSDP:
            gather_outside_forward(self.model)
        self.average = Average.of(learning, config)
        self.checkpoints = Checkpoints(
            out,
            config,
            accelerator,
            nets,
            self.average,
            started_from,
            self.set.shards.digest,
            encoders,
            base,
            disk.checkpoint_size(nets, learning, config),
            always=self.sharded or bool(config.lora.rank),
        )
        self.checkpoints.new_data = new_data
        if config.data.held_out:
            samples = self.set.shards.samples
            self.checkpoints.learned = sorted(learned), [samples[number].key for number in self.set.usable]
        self.robust = robust.RobustFilter(config.loss).kept_with(accelerator)
        self.step, self.seconds = 0, 0.0

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        if (found := self.checkpoints.find()) is not None:
            self.step, self.seconds = found[1]["step"], float(found[1]["seconds"])
            self._join()
            self.checkpoints.load(*found)
        if self.step < config.steps:
            self.checkpoints.require_room()
        if history := self.checkpoints.history:  # the epochs of these data begin where they came
            micro = config.optimizer.batch * accelerator.num_processes * config.optimizer.accumulate
            self.set.first = history[-1]["step"] * micro
        if accelerator.is_main_process:
            accelerator.init_trackers(config.name, config={k: logs.plain(v) for k, v in flatten(config).items()})
        stream = batches.loader(
            self.set,
            config.optimizer.batch,
            self.step * config.optimizer.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
        )
        last = self.checkpoints.folder(self.step)
        bar = run.bar(config.name, config.steps, self.step, accelerator.is_main_process)
        began, seconds = time.monotonic(), self.seconds
        self.saved = began
        attention = sdpa_kernel([SDPBackend.MATH]) if config.engine.attention == "math" else nullcontext()
        self.model.train()
        figures, bad = logs.Figures(), 0
        with bar, attention:
            if self.step:
                self._look(again=True)
            while self.step < config.steps:
                self._join()
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
                if self._save_now():  # before what is not training, and may fail by itself
                    last = self.checkpoints.save(self.model, step, self.seconds)
                    self.saved = time.monotonic()
                self._look()
        return last

    def _hold_back(self, groups: dict[str, list[nn.Parameter]]) -> bool:
        """Keeps the parts in `join` from learning until `join_step`; whether there are any. They take no gradients
        then, which nobody has to compute, keep or exchange.

        Raises:
            ConfigError: these processes cannot let parts join later.
        """
        from accelerate.utils import DistributedType

        held = [parameter for name in groups if name in self.config.join for parameter in groups[name]]
        if not held or not self.config.join_step:
            return False
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        if self.deepspeed or (fsdp and not getattr(self.accelerator, "is_fsdp2", False)):
            raise ConfigError(
                f"join_step={self.config.join_step} lets {', '.join(self.config.join)} wait, and "
                f"{'DeepSpeed' if self.deepspeed else 'FSDP1'} joins all that learns for good: use DDP or FSDP2, or "
                "set join_step=0"
            )
        for parameter in held:
            parameter.requires_grad_(False)
        return True

    def _join(self) -> None:
        """Lets the parts in `join` learn, when it is time."""
        if not self.waiting or self.step < self.config.join_step:
            return
        self.waiting = False
        for name, group in zip(self.names, self.optimizer.param_groups):
            if name in self.config.join:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
        if isinstance(self.model, DistributedDataParallel):  # which exchanges what learned when it was made
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model = None
            self.accelerator.free_memory()
            self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)

    def _save_now(self) -> bool:
        engine, step = self.config.engine, self.step
        if step == self.config.steps or (engine.save_every and step % engine.save_every == 0):
            return True
        if not engine.save_minutes or step % engine.log_every:
            return False
        from accelerate.utils import broadcast

        # All processes write together: the first one's clock counts.
        late = time.monotonic() - self.saved >= 60 * engine.save_minutes
        return bool(broadcast(torch.tensor([int(late)], device=self.accelerator.device)))

    def _step(self, stream: Iterator[batches.Batch], figures: logs.Figures) -> float:
        """One step of the optimiser; returns the norm of its gradient, not finite if the step was skipped for that."""
        config, accelerator = self.config, self.accelerator
        limits, judged = self.robust.limits(self.step).to(accelerator.device), []
        for micro in range(config.optimizer.accumulate):
            batch = next(stream).to(accelerator.device)
            accelerator.gradient_state._set_sync_gradients(micro == config.optimizer.accumulate - 1)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                loss, error = self.model(batch)
                bins = self.robust.bin_of(batch.sigma)
                keep = losses.kept_by_filter(loss, error, batch.no_reference, limits[bins])
                whole = torch.where(keep, loss, 0).sum()
                # What all processes keep: one that keeps no sample still takes part in everything.
                judged.append(accelerator.gather(robust.judged(bins, error, keep, batch.no_reference, loss)))
                # The sum over all kept samples; the engine averages over processes and micro-steps. It is divided by
                # their number below, when that is known; by DeepSpeed, which steps by itself, for each micro-step.
                scale = accelerator.num_processes * config.optimizer.accumulate
                if self.deepspeed:
                    scale = accelerator.num_processes / judged[-1][:, robust.KEPT].sum().clamp_min(1)
                accelerator.backward(whole * scale)
            dropped = self.out / f"dropped-{accelerator.process_index}.jsonl"
            robust.write_dropped(dropped, self.step, batch, error, limits[bins], keep)
        kept, seen, total = self.robust.note(torch.cat(judged).cpu())
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
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm))
        finite = math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # the scaler of fp16 skips such steps itself, and learns from them
            self.optimizer.step()
        if finite and self.average is not None:
            self.average.step()
        return norm

    def _set_rates(self) -> None:
        config = self.config
        factor = min(1.0, (self.step + 1) / max(1, config.optimizer.warmup_steps))
        if config.optimizer.schedule == "cosine":
            factor = run.warmup_cosine(self.step, config.steps, config.optimizer.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * factor

    def _log(self, figures: dict[str, float], bar: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        if not figures["kept"]:
            bar.write(
                f"step {self.step}: every sample was dropped since the last line; {self.robust.why_nothing_stays()} "
                "(dropped-*.jsonl), or they are damaged"
            )
        figures = figures | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self.accelerator.log(figures | self.robust.figures(), step=self.step)
        row = {"step": self.step, "seconds": round(self.seconds, 1), **figures, **self.robust.row()}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _look(self, again: bool = False) -> None:
        """Validates and shows samples where it is time to; `again`: what a stopped run did not come to. Random numbers
        go on as if nothing had been looked at, so that both are the same run.
        """
        from accelerate.utils import broadcast_object_list

        if self.step % self.config.engine.sample_every and self.step != self.config.steps:
            return
        picture = self.out / "samples" / f"{self.step:07d}.png"
        # The first process's folder counts: all of them validate together.
        done = [again and logs.last_step(self.out / "validation.jsonl") == self.step, again and picture.is_file()]
        validated, shown = broadcast_object_list(done)
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if not validated:
                self._validate()
            if not shown:
                self._show(picture)

    def _validate(self) -> None:
        """Writes down the loss on what is held out."""
        if self.held_out is None or not self.config.engine.validated:
            return
        self.model.eval()
        with nullcontext() if self.average is None else self.average.swapped():
            figures = validate(self.model, self.held_out, self.config.engine.validated, self.accelerator)
        self.model.train()
        if self.accelerator.is_main_process:
            self.accelerator.log(figures, step=self.step)
            with open(self.out / "validation.jsonl", "a", encoding="utf-8") as file:
                row = {"step": self.step, "data": self.checkpoints.data, **figures}
                file.write(json.dumps(row) + "\n")

    def _show(self, path: Path) -> None:
        """Samples beside the truth, as a picture and in the trackers; only where one process holds all weights."""
        accelerator = self.accelerator
        if self.encoders is None or self.sharded or not accelerator.is_main_process:
            return
        from tqdm import tqdm

        from . import preview

        tqdm.write(f"step {self.step}: drawing samples, which takes a while without a GPU: {path}", file=sys.stderr)
        self.model.eval()
        averaged = nullcontext() if self.average is None else self.average.swapped()
        with averaged, torch.no_grad(), accelerator.autocast():
            nets, shown = accelerator.unwrap_model(self.model).nets, self.held_out or self.set
            sheet = preview.picture(nets, shown, self.encoders)
        self.model.train()
        run.save_picture(sheet, path)
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images(
                    {"samples": sheet[None].permute(0, 2, 3, 1).numpy()}, step=self.step, **logs.layout(tracker)
                )


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
