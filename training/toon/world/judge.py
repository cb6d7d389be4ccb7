"""The judge: reads motion and identity back from pictures of this world; its features tell how near two pictures are.

It grades generated videos, so it is trained on true renders that are softened the way a small VAE and a sampler soften
them, and must itself be shown to read people it has never seen (`examine`). Its features serve perceptual losses and
Frechet distances, as published networks do elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ... import run
from . import acting, drawing
from .identity import BEARDS, COLOURS, GLASSES, HAIR, KINDS, Identity, sample_identity

SIZE = 256  # pixels of the pictures it is trained on
GEOMETRY = ("face_width", "chin", "taper", "eye_width", "eye_height", "eye_spacing", "nose_width", "mouth_width", "age")
SHAPES = {"kind": KINDS, "hair_style": tuple(HAIR), "beard": BEARDS, "glasses": GLASSES}
_LOW, _HIGH = torch.tensor([drawing.LIMITS[name] for name in drawing.MOTION]).T
_READ_COLOURS = tuple(name for name in COLOURS if name not in ("rim", "glasses_colour", "wall_picture_colour"))
STEPS, BATCH, POOL, PER_FACE = 6000, 24, 3072, 8
LEARNING_RATE = 1.5e-3

# How much a clip's mean may stray from its emotion's signature: what performances vary by, plus the judge's own error.
_SPREAD = torch.tensor([0.12, 0.14, 0.14, 0.09])
_SIGNATURE = [drawing.MOTION.index(name) for name in acting.SIGNATURE]


class Reading(NamedTuple):
    """What the judge says of pictures.

    motion [N, 14] in the units of `drawing.MOTION`; colours [N, C, 3]; geometry [N, G], of which 0 and 1 are its range
    in this world; shapes: logits [N, K] by name.
    """

    motion: Tensor
    colours: Tensor
    geometry: Tensor
    shapes: dict[str, Tensor]


class Judge(nn.Module):
    """A convolutional network from a picture to motion and identity."""

    WIDTHS = (16, 32, 64, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        before, stages = 5, []
        for width in self.WIDTHS:
            layers = [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            if before > 5:  # once where maps are largest: there it costs as much as all other levels together
                layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
            stages.append(nn.Sequential(*layers))
            before = width
        self.stages = nn.ModuleList(stages)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(before * 64, 256), nn.SiLU())
        self.sizes = [len(drawing.MOTION), 3 * len(_READ_COLOURS), len(GEOMETRY), *(len(s) for s in SHAPES.values())]
        self.head = nn.Linear(256, sum(self.sizes))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Maps of every level, finest first, of pictures [N, 3, H, W] in [0, 1], of any size."""
        line_y = torch.linspace(-1.0, 1.0, pictures.shape[2], dtype=pictures.dtype, device=pictures.device)
        line_x = torch.linspace(-1.0, 1.0, pictures.shape[3], dtype=pictures.dtype, device=pictures.device)
        # A flat face says little by its colours alone: where things are counts, so each pixel knows its place.
        place = torch.stack(torch.meshgrid(line_y, line_x, indexing="ij")).expand(len(pictures), -1, -1, -1)
        x, found = torch.cat([pictures * 2.0 - 1.0, place], dim=1), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def embed(self, pictures: Tensor) -> Tensor:
        """[N, 256], for Frechet distances."""
        return self.hidden(F.adaptive_avg_pool2d(self.features(pictures)[-1], 8))

    def forward(self, pictures: Tensor) -> Reading:
        """Of pictures [N, 3, H, W], uint8 or float in [0, 1]; they are looked at in SIZE."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures are [N, 3, H, W], received {list(pictures.shape)}")
        pictures = unit(pictures)
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        motion, colours, geometry, *shapes = self.head(self.embed(pictures)).split(self.sizes, dim=1)
        motion = _LOW + (motion + 1.0) * 0.5 * (_HIGH - _LOW)
        return Reading(motion, colours.unflatten(1, (-1, 3)), geometry, dict(zip(SHAPES, shapes)))

    @torch.inference_mode()
    def read(self, frames: Tensor) -> Tensor:
        """Motion [F, 14] of a clip [F, 3, H, W], some frames at once."""
        return torch.cat([self(part).motion for part in frames.split(16)]).float()

    def save(self, path: Path | str) -> None:
        """Writes the weights in half precision."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, str(path))

    @classmethod
    def load(cls, path: Path | str) -> Judge:
        """Reads what `save` wrote; ready to judge, in float32."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
        return judge.eval().requires_grad_(False)


def unit(frames: Tensor) -> Tensor:
    """Colours as float in [0, 1]."""
    return frames.float() / 255.0 if frames.dtype == torch.uint8 else frames.float()


def read_emotion(motion: Tensor) -> Tensor:
    """Probabilities [8] of the emotions behind a clip's motion [F, 14]: how near its mean is to each signature.

    Lids count where they are not blinking.
    """
    values = motion[:, _SIGNATURE].float().cpu()
    mean = values.mean(dim=0)
    mean[-1] = values[:, -1].quantile(0.6)
    distance = (mean - torch.tensor(acting.SIGNATURES)) / _SPREAD
    return (-0.5 * distance.square().sum(dim=1)).softmax(dim=0)


def truth_of(identity: Identity) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [C, 3], geometry [G] and numbers of shapes [S]: what the judge should say of somebody."""
    colours = torch.tensor([getattr(identity, name) for name in _READ_COLOURS])
    spans = {
        "face_width": (33, 38), "chin": (43, 47), "taper": (0.05, 0.24), "eye_width": (8.4, 10.2), "age": (0, 1),
        "eye_height": (9, 11.4), "eye_spacing": (15.8, 17.8), "nose_width": (4.2, 6.4), "mouth_width": (14.5, 17.5),
    }  # fmt: skip
    geometry = torch.tensor([(getattr(identity, n) - spans[n][0]) / (spans[n][1] - spans[n][0]) for n in GEOMETRY])
    shapes = torch.tensor([values.index(getattr(identity, name)) for name, values in SHAPES.items()])
    return colours, geometry, shapes


