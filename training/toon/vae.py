"""Trains the toon checkpoint's small VAE (Stable Diffusion's architecture and scaling) on rendered faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memo_core.checkpoint.save import save_module

from .. import run
from . import heads, sizes

STEPS = 2400
BATCH_IDENTITIES, BATCH_FRAMES = 4, 2
LEARNING_RATE = 2e-3
SCALING = sizes.VAE["scaling_factor"]


def random_motions(count: int, rng: np.random.Generator) -> Tensor:
    """Motions over their whole range, beyond what a performance visits, many with a shut mouth or open eyes."""
    motion = rng.uniform(-1, 1, (count, len(heads.MOTION))).astype(np.float32)
    for name in ("mouth_open", "lids"):
        index = heads.MOTION.index(name)
        motion[:, index] = motion[:, index] * 0.5 + 0.5
    motion[rng.random(count) < 0.25, heads.MOTION.index("mouth_open")] = 0.0
    motion[rng.random(count) < 0.5, heads.MOTION.index("lids")] = 1.0
    return torch.from_numpy(motion)


def random_faces(identities: int, frames: int, rng: np.random.Generator) -> Tensor:
    """uint8 [identities * frames, 3, H, W]."""
    return torch.cat(
        [
            heads.render(heads.sample_identity(rng), random_motions(frames, rng), sizes.IMAGE_SIZE)
            for _ in range(identities)
        ]
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss(vae, pictures: Tensor, anchor: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Absolute error of pixels and of edges, at two scales, and what keeps the latents easy to sample.

    A pull towards a normal distribution makes the decoder forgive small errors of a sampler. `anchor` pulls the first
    three latent channels towards the patch's mean colour: colour is what a small autoencoder with group norms learns
    last, and latents that look like the picture are easier to diffuse.
    """
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(latents).sample
    total = torch.zeros(())
    for scale in (1, 4):
        a, b = (F.avg_pool2d(x, scale) if scale > 1 else x for x in (decoded, pictures))
        total = total + F.l1_loss(a, b) + sum(F.l1_loss(c, d) for c, d in zip(edges(a), edges(b)))
    colour = F.mse_loss(posterior.mean[:, :3].float(), F.avg_pool2d(pictures, 8))
    return total + anchor * colour + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel(), decoded


@torch.no_grad()
def standardise(vae, pictures: Tensor) -> None:
    """Rescales each latent channel to mean 0 and standard deviation 1 / scaling, exactly undone by the decoder's first
    layer, so that scaled latents are as wide as the noise they start from.
    """
    mean = vae.encode(pictures).latent_dist.mean
    centre, spread = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    factor = (1 / SCALING) / spread
    channels = len(factor)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] *= factor.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - centre) * factor
    bias[channels:] += 2 * factor.log()  # the second half is the log variance
    undo = vae.post_quant_conv
    undo.bias += (undo.weight[:, :, 0, 0] * centre).sum(dim=1)
    undo.weight /= factor.view(1, -1, 1, 1)


def train(folder: Path, steps: int = STEPS) -> Path:
    """Trains or resumes; returns the folder of the finished VAE."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKL.from_config(sizes.VAE)
    average = run.Average(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    job = run.Job(
        folder / "vae_job", steps, {"vae": vae, "average": average}, optimizer, generator, settings=str(sizes.VAE)
    )
    for step in job.steps():
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * run.warmup_cosine(step, steps, 100)
        pictures = run.to_signed(random_faces(BATCH_IDENTITIES, BATCH_FRAMES, run.numpy_rng(generator)))
        with torch.autocast("cpu", torch.bfloat16):
            total, decoded = loss(vae, pictures, max(0.03, 1 - 2 * step / steps), generator)
        run.descend(optimizer, total)
        average.update(vae)
        if step % 20 == 0:
            job.log(loss=total.detach(), l1=F.l1_loss(decoded.detach().float(), pictures))
        if step % 250 == 0 or step == steps - 1:
            pairs = torch.cat([pictures[:8], decoded.detach()[:8].float()])
            run.contact_sheet(run.to_bytes(pairs), len(pairs) // 2, folder / "samples" / f"vae_{step:05d}.png")
    vae = average.module.eval()
    standardise(vae, run.to_signed(random_faces(64, 4, np.random.default_rng(1))))
    save_module(folder / "checkpoint" / "vae", vae, sizes.VAE)
    return folder / "checkpoint" / "vae"
