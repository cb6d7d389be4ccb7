"""The three stages of diffusion training (MEMO section 4.3), small: faces; audio and memory; longer memories."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memo_core import checkpoint
from memo_core.audio import NEIGHBOURS
from memo_core.clips import WINDOW
from memo_core.job import Settings
from memo_core.kernels import DECAY
from memo_core.nets.audio_module import NULL_EMOTION
from memo_core.nets.config import NetConfig
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.memory_module import Memory
from memo_core.nets.projections import AudioProjection, ImageProjection
from memo_core.nets.reference_net import ReferenceNet
from memo_core.sampling import Conditions, decode, sample_window

from . import data, losses, presets, run, voices
from .data import Batch
from .presets import StageConfig

PREVIEW_SECONDS = 240.0
PREVIEWS = 6


class Nets(nn.Module):
    """The four networks that the stages train."""

    def __init__(self) -> None:
        super().__init__()
        self.reference_net = ReferenceNet(NetConfig.from_json(presets.REFERENCE_NET))
        self.diffusion_net = DiffusionNet(NetConfig.from_json(presets.DIFFUSION_NET))
        self.image_proj = ImageProjection(presets.FACE_EMBEDDING, presets.TOKEN_DIM)
        self.audio_proj = AudioProjection(
            (2 * NEIGHBOURS + 1) * presets.SPEECH_LAYERS * presets.SPEECH_DIM,
            256,
            presets.TOKEN_DIM,
            presets.AUDIO_TOKENS,
        )

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the paper's figure 2 they belong to."""
        groups: dict[str, list[nn.Parameter]] = {"reference": list(self.reference_net.parameters())}
        groups["projections"] = [*self.image_proj.parameters(), *self.audio_proj.parameters()]
        for name, parameter in self.diffusion_net.named_parameters():
            part = "audio" if ".audio_modules." in name else "memory" if ".motion_modules." in name else "spatial"
            groups.setdefault(part, []).append(parameter)
        return groups