# --- Training ---------------------------------------------------------------------------------------------------------


def random_motion(frames: int, rng: np.random.Generator) -> Tensor:
    """Motion rows [F, 14] that cover every parameter's range independently of the others, many of them calm."""
    low, high = _LOW.numpy(), _HIGH.numpy()
    motion = rng.uniform(low, high, (frames, len(low)))
    index = {name: i for i, name in enumerate(drawing.MOTION)}
    calm = rng.random(frames) < 0.5
    for name in ("yaw", "pitch", "roll", "shift_x", "shift_y"):
        motion[calm, index[name]] *= 0.4
    motion[rng.random(frames) < 0.3, index["mouth_open"]] = 0.0
    motion[rng.random(frames) < 0.3, index["lids"]] = drawing.RELAXED_LIDS
    return torch.from_numpy(motion.astype(np.float32))


def soften(frames: Tensor, generator: torch.Generator) -> Tensor:
    """What a small VAE and a sampler do to frames, roughly: blur, noise, a cast; float [N, 3, H, W] in and out."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    parts = list(frames.split(max(1, len(frames) // 8)))
    for i, part in enumerate(parts):
        size, choice = part.shape[-1], int(torch.randint(4, (), generator=generator))
        if choice == 1:
            part = F.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
        elif choice == 2:
            low = int(size * float(uniform(0.3, 0.8)))
            part = F.interpolate(F.interpolate(part, (low, low), mode="area"), (size, size), mode="bicubic")
        parts[i] = part
    frames, count = torch.cat(parts), len(frames)
    frames = frames * uniform(0.94, 1.06, count, 3, 1, 1) + uniform(-0.03, 0.03, count, 3, 1, 1)
    coarse = torch.randn(count, 3, 16, 16, generator=generator) * uniform(0.0, 0.04, count, 1, 1, 1)
    frames = frames + F.interpolate(coarse, frames.shape[-2:], mode="bilinear")
    return frames + torch.randn(frames.shape, generator=generator) * uniform(0.0, 0.03, count, 1, 1, 1)


class Pool:
    """Pictures at hand, renewed bit by bit: each is seen a few times, so that drawing costs less than learning."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.rng, self.at = rng, 0
        self.frames = torch.empty(size, 3, SIZE, SIZE, dtype=torch.uint8)
        self.motion = torch.empty(size, len(drawing.MOTION))
        self.colours = torch.empty(size, len(_READ_COLOURS), 3)
        self.geometry = torch.empty(size, len(GEOMETRY))
        self.shapes = torch.empty(size, len(SHAPES), dtype=torch.long)
        for _ in tqdm(range(0, size, PER_FACE), desc="first pictures", mininterval=10.0):
            self.renew(PER_FACE)

    def renew(self, count: int) -> None:
        """Replaces the oldest ones by somebody new."""
        where = slice(self.at, self.at + count)
        identity, motion = sample_identity(self.rng), random_motion(count, self.rng)
        self.frames[where], self.motion[where] = drawing.render(identity, motion, SIZE), motion
        self.colours[where], self.geometry[where], self.shapes[where] = truth_of(identity)
        self.at = (self.at + count) % len(self.frames)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.frames), (count,), generator=generator)


