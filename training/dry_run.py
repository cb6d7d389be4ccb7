"""What a run would take and see, before it starts: memory, disk, hours, data, batch, and a picture of it."""

from __future__ import annotations

from pathlib import Path

import torch

from memo_core.nets.config import NetConfig
from memo_core.sampling.vae import decode_latents

from . import batches, budget, checkpoints, disk, run
from .config import Stage
from .nets import Sizes
from .vae import load_vae

ROWS, FRAMES = 4, 4  # of the picture: samples, and frames of each


def report(
    config: Stage, data: Path, out: Path, sizes: Sizes, encoders: Path | None, processes: int, utilisation: float
) -> None:
    """Prints it, and draws `out`/dry-run.png. No weights are read but the VAE's.

    Args:
        config: of the stage.
        data: folder of shards.
        out: the run's folder; nothing of a run is written there.
        sizes: of the networks.
        encoders: checkpoint whose VAE decodes the picture; None: there is no picture.
        processes: that will train.
        utilisation: assumed share of the device's speed.
    """
    together = config.optimizer.batch * processes
    net = NetConfig.from_json(sizes.diffusion_net)
    samples = batches.TrainingSet(
        data,
        config,
        samples_together=together,
        face_embedding=sizes.face_embedding,
        window=net.window,
        learned=checkpoints.learned_before(out, data),
    )
    first = batches.collate([samples[number] for number in range(config.optimizer.batch)])
    cost = budget.count(config, sizes, 8 * first.latents.shape[-1])
    lines = [
        _memory(cost, processes),
        "disk: " + disk.plan(cost.checkpoint, config, out, always=bool(config.lora.rank)),
    ]
    fps = samples.shards.fps or net.fps  # as the run's checkpoints will have it
    lines += [_hours(cost, utilisation), _data(samples, fps), _batch(config, samples, processes, fps)]
    print("\n".join(lines))
    if encoders is None:
        print("picture: none without a VAE; give --encoders")
        return
    draw(first, encoders, out / "dry-run.png")
    print(f"picture: {out / 'dry-run.png'}, in each row a sample's portrait, last past frame, and frames to learn")


def _memory(cost: budget.Cost, processes: int) -> str:
    total = cost.total if processes == 1 else cost.total_of_many
    text = f"memory: {total / budget.GIB:.1f} GiB of each device"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        fits = "which fits" if total <= card.total_memory else "which does not fit (python -m training budget --both)"
        return f"{text}; {card.name} has {card.total_memory / budget.GIB:.1f} GiB, {fits}"
    fitting = [name for name, (_, memory) in budget.DEVICES.items() if total <= memory]
    return f"{text}; there is no CUDA card here; it fits {', '.join(fitting) or 'none of ' + ', '.join(budget.DEVICES)}"


def _hours(cost: budget.Cost, utilisation: float) -> str:
    speeds = {name: speed for name, (speed, _) in budget.DEVICES.items()}
    if torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        speeds = {name: speed for name, speed in speeds.items() if _kind(name) in here} or speeds
    times = ", ".join(f"{name} {cost.hours(speed, utilisation):,.1f}" for name, speed in speeds.items())
    steps = f"{cost.stage.steps:,} steps at {utilisation:.0%} of its speed, which is assumed"
    return f"hours of each device: {times} for {steps}"


def _kind(device: str) -> str:
    """What a device's own name has of its name in the table: no form and no memory."""
    return device.removesuffix(" SXM").removesuffix(" 80 GB")


def _data(samples: batches.TrainingSet, fps: float) -> str:
    shards = samples.shards.samples
    frames = sum(shards[clip].frames for clip in samples.usable)
    text = f"data: {len(samples.usable):,} clips, {frames / fps / 3600:.3g} h, {frames:,} frames"
    if samples.held_out:
        text += f"; {len(samples.held_out):,} clips are held out"
    rest = len(shards) - len(samples.usable) - len(samples.held_out)
    short = sum(sample.frames < samples.length for sample in shards)
    text += f"; {short:,} more are shorter than {samples.length} frames" if short else ""
    return text + (f"; {rest - short:,} show videos or faces of both sides" if rest > short else "")


def _batch(config: Stage, samples: batches.TrainingSet, processes: int, fps: float) -> str:
    optimizer, length = config.optimizer, samples.length
    together = processes * optimizer.batch * optimizer.accumulate
    frames = sum(samples.shards.samples[clip].frames for clip in samples.usable)
    seen = config.steps * together
    text = (
        f"batch: {processes} x {optimizer.batch} x {optimizer.accumulate} (processes, batch, accumulate) = {together} "
        f"samples a step, {seen:,} in all, {seen / len(samples.usable):,.1f} looks at each clip, of {length} frames; "
        f"they show {seen * length / fps / 3600:,.1f} h, the data {seen * length / frames:,.1f} times"
    )
    if seen * length >= frames:
        return text
    needed = -(-frames // (length * config.steps * processes * optimizer.batch))
    return f"{text}. optimizer.accumulate={needed}, or more processes, would show all of it"


def draw(batch: batches.Batch, encoders: Path, path: Path) -> None:
    """Writes the first samples of a batch as pictures: portrait, last past frame, and frames of each, as they come."""
    vae = load_vae(encoders)
    rows = []
    for number in range(min(ROWS, len(batch.keys))):
        latents = batch.latents[number]
        shown = torch.linspace(0, latents.shape[1] - 1, min(FRAMES, latents.shape[1])).round().long()
        past = [] if batch.past is None else [batch.past[number, -1][:, None]]
        row = torch.cat([batch.portrait[number][:, None], *past, latents[:, shown]], dim=1)
        rows.append(decode_latents(vae, row))
    run.contact_sheet((torch.cat(rows) * 255).round().to(torch.uint8), len(rows[0]), path)