@torch.no_grad()
def initialise(nets: Nets) -> None:
    """A start from which the networks can grow, as the released ones grew out of Stable Diffusion's.

    Both nets begin with equal weights and with queries equal to keys, so that a place in the video attends first to
    places like it in the portrait; new modules begin silent (zero output).
    """
    own = nets.diffusion_net.state_dict()
    nets.reference_net.load_state_dict(
        {k: v for k, v in own.items() if k in nets.reference_net.state_dict()}, strict=False
    )
    for net in (nets.diffusion_net, nets.reference_net):
        for name, module in net.named_modules():
            if name.endswith("attn1") and ".attentions." in name:
                module.to_q.weight.mul_(1.7)
                module.to_k.weight.copy_(module.to_q.weight)
    for name, module in nets.diffusion_net.named_modules():
        if (
            name.endswith("proj_out")
            and (".audio_modules." in name or ".motion_modules." in name)
            or name == "conv_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def memory_of(nets: Nets, past: Tensor, face_tokens: Tensor, begins: Tensor | None = None) -> list[Memory]:
    """Memory of past windows, decayed and summed as `memo_core.memory` does.

    Args:
        past: [B, P * 16, 4, h, w] latents, oldest first.
        face_tokens: [1, tokens, C].
        begins: [B] bool; these rows are a video's first window: only the last of the past windows counts.
    """
    batch, frames, _, height, width = past.shape
    with torch.no_grad():  # the past is given: only what the memory layers make of it is learned
        features = nets.reference_net(past.flatten(0, 1), face_tokens.expand(batch * frames, -1, -1))
    for feature in features:  # torch's group norm on the CPU crashes in backward when its input alone needs no gradient
        feature.requires_grad_(torch.is_grad_enabled())
    memory: list[Memory] = []
    for first in range(0, frames, WINDOW):
        window = [f.unflatten(0, (batch, frames))[:, first : first + WINDOW].flatten(0, 1) for f in features]
        sums = list(nets.diffusion_net.memory_sums(window, height, width, WINDOW))
        if memory:
            factor = torch.full((batch, 1, 1, 1), DECAY**WINDOW)
            if begins is not None:
                factor = factor * ~begins.view(-1, 1, 1, 1)
            memory = [(kv * factor[..., None] + a, z * factor + b) for (kv, z), (a, b) in zip(memory, sums)]
        else:
            memory = sums
    return memory


def flow_loss(
    nets: Nets, batch: Batch, config: StageConfig, threshold: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss of one step, and the share of samples that the robust filter kept at this threshold."""
    count, _, frames, height, width = batch.latents.shape

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    drop_all = chance(config.drop_all)
    no_reference = drop_all | chance(config.drop_reference)
    # At least one row has a reference: the Reference Net cannot run on none.
    no_reference[int(torch.randint(count, (1,), generator=generator))] = False
    order = no_reference.int().argsort(descending=True, stable=True)  # the net expects rows without a reference first
    unconditional = int(no_reference.sum())

    face_tokens = nets.image_proj(torch.zeros(1, presets.FACE_EMBEDDING))  # toon heads have no face embedding
    shown = batch.portrait[order][unconditional:]
    reference = nets.reference_net(shown, face_tokens.expand(len(shown), -1, -1))
    if batch.audio is None:
        audio_tokens = emotion = memory = None
        sigma = losses.draw_sigma(count * frames, config.sigma_mean, generator)
    else:
        silent = (drop_all | chance(config.drop_audio))[order]
        audio_tokens = nets.audio_proj(batch.audio[order]) * ~silent.view(-1, 1, 1, 1)
        emotion = batch.emotion[order].masked_fill((drop_all | chance(config.drop_emotion))[order], NULL_EMOTION)
        begins = chance(config.start_ratio)
        past = torch.where(begins.view(-1, 1, 1, 1, 1), batch.portrait[:, None], batch.past)
        past = past + config.past_noise * torch.rand(count, 1, 1, 1, 1, generator=generator) * torch.randn(
            past.shape, generator=generator
        )
        memory = memory_of(nets, past[order], face_tokens, begins[order])
        known = ~chance(config.drop_past)[order].view(-1, 1, 1, 1)
        memory = [(kv * known[..., None], z * known) for kv, z in memory]
        sigma = losses.draw_sigma(count, config.sigma_mean, generator).repeat_interleave(frames)

    clean = batch.latents[order]
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma.view(count, 1, frames, 1, 1)
    noisy, velocity = losses.noised(clean, noise, level)
    predicted = nets.diffusion_net(
        noisy,
        sigma * 1000,
        reference=reference,
        memory=memory,
        face_tokens=face_tokens.expand(count, -1, -1),
        audio_tokens=audio_tokens,
        emotion=emotion,
        unconditional=unconditional,
    )
    weight = 1 + (config.mouth_weight - 1) * batch.focus[order].view(count, 1, 1, height, width)
    return losses.robust_flow_loss(predicted.float(), velocity, level, weight, threshold, no_reference[order])


def draws(config: StageConfig, folder: Path, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches for a stage."""
    stored = data.read(folder / "data", "faces" if config.faces else "clips")
    while True:
        if config.faces:
            yield data.draw_faces(stored, config.batch, config.frames, generator)
            continue
        choice = int(torch.randint(len(config.past_windows), (1,), generator=generator))
        yield data.draw_windows(stored, config.batch, config.frames, config.past_windows[choice], generator)


def train(config: StageConfig, folder: Path, previous: Path | None) -> Path:
    """Trains or resumes one stage; returns the file of its averaged weights.

    Args:
        folder: with `data/` and `checkpoint/vae`; the stage's state goes to `<folder>/<name>_job`.
        previous: averaged weights to start from; None initialises.
    """
    torch.manual_seed(config.seed)
    nets = Nets()
    if previous is None:
        initialise(nets)
    else:
        nets.load_state_dict(torch.load(previous, weights_only=True))
    average = run.Average(nets, config.ema)
    groups = nets.groups()
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(name in config.train)
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "name": name} for name in config.train],
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )
    generator = torch.Generator().manual_seed(config.seed + 1)
    modules = {"nets": nets, "average": average}
    settings = f"{config} on {previous and file_digest(previous)}"
    job = run.Job(folder / f"{config.name}_job", config.steps, modules, optimizer, generator, settings=settings)
    batches = draws(config, folder, generator)
    shown = next(draws(config, folder, torch.Generator().manual_seed(7)))
    previewed = time.monotonic()
    for step in job.steps():
        factor = run.warmup_cosine(step, config.steps, config.warmup_steps)
        for group in optimizer.param_groups:
            late = step < config.join_step and group["name"] in ("reference", "spatial")
            group["lr"] = 0.0 if late else config.learning_rate * factor
        batch = next(batches)
        threshold = config.robust_threshold if step >= config.robust_from else math.inf
        # Plain attention: torch's fused kernel is slower backwards for heads as narrow as these.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            loss, kept = flow_loss(nets, batch, config, threshold, generator)
        run.descend(optimizer, loss)
        average.update(nets)
        if step % 10 == 0:
            job.log(loss=loss.detach(), kept=kept)
        if time.monotonic() - previewed > PREVIEW_SECONDS or step == config.steps - 1:
            preview(average.module, shown, folder, f"{config.name}_{step:05d}")
            previewed = time.monotonic()
    weights = folder / f"{config.name}.pt"
    temporary = weights.with_suffix(".tmp")
    torch.save(average.module.state_dict(), temporary)
    os.replace(temporary, weights)
    return weights