def loss_of(reading: Reading, motion: Tensor, colours: Tensor, geometry: Tensor, shapes: Tensor) -> Tensor:
    span = (_HIGH - _LOW) * 0.5
    total = 2.0 * F.smooth_l1_loss(reading.motion / span, motion / span, beta=0.1)
    total = total + F.smooth_l1_loss(reading.colours, colours, beta=0.05)
    total = total + 0.3 * F.smooth_l1_loss(reading.geometry, geometry, beta=0.2)
    for number, name in enumerate(SHAPES):
        total = total + 0.05 * F.cross_entropy(reading.shapes[name], shapes[:, number])
    return total


def train(folder: Path, out: Path, steps: int = STEPS) -> Judge:
    """Trains or resumes, writes the judge to `out`. A resumed run draws other pictures than an unbroken one would."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge = Judge().train()
    average = run.Average(judge)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    job = run.Job(folder / "judge_job", steps, {"judge": judge, "average": average}, optimizer, generator)
    pool = Pool(POOL, run.numpy_rng(generator))
    for step in job.steps():
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * run.warmup_cosine(step, steps, 200, 0.01)
        if step % 2 == 0:
            pool.renew(PER_FACE)
        at = pool.draw(BATCH, generator)
        frames = soften(unit(pool.frames[at]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            features = judge.hidden(F.adaptive_avg_pool2d(judge.features(frames)[-1], 8))
        motion, colours, geometry, *shapes = judge.head(features.float()).split(judge.sizes, dim=1)
        motion = _LOW + (motion + 1.0) * 0.5 * (_HIGH - _LOW)
        reading = Reading(motion, colours.unflatten(1, (-1, 3)), geometry, dict(zip(SHAPES, shapes)))
        total = loss_of(reading, pool.motion[at], pool.colours[at], pool.geometry[at], pool.shapes[at])
        run.descend(optimizer, total)
        average.update(judge)
        if step % 20 == 0:
            job.log(loss=total.detach())
    judge = average.module.eval()
    judge.save(out)
    return Judge.load(out)


@torch.inference_mode()
def examine(judge: Judge, faces: int = 60, clips: int = 80, seed: int = 1 << 41) -> dict[str, float]:
    """How well a judge reads true renders of people it was not trained on.

    Returns:
        "r2/<motion parameter>": coefficient of determination over random motions, 16 pictures of each; "colour/<name>":
        mean absolute error; "shape/<name>": share read rightly; and "emotion": share of clips of 4 s, an equal number
        of each emotion, whose emotion it reads rightly.
    """
    rng = np.random.default_rng(seed)
    wanted, readings, truths = [], [], []
    for _ in range(faces):
        identity, motion = sample_identity(rng), random_motion(16, rng)
        wanted.append(motion)
        truths.append(truth_of(identity))
        readings.append(judge(drawing.render(identity, motion, SIZE)))
    read, truth = torch.cat([r.motion for r in readings]), torch.cat(wanted)
    r2 = 1.0 - (read - truth).square().sum(dim=0) / (truth - truth.mean(dim=0)).square().sum(dim=0)
    figures = {f"r2/{name}": float(value) for name, value in zip(drawing.MOTION, r2, strict=True)}
    off = torch.stack([(r.colours - t[0]).abs().mean(dim=(0, 2)) for r, t in zip(readings, truths)]).mean(dim=0)
    figures |= {f"colour/{name}": float(value) for name, value in zip(_READ_COLOURS, off)}
    for number, name in enumerate(SHAPES):
        right = [float((r.shapes[name].argmax(dim=1) == t[2][number]).float().mean()) for r, t in zip(readings, truths)]
        figures[f"shape/{name}"] = float(np.mean(right))
    right = 0
    for clip in range(clips):
        emotion = clip % len(acting.SIGNATURES)
        motion = acting.perform(Babble(rng), emotion, rng)
        right += (
            int(read_emotion(judge.read(drawing.render(sample_identity(rng), motion[::4], SIZE))).argmax()) == emotion
        )
    figures["emotion"] = right / max(1, clips)
    return figures


class Babble:
    """The mouth of somebody who utters random syllables for 4 s, without a voice."""

    def __init__(self, rng: np.random.Generator) -> None:
        frames = 4 * acting.FPS
        syllables = np.abs(np.sin(np.arange(frames) * rng.uniform(0.25, 0.5) + rng.uniform(0.0, np.pi)))
        self.mouth_open = syllables * rng.uniform(0.4, 1.0)
        self.mouth_width = np.sin(np.arange(frames) * rng.uniform(0.1, 0.3)) * rng.uniform(0.2, 0.8)
