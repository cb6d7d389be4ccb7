"""The judge: reads motion parameters, and so emotions, back from pictures of toon heads, and measures likeness.

It grades generated videos, so it is trained on true renders that are softened the way a small VAE softens them, and
must itself be shown to read identities it has never seen (`examine`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from memo_core.checkpoint.layout import assets

from . import heads

ASSET = assets() / "judge.safetensors"

# How much a clip's mean may stray from its emotion's signature: what performances vary by, plus the judge's own error.
_SPREAD = torch.tensor([0.12, 0.14, 0.14, 0.09, 0.12])
_SIGNATURE_COLUMNS = [heads.MOTION.index(name) for name in heads.SIGNATURE_COLUMNS]


class Judge(nn.Module):
    """A small convolutional network from a frame to the ten motion parameters. It looks at 64x64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                layer
                for fan_in, fan_out, stride in ((5, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 2), (64, 96, 2))
                for layer in (nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.GroupNorm(8, fan_out), nn.SiLU())
            )
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, 160), nn.SiLU(), nn.Linear(160, len(heads.MOTION)))

    def forward(self, frames: Tensor) -> Tensor:
        """Motion [N, 10] (see `heads.MOTION`) of frames [N, 3, H, W], uint8 or float in [0, 1], any size."""
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"frames must be [N, 3, H, W], got {list(frames.shape)}")
        frames = _unit(frames).to(self.head[1].weight.dtype)
        if frames.shape[-2:] != (64, 64):
            frames = F.interpolate(frames, (64, 64), mode="area")
        # A flat face says little by its colours alone: where things are counts, so each pixel knows its place.
        line = torch.linspace(-1.0, 1.0, 64, dtype=frames.dtype, device=frames.device)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(frames), 2, 64, 64)
        return self.head(self.features(torch.cat([frames * 2.0 - 1.0, place], dim=1)))

    @torch.inference_mode()
    def read(self, frames: Tensor) -> Tensor:
        """Motion [F, 10] of a whole clip [F, 3, H, W], a batch at a time."""
        return torch.cat([self(part) for part in frames.split(64)]).float()

    def save(self, path: Path | str) -> None:
        """Write the weights in half precision."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, str(path))

    @classmethod
    def load(cls, path: Path | str = ASSET) -> Judge:
        """Read a judge that `save` wrote; ready to judge, in float32."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
        return judge.eval().requires_grad_(False)


def read_emotion(motion: Tensor) -> Tensor:
    """Probabilities [8] of the emotions behind a clip's motion [F, 10]: how near its mean is to each signature."""
    mean = motion[:, _SIGNATURE_COLUMNS].float().mean(dim=0).cpu()
    distance = (mean - torch.tensor(heads.SIGNATURES)) / _SPREAD
    return (-0.5 * distance.square().sum(dim=1)).softmax(dim=0)


# --- Measures ---------------------------------------------------------------------------------------------------------


class Correlation(NamedTuple):
    """Pearson's correlation of two tracks without shift, and the shift (frames) at which it is highest."""

    correlation: float
    lag: int
    best: float


def correlation_and_lag(a: Tensor, b: Tensor, max_lag: int = 10) -> Correlation:
    """Correlate two tracks [F]. A positive lag says that `a` comes so many frames later than `b`.

    A track that never moves correlates 0 with anything.

    Raises:
        ValueError: if the tracks differ in length or are not longer than `max_lag` by at least 2 frames.
    """
    if a.ndim != 1 or a.shape != b.shape or len(a) < max_lag + 2:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"two tracks [F] of one length above {max_lag + 1} are needed, got {shapes}")
    a, b = a.double(), b.double()

    def at(lag: int) -> float:
        x, y = (a[lag:], b[: len(b) - lag]) if lag >= 0 else (a[:lag], b[-lag:])
        x, y = x - x.mean(), y - y.mean()
        norm = float(x.norm() * y.norm())
        return float(x @ y) / norm if norm > 1e-12 else 0.0

    # Of equal ones the smallest shift.
    lags = sorted(range(-max_lag, max_lag + 1), key=abs)
    best = max(lags, key=at)
    return Correlation(at(0), best, at(best))


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5), averaged over colours.

    Args:
        a, b: [3, H, W], uint8 or float in [0, 1].
        mask: bool [H, W]; only windows centred where it is true count.

    Raises:
        ValueError: if the shapes differ, or the mask is empty.
    """
    if a.shape != b.shape or a.ndim != 3 or (mask is not None and mask.shape != a.shape[1:]):
        raise ValueError(f"pictures [3, H, W] of one size are needed, got {list(a.shape)} and {list(b.shape)}")
    if mask is not None and not bool(mask.any()):
        raise ValueError("the mask leaves nothing to compare")
    a, b = _unit(a)[:, None], _unit(b)[:, None]
    line = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blurred(picture: Tensor) -> Tensor:
        picture = F.pad(picture, (5, 5, 5, 5), mode="reflect")
        return F.conv2d(F.conv2d(picture, line[None, None, None]), line[None, None, :, None])

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    index = index.mean(dim=(0, 1))
    return float(index.mean() if mask is None else index[mask].mean())


def _unit(frames: Tensor) -> Tensor:
    """Colours as float in [0, 1]."""
    return frames.float() / 255.0 if frames.dtype == torch.uint8 else frames.float()


# --- Training ---------------------------------------------------------------------------------------------------------


def random_motion(frames: int, rng: np.random.Generator) -> Tensor:
    """Motion rows [F, 10] that cover every parameter's range independently of the others."""
    low = np.array([0.0 if name in ("mouth_open", "lids") else -1.0 for name in heads.MOTION])
    motion = rng.uniform(low, 1.0, (frames, len(heads.MOTION)))
    # Performances hold the head nearly still and the eyes open most of the time.
    calm = rng.random((frames, 1)) < 0.6
    for name, factor in (("head_turn", 0.4), ("head_tilt", 0.6)):
        column = heads.MOTION.index(name)
        motion[:, column : column + 1] *= np.where(calm, factor, 1.0)
    motion[rng.random(frames) < 0.25, heads.MOTION.index("mouth_open")] *= 0.15
    return torch.from_numpy(motion.astype(np.float32))


