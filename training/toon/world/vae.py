"""Trains the VAE on pictures of this world: first pixels and edges, then perceptual and adversarial terms.

As Stable Diffusion's autoencoders are trained (Rombach et al. 2022, appendix G; Esser et al. 2021, section 3.1): a
perceptual distance, here on the judge's features, and a discriminator of patches whose weight follows the gradients at
the decoder's last layer.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memo_core.checkpoint.save import save_module

from ... import run
from ..vae import edges, standardise
from . import drawing, judge
from .identity import sample_identity

VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 64, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": judge.SIZE,
    "scaling_factor": 0.18215,
}
STEPS, PLAIN, WHOLE = 7000, 3000, 6200  # in all; without judge and discriminator; from here on whole pictures
BATCH, BATCH_WHOLE, CROP = 8, 3, 128
LEARNING_RATE, DISCRIMINATOR_RATE = 1.5e-3, 4e-4
PERCEPTUAL, ADVERSARIAL = 0.5, 0.4


class PatchDiscriminator(nn.Module):
    """How real every patch of a picture is (Isola et al. 2017); sees 22 pixels."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


def perceptual_distance(eyes: judge.Judge, a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the judge's normalised features at its finest levels; pictures in [-1, 1]."""
    total = torch.zeros(())
    both = eyes.features(torch.cat([a, b]) * 0.5 + 0.5)[:levels]
    for level in both:
        level = F.normalize(level.float(), dim=1)
        mine, wanted = level.chunk(2)
        total = total + (mine - wanted).abs().sum(dim=1).mean()
    return total / levels


def reconstruction(
    vae: nn.Module, pictures: Tensor, anchor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Absolute error of pixels and of edges, at two scales, and what keeps the latents easy to sample; the decoded.

    A pull towards a normal distribution makes the decoder forgive small errors of a sampler. `anchor` pulls the first
    three latent channels towards the patch's mean colour: colour is what a small autoencoder with group norms learns
    last, and latents that look like the picture are easier to diffuse.
    """
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(latents).sample.float()
    total = torch.zeros(())
    for scale in (1, 4):
        a, b = (F.avg_pool2d(x, scale) if scale > 1 else x for x in (decoded, pictures))
        total = total + F.l1_loss(a, b) + sum(F.l1_loss(c, d) for c, d in zip(edges(a), edges(b)))
    colour = F.mse_loss(posterior.mean[:, :3].float(), F.avg_pool2d(pictures, 8))
    return total + anchor * colour + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel(), decoded


def _crops(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """A piece of each picture, more often of its middle, where the face is."""
    most = frames.shape[-1] - CROP
    corners = np.clip(rng.normal((0.5 * most, 0.42 * most), 0.3 * most, (len(frames), 2)), 0, most).astype(int)
    return torch.stack([f[:, y : y + CROP, x : x + CROP] for f, (x, y) in zip(frames, corners)])


def _weight(rec: Tensor, adversarial: Tensor, last: nn.Parameter) -> Tensor:
    """How strong the discriminator may pull: as strong as the rest does at the decoder's last layer."""
    mine = torch.autograd.grad(rec, last, retain_graph=True)[0]
    other = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    return (mine.norm() / (other.norm() + 1e-6)).clamp(0, 10).detach()


def train(folder: Path, steps: int = STEPS) -> Path:
    """Trains or resumes; returns the folder of the finished VAE. From step PLAIN on it waits for judge.safetensors in
    `folder`.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae, critic = AutoencoderKL.from_config(VAE), PatchDiscriminator()
    average = run.Average(vae)
    groups = [
        {"params": list(vae.parameters()), "base": LEARNING_RATE},
        {"params": list(critic.parameters()), "base": DISCRIMINATOR_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    modules = {"vae": vae, "average": average, "critic": critic}
    job = run.Job(folder / "vae_job", steps, modules, optimizer, generator, settings=str(VAE))
    pool, eyes = judge.Pool(1024, run.numpy_rng(generator)), None
    last = vae.decoder.conv_out.weight
    for step in job.steps():
        if step >= PLAIN and eyes is None:
            while not (folder / "judge.safetensors").exists():
                time.sleep(30)
            eyes = judge.Judge.load(folder / "judge.safetensors")
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * run.warmup_cosine(step, steps, 100)
        if step % 2 == 0:
            pool.renew(judge.PER_FACE)
        whole = step >= WHOLE
        frames = pool.frames[pool.draw(BATCH_WHOLE if whole else BATCH, generator)]
        pictures = run.to_signed(frames if whole else _crops(frames, run.numpy_rng(generator)))
        figures = {}
        with torch.autocast("cpu", torch.bfloat16):
            total, decoded = reconstruction(vae, pictures, max(0.03, 1 - 2 * step / steps), generator)
            if eyes is not None:
                seen = perceptual_distance(eyes, decoded, pictures)
                total = total + PERCEPTUAL * seen
                fooled = -critic(decoded).float().mean()
                pull = _weight(total, fooled, last) * ADVERSARIAL * min(1.0, (step - PLAIN) / 500)
                real, fake = critic(pictures).float(), critic(decoded.detach()).float()
                caught = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
                figures = {"seen": seen.detach(), "caught": caught.detach(), "pull": pull}
        optimizer.zero_grad(set_to_none=True)
        if figures:
            (total + pull * fooled).backward()
            critic.zero_grad(set_to_none=True)  # what fooling it left there
            caught.backward()
        else:
            total.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        average.update(vae)
        if step % 20 == 0:
            job.log(loss=total.detach(), l1=F.l1_loss(decoded.detach(), pictures), **figures)
        if step % 500 == 0 or step == steps - 1:
            _show(average.module, folder / "samples" / f"vae_{step:05d}.png")
    vae = average.module.eval()
    standardise(vae, run.to_signed(pool.frames[pool.draw(192, generator)]))
    save_module(folder / "checkpoint" / "vae", vae, VAE)
    return folder / "checkpoint" / "vae"


@torch.no_grad()
def _show(vae: nn.Module, path: Path) -> None:
    """Eight people nobody trains with, and what comes back of them."""
    rng = np.random.default_rng(1 << 40)
    frames = [drawing.render(sample_identity(rng), judge.random_motion(1, rng)) for _ in range(8)]
    pictures = run.to_signed(torch.cat(frames))
    back = torch.cat([vae.decode(vae.encode(p[None]).latent_dist.mean).sample for p in pictures])
    run.contact_sheet(run.to_bytes(torch.cat([pictures, back])), 8, path)
