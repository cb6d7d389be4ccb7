"""What each approximation costs and brings on toon heads: `python -m benchmarks.presets`.

For every variant: passes of one row of the Diffusion Net per window (what guidance and steps come to),
processor seconds, the latents' relative error against `exact`, and what the judge sees: whether the mouth follows the
voice, whether the face stays itself, whether the emotion reads back. Writes presets.json; goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from memo_core import MemoPipeline
from memo_core.sampling.settings import PRESETS, Speed
from training.toon import heads
from training.toon.evaluate import MOUTH, Case, draw_case
from training.toon.judge import Judge, correlation_and_lag, read_emotion, ssim
from training.toon.voices import RATE

from .results import hardware

VARIANTS: dict[str, Speed] = {
    "exact": PRESETS["exact"],
    "guidance from sigma 0.2": Speed(guidance=(0.2, 1.0)),
    "guidance from sigma 0.4": Speed(guidance=(0.4, 1.0)),
    "guidance up to sigma 0.8": Speed(guidance=(0.0, 0.8)),
    "10 steps": Speed(max_steps=10),
    "6 steps": Speed(max_steps=6),
    "10 steps, ab2": Speed(max_steps=10, solver="ab2"),
    "6 steps, ab2": Speed(max_steps=6, solver="ab2"),
    "fp8 sums": Speed(fp8_sums=True),
    "balanced": PRESETS["balanced"],
    "draft": PRESETS["draft"],
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.presets", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4, help="faces and voices, 4 s each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("presets.json"))
    args = parser.parse_args()
    pipe, judge = MemoPipeline.from_pretrained("toon"), Judge.load()
    cases = [draw_case(index, args.seconds) for index in range(args.clips)]
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    measured = report.setdefault("variants", {})
    report |= {"hardware": hardware(), "clips": args.clips, "seconds": args.seconds, "checkpoint": pipe.nets.digest}
    exact: list[Tensor] = []
    for name in dict.fromkeys(["exact", *args.only]):
        speed = json.loads(json.dumps(asdict(VARIANTS[name])))
        if name != "exact" and measured.get(name, {}).get("speed") == speed:
            continue
        figures, latents = measure(pipe, judge, cases, VARIANTS[name])
        exact = exact or latents
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(latents, exact)]
        figures["latent_error"] = sum(errors) / len(errors)
        measured[name] = {"speed": speed, **figures}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name:<26}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)


@torch.no_grad()
def measure(pipe: MemoPipeline, judge: Judge, cases: list[Case], speed: Speed) -> tuple[dict[str, float], list[Tensor]]:
    """Means over the cases, and the latents of each."""
    rows = [0]
    net = pipe.nets.diffusion_net
    hook = net.mid_block.attentions[0].register_forward_hook(lambda _, given, x: rows.__setitem__(0, rows[0] + len(x)))
    values: dict[str, list[float]] = {}
    latents = []
    try:
        for seed, case in enumerate(cases):
            audio = pipe.encode_audio(case.spoken.waveform, RATE, fps=heads.FPS)
            heard = pipe.detect_emotion(case.spoken.waveform, RATE, audio.num_padded_frames)
            told = heard.with_label(0, audio.num_padded_frames / heads.FPS, case.spoken.emotion)
            ref = pipe.encode_reference(case.portrait.permute(1, 2, 0).numpy())
            rows[0], began = 0, time.process_time()
            clip, _ = pipe.sample_clip(ref, audio, told, seed=seed, speed=speed)
            spent = time.process_time() - began
            latents.append(clip.latents)
            frames = (clip.to_tensor().permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
            motion, windows = judge.read(frames), audio.num_padded_frames / 16
            lips = correlation_and_lag(motion[:, MOUTH], case.motion[: len(frames), MOUTH])
            outside = heads.mask_outside_mouth_and_eyes(case.identity)
            for key, value in {
                "row_passes": rows[0] / 16 / windows,
                "processor_seconds_per_window": spent / windows,
                "mouth_correlation": lips.correlation,
                "mouth_lag": abs(lips.lag),
                "likeness": ssim(frames[-1], case.portrait, outside),
                "emotion_read": float(int(read_emotion(motion).argmax()) == case.spoken.emotion),
            }.items():
                values.setdefault(key, []).append(float(value))
    finally:
        hook.remove()
    return {key: sum(each) / len(each) for key, each in values.items()}, latents


if __name__ == "__main__":
    main()