def file_digest(path: Path) -> str:
    """First digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@torch.no_grad()
def preview(nets: Nets, batch: Batch, folder: Path, name: str) -> None:
    """A picture of samples: in each row the portrait, true frames, and sampled ones under the same conditions."""
    generator = torch.Generator().manual_seed(7)
    vae, _ = data.encoders(folder / "checkpoint")
    tokens = nets.image_proj(torch.zeros(1, presets.FACE_EMBEDDING))
    pictures = []
    for row in range(min(PREVIEWS, len(batch.portrait))):
        portrait, clean = batch.portrait[row : row + 1], batch.latents[row]
        conditions = Conditions(
            reference=nets.reference_net(portrait, tokens),
            memory=None if batch.past is None else memory_of(nets, batch.past[row : row + 1], tokens),
            face_tokens=tokens,
            audio_tokens=None if batch.audio is None else nets.audio_proj(batch.audio[row : row + 1]),
            emotion=None if batch.emotion is None else batch.emotion[row : row + 1],
        )
        noise = torch.randn(clean[None].shape, generator=generator)
        sampled = sample_window(nets, noise, conditions, Settings(steps=10, guidance_scale=1.0))[0]
        step_by = max(1, clean.shape[1] // 4)
        pictures += [
            decode(vae, x) for x in (portrait[0][:, None], clean[:, ::step_by][:, :4], sampled[:, ::step_by][:, :4])
        ]
    frames = (torch.cat(pictures) * 255).round().to(torch.uint8)
    run.contact_sheet(frames, len(frames) // min(PREVIEWS, len(batch.portrait)), folder / "samples" / f"{name}.png")


def assemble(folder: Path, out: Path) -> None:
    """Gathers what the jobs in `folder` made into a checkpoint in the released layout, half precision, with a record of
    the training (steps, seconds, hardware). `out` is replaced whole, once the new one has been loaded."""
    nets = Nets()
    nets.load_state_dict(torch.load(folder / f"{presets.TOON_STAGES[-1].name}.pt", weights_only=True))
    new, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folder / "checkpoint", new)
    for name, config in (
        ("reference_net", presets.REFERENCE_NET),
        ("diffusion_net", presets.DIFFUSION_NET),
        ("image_proj", {"_class_name": "ImageProjModel"}),
        ("audio_proj", {"_class_name": "AudioProjModel"}),
    ):
        checkpoint.save_module(new / name, getattr(nets, name), config)
    jobs = {}
    for path in sorted(folder.glob("*_job/state.pt")):
        state = torch.load(path, weights_only=True)
        jobs[path.parent.name.removesuffix("_job")] = {"steps": state["step"], "seconds": round(state["seconds"])}
    record = {
        "jobs": jobs,
        "processors": os.cpu_count(),
        "processor": processor(),
        "torch": torch.__version__,
        "espeak_ng": voices.espeak_available(),
    }
    (new / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    checkpoint.load(new)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
