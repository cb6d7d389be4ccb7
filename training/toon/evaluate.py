"""Measures a toon checkpoint on faces and voices it has not seen, against the exact truth, by the judge."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memo_core import MemoPipeline
from memo_core.inputs.emotion import EmotionTrack
from memo_core.release import EMOTIONS

from .. import run
from . import heads
from .judge import Judge, correlation_and_lag, read_emotion, ssim
from .speech import utterance
from .voices import RATE, Utterance

SEED = 1 << 21  # training draws from other seeds
SECONDS = 4.0
SHEET_CLIPS, SHEET_FRAMES = 8, 10
MOUTH = heads.MOTION.index("mouth_open")

# What is measured, and the goals. Likeness is that at a clip's end: 0.85 after 4 s, 0.8 after a minute.
MEASURES = {
    "mouth_correlation": "mouth opening against the truth, correlation",
    "mouth_lag": "lag of the mouth, frames (mean of the absolute)",
    "swapped_correlation": "the same against another clip's voice",
    "likeness": "likeness outside mouth and eyes at the end, SSIM",
    "emotion_read": "emotion told, read back from the face, of 8",
    "emotion_heard": "emotion heard in the voice by the detector, of 8",
    "vae_likeness": "likeness of the portrait after the VAE alone, SSIM",
    "frames_per_second": "frames a second",
}
AT_LEAST = {"mouth_correlation": 0.75, "likeness": 0.85, "emotion_read": 0.75}
AT_MOST = {"mouth_lag": 0.5, "swapped_correlation": 0.2}
LIKENESS_AFTER_A_MINUTE = 0.8


def missed(figures: dict[str, float]) -> list[str]:
    """Names of the goals that figures miss."""
    least = AT_LEAST | ({"likeness": LIKENESS_AFTER_A_MINUTE} if figures.get("seconds", SECONDS) >= 60 else {})
    low = [name for name, value in least.items() if not figures[name] >= value]
    return low + [name for name, value in AT_MOST.items() if not figures[name] <= value]


@dataclass(frozen=True)
class Case:
    """One clip to make: a face, a voice, and how the face truly moves to it."""

    identity: heads.Identity
    spoken: Utterance
    motion: Tensor  # [F, 10]

    @property
    def portrait(self) -> Tensor:
        """uint8 [3, H, W]."""
        return heads.render(self.identity, heads.neutral_motion()[None])[0]


def draw_case(index: int, seconds: float = SECONDS) -> Case:
    rng = np.random.default_rng([SEED, index])
    identity = heads.sample_identity(rng)
    spoken = utterance(seconds, rng, emotion=index % 8)
    return Case(identity, spoken, heads.perform(spoken, spoken.emotion, rng))


@torch.no_grad()
def sample(
    pipe: MemoPipeline, case: Case, *, steps: int, guidance_scale: float, seed: int
) -> tuple[Tensor, EmotionTrack]:
    """uint8 frames [F, 3, H, W] of a case under its true emotion, and the emotion that the detector hears."""
    audio = pipe.encode_audio(case.spoken.waveform, RATE, fps=heads.FPS)
    heard = pipe.detect_emotion(case.spoken.waveform, RATE, audio.num_padded_frames)
    told = heard.with_label(0, audio.num_padded_frames / heads.FPS, case.spoken.emotion)
    ref = pipe.encode_reference(case.portrait.permute(1, 2, 0).numpy())
    clip, _ = pipe.sample_clip(ref, audio, told, steps=steps, guidance_scale=guidance_scale, seed=seed)
    return (clip.to_tensor().permute(0, 3, 1, 2) * 255).round().to(torch.uint8), heard


def evaluate(
    checkpoint: str | Path,
    out: Path,
    *,
    clips: int = 20,
    steps: int = 20,
    guidance_scale: float = 3.5,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Samples clips and measures them; writes figures.json and sheet.png into `out`.

    The sheet shows, for each of the first clips, the true frames above the sampled ones.
    """
    pipe, judge = MemoPipeline.from_pretrained(checkpoint), Judge.load()
    cases = [draw_case(i, seconds) for i in range(clips)]
    measured: dict[str, list[float]] = {name: [] for name in MEASURES}
    mouths, pictures = [], []
    for seed, case in enumerate(tqdm(cases, desc="clips")):
        started = time.monotonic()
        frames, heard = sample(pipe, case, steps=steps, guidance_scale=guidance_scale, seed=seed)
        measured["frames_per_second"].append(len(frames) / (time.monotonic() - started))
        motion = judge.read(frames)
        mouths.append(motion[:, MOUTH])
        lips = correlation_and_lag(motion[:, MOUTH], case.motion[: len(frames), MOUTH])
        measured["mouth_correlation"].append(lips.correlation)
        measured["mouth_lag"].append(abs(lips.lag))
        outside = heads.mask_outside_mouth_and_eyes(case.identity)
        measured["likeness"].append(ssim(frames[-1], case.portrait, outside))
        measured["emotion_read"].append(int(read_emotion(motion).argmax()) == case.spoken.emotion)
        measured["emotion_heard"].append(int(heard.labels.mode().values) == case.spoken.emotion)
        decoded = pipe.decode(pipe.encode_reference(case.portrait.permute(1, 2, 0).numpy()).latents.transpose(0, 1))
        measured["vae_likeness"].append(ssim(decoded[0], case.portrait.float() / 255, outside))
        if len(pictures) < 2 * SHEET_CLIPS:
            shown = torch.linspace(0, len(frames) - 1, SHEET_FRAMES).round().long()
            pictures += [heads.render(case.identity, case.motion[shown]), frames[shown]]
    for mouth, other in zip(mouths, cases[1:] + cases[:1]):
        measured["swapped_correlation"].append(
            correlation_and_lag(mouth, other.motion[: len(mouth), MOUTH]).correlation
        )
    figures = {name: float(np.mean(values)) for name, values in measured.items()}
    out.mkdir(parents=True, exist_ok=True)
    settings = {"clips": clips, "seconds": seconds, "steps": steps, "guidance_scale": guidance_scale}
    emotions = [EMOTIONS[case.spoken.emotion] for case in cases]
    weights = pipe.nets.digest
    report = {"checkpoint": weights, **figures, **settings, "emotions": emotions, "each": measured}
    (out / "figures.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    run.contact_sheet(torch.cat(pictures), SHEET_FRAMES, out / "sheet.png")
    return figures


def table(figures: dict[str, float]) -> str:
    """The figures as lines of text beside their goals."""
    goals = {name: f">= {value}" for name, value in AT_LEAST.items()}
    goals |= {name: f"<= {value}" for name, value in AT_MOST.items()}
    return "\n".join(
        f"{text:<55} {figures[name]:6.2f}   {goals.get(name, '')}".rstrip() for name, text in MEASURES.items()
    )