def soften(frames: Tensor, generator: torch.Generator) -> Tensor:
    """What a small VAE and a sampler do to frames, roughly: blur, noise, a cast; float [N, 3, H, W] in and out."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    parts = list(frames.split(max(1, len(frames) // 8)))
    for i, part in enumerate(parts):
        size = part.shape[-1]
        choice = int(torch.randint(4, (), generator=generator))
        if choice == 1:
            part = F.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
        elif choice >= 2:
            low = int(size * float(uniform(0.3, 0.8)))
            part = F.interpolate(F.interpolate(part, (low, low), mode="area"), (size, size), mode="bicubic")
        parts[i] = part
    frames = torch.cat(parts)
    count = len(frames)
    frames = frames * uniform(0.9, 1.1, count, 3, 1, 1) + uniform(-0.05, 0.05, count, 3, 1, 1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator) * uniform(0.0, 0.04, count, 1, 1, 1)
    frames = frames + F.interpolate(coarse, frames.shape[-2:], mode="bilinear")
    return frames + torch.randn(frames.shape, generator=generator) * uniform(0.0, 0.04, count, 1, 1, 1)


def train_judge(
    out_path: Path | str = ASSET, steps: int = 6000, seed: int = 0, batch: int = 64, minutes: float | None = None
) -> Judge:
    """Train a judge on endless random faces and write it. The same seed and steps give the same judge.

    Args:
        out_path: the safetensors file.
        steps: optimiser steps.
        batch: frames a step.
        minutes: stop early after so long (the learning rate follows the clock, then, and the result depends on the
            machine's speed).
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge().train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    # A pool of rendered frames at the size the judge looks at, renewed bit by bit: each frame is seen a few times, so
    # that drawing costs less than learning.
    per_face, pool_size = 16, 8192
    pool = torch.empty(pool_size, 3, 64, 64, dtype=torch.uint8)
    truth = torch.empty(pool_size, len(heads.MOTION))

    def refill(at: int) -> None:
        identity = heads.sample_identity(rng)
        truth[at : at + per_face] = random_motion(per_face, rng)
        frames = heads.render(identity, truth[at : at + per_face], 128).float()
        pool[at : at + per_face] = F.avg_pool2d(frames, 2).round().to(torch.uint8)

    for at in tqdm(range(0, pool_size, per_face), desc="judge: first faces", unit="face"):
        refill(at)
    started, at = time.monotonic(), 0
    with tqdm(total=steps, desc="judge", unit="step") as progress:
        for step in range(steps):
            done = step / steps
            if minutes is not None:
                done = max(done, (time.monotonic() - started) / (60.0 * minutes))
                if done >= 1.0:
                    break
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1.0 - done) + 1e-6
            refill(at)
            at = (at + per_face) % pool_size
            picked = torch.randint(pool_size, (batch,), generator=generator)
            frames = soften(pool[picked].float() / 255.0, generator)
            loss = F.smooth_l1_loss(judge(frames), truth[picked], beta=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            optimiser.step()
            progress.update()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{float(loss):.4f}")
    judge.save(out_path)
    return Judge.load(out_path)


@torch.inference_mode()
def examine(judge: Judge, faces: int = 60, clips: int = 160, seed: int = 1 << 41) -> dict[str, float]:
    """How well a judge reads true renders of faces it was not trained on.

    Returns:
        "r2/<motion parameter>": coefficient of determination over random motions, 16 frames of each face; and
        "emotion": share of clips of 4 s, an equal number of each emotion, whose emotion it reads rightly.
    """
    rng = np.random.default_rng(seed)
    wanted = [random_motion(16, rng) for _ in range(faces)]
    read = torch.cat([judge.read(heads.render(heads.sample_identity(rng), motion)) for motion in wanted])
    truth = torch.cat(wanted)
    r2 = 1.0 - (read - truth).square().sum(dim=0) / (truth - truth.mean(dim=0)).square().sum(dim=0)
    figures = {f"r2/{name}": float(value) for name, value in zip(heads.MOTION, r2, strict=True)}
    right = 0
    for clip in range(clips):
        emotion = clip % len(heads.SIGNATURES)
        motion = heads.perform(_Babble(rng), emotion, rng)
        frames = heads.render(heads.sample_identity(rng), motion[::4])
        right += int(read_emotion(judge.read(frames)).argmax()) == emotion
    figures["emotion"] = right / clips
    return figures


class _Babble:
    """The mouth of somebody who utters random syllables for 4 s, without a voice."""

    def __init__(self, rng: np.random.Generator) -> None:
        frames = 4 * heads.FPS
        syllables = np.abs(np.sin(np.arange(frames) * rng.uniform(0.25, 0.5) + rng.uniform(0.0, np.pi)))
        self.mouth_open = syllables * rng.uniform(0.4, 1.0)
        self.mouth_width = np.sin(np.arange(frames) * rng.uniform(0.1, 0.3)) * rng.uniform(0.2, 0.8)
