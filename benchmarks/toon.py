"""The toon bench: what memory, multi-modal attention and emotion are worth, on heads whose truth is known exactly.

`python -m benchmarks.toon` trains small variants of MEMO that differ in one thing (or finds those that are trained
already), makes videos of 60 s with each, and has the judge measure them. It needs the first stage and the data of
`python -m training toon`. Stopped at any point, it goes on; `--report` only prints the table and draws the plots.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memo_core import MemoPipeline
from memo_core.checkpoint.digest import base_digest
from memo_core.inputs.emotion import EmotionTrack
from memo_core.release import WINDOW
from training import engine, export, presets, run
from training.config import Stage
from training.toon import heads
from training.toon.judge import Judge, correlation_and_lag, read_emotion, ssim
from training.toon.voices import RATE, sample_voice, speak

from .toon_variants import VARIANTS, Variant

SEED = 1 << 22  # training and the checkpoint's evaluation draw from other seeds
SECONDS = 60.0
EMOTIONS = len(heads.SIGNATURES)  # a video shows each of them once
DRIFT_AT = (1, 10, 30, 60)  # seconds
MOUTH, TURN, TILT = (heads.MOTION.index(name) for name in ("mouth_open", "head_turn", "head_tilt"))
RESULT = Path(__file__).parent / "toon.json"

# Name, heading, what it says, digits.
MEASURES = {
    "likeness_1": ("SSIM 1 s", "likeness to the portrait outside mouth and eyes"),
    "likeness_10": ("10 s", "the same at second 10"),
    "likeness_30": ("30 s", "the same at second 30"),
    "likeness_60": ("60 s", "the same at second 60"),
    "mouth": ("mouth r", "mouth opening against the truth, correlation"),
    "lag": ("lag", "shift at which it correlates best, frames, without sign"),
    "emotion": ("emotion", "emotion read back from the face, share of the eight"),
    "heard": ("heard", "emotion that the video was told, share of frames where it is the voice's"),
    "shake": (
        "shake",
        "second difference of the head's turn and tilt as read, relative to the truth's; mostly the judge's own noise",
    ),
    "seam": ("seam", "change of the picture between windows, relative to that within them"),
}


@dataclass(frozen=True)
class Case:
    """A face, and a voice that goes through all the emotions."""

    identity: heads.Identity
    waveform: np.ndarray  # [T] at 16 kHz
    motion: Tensor  # [F, 10] as the face truly moves
    emotions: Tensor  # [F] labels

    @property
    def portrait(self) -> Tensor:
        """uint8 [3, H, W]."""
        return heads.render(self.identity, heads.neutral_motion()[None])[0]


def draw_case(seed: int, seconds: float = SECONDS) -> Case:
    rng = np.random.default_rng([SEED, seed])
    identity, voice = heads.sample_identity(rng), sample_voice(rng)
    order = rng.permutation(EMOTIONS).tolist()
    spoken = [speak(voice, emotion, seconds / EMOTIONS, rng) for emotion in order]
    motion = [heads.perform(part, part.emotion, rng) for part in spoken]
    emotions = torch.cat([torch.full((len(m),), part.emotion) for m, part in zip(motion, spoken)])
    return Case(identity, np.concatenate([part.waveform for part in spoken]), torch.cat(motion), emotions)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(variant: Variant, args: argparse.Namespace) -> Path:
    """Trains a variant from the first stage on, or goes on with it; returns its checkpoint.

    Variants that differ in the last stage alone share the one before it.
    """
    shared = "memo" if variant.name == "fixed-past" else variant.name
    second = replace(presets.toon_stage2(), steps=args.steps, seed=args.training_seed)
    folder = args.folder / "trained"
    start = engine.latest(args.start) or args.start
    before = _stage(variant, second, folder / f"{shared}-stage2", start, args)
    third = presets.toon_stage3()
    third = replace(
        third,
        steps=args.last_steps,
        seed=args.training_seed,
        data=replace(third.data, past_windows=variant.past_windows),
    )
    return _stage(variant, third, folder / variant.name, before, args)


def _stage(variant: Variant, config: Stage, out: Path, start: Path, args: argparse.Namespace) -> Path:
    # Drawn data has no bad samples, and a filter would drop other ones for each variant.
    config = replace(config, loss=replace(config.loss, robust_threshold=math.inf))
    config = replace(config, engine=replace(config.engine, save_every=100, keep=1, sample_every=10**6))
    return engine.train(config, args.data, out, variant.nets(start, config.seed), start)


# --- Measuring --------------------------------------------------------------------------------------------------------


def sample(variant: Variant, weights: Path, case: Case, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 frames [F, 3, H, W] of a case, and the emotion labels [F] that they were told (9: none)."""
    pipe = MemoPipeline.from_pretrained(weights)
    audio = pipe.encode_audio(case.waveform, RATE, fps=heads.FPS)
    heard: EmotionTrack | None = pipe.detect_emotion(case.waveform, RATE, audio.num_padded_frames)
    if variant.emotion == "static":
        label = int(heard.labels.mode().values)
        heard = heard.with_label(0, audio.num_padded_frames / heads.FPS, label)
    elif variant.emotion == "none":
        heard = None
    ref = pipe.encode_reference(case.portrait.permute(1, 2, 0).numpy())
    clip, _ = pipe.sample_clip(
        ref,
        audio,
        heard,
        steps=args.sampling_steps,
        guidance_scale=args.guidance,
        seed=seed,
    )
    frames = (clip.to_tensor().permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
    told = torch.full((len(frames),), 9) if heard is None else heard.labels[: len(frames)]
    return frames, told


def measure(frames: Tensor, told: Tensor, case: Case, judge: Judge) -> dict[str, float]:
    """`MEASURES` of one video."""
    count = len(frames)
    truth, portrait = case.motion[:count], case.portrait
    outside = heads.mask_outside_mouth_and_eyes(case.identity)
    motion = judge.read(frames)
    figures = {}
    for second in DRIFT_AT:
        last = min(count, round(second * heads.FPS))
        shown = range(max(0, last - heads.FPS), last, 6)
        figures[f"likeness_{second}"] = statistics.fmean(ssim(frames[i], portrait, outside) for i in shown)
    lips = correlation_and_lag(motion[:, MOUTH], truth[:, MOUTH])
    figures |= {"mouth": lips.correlation, "lag": abs(lips.lag)}
    parts = torch.tensor_split(torch.arange(count), EMOTIONS)
    read = [int(read_emotion(motion[part]).argmax()) == int(case.emotions[part].mode().values) for part in parts]
    figures["emotion"] = statistics.fmean(read)
    figures["heard"] = float((told == case.emotions[:count]).float().mean())
    head = [TURN, TILT]
    figures["shake"] = float(
        motion[:, head].diff(n=2, dim=0).abs().mean() / truth[:, head].diff(n=2, dim=0).abs().mean()
    )
    change = (frames[1:].float() - frames[:-1].float()).abs().mean(dim=1)[:, outside].mean(dim=1)
    border = torch.arange(1, count) % WINDOW == 0
    figures["seam"] = float(change[border].mean() / change[~border].mean())
    return figures


def measured(variant: Variant, seed: int, args: argparse.Namespace, judge: Judge) -> None:
    """Makes and measures one video, unless that is done, with these weights and settings."""
    path = args.folder / "measured" / f"{variant.name}-{seed}.json"
    weights = _trained(variant.weights or variant.name, args)
    made_with = {
        "weights": base_digest(weights),
        "seconds": args.seconds,
        "sampling steps": args.sampling_steps,
        "guidance": args.guidance,
    }
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["made with"] == made_with:
        return
    case = draw_case(seed, args.seconds)
    frames, told = sample(variant, weights, case, args, seed)
    figures = measure(frames, told, case, judge)
    shown = torch.linspace(0, len(frames) - 1, 12).round().long()
    run.contact_sheet(frames[shown], 12, path.with_suffix(".png"))
    row = {"made with": made_with, "seed": seed, **figures}
    path.with_suffix(".tmp").write_text(json.dumps(row) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def _trained(name: str, args: argparse.Namespace) -> Path:
    found = engine.latest(args.folder / "trained" / name)
    if found is None or not export.is_exported(found):
        raise SystemExit(f"error: {name} is not trained to its end yet: run without --measure")
    return found


# --- Report -----------------------------------------------------------------------------------------------------------


def collect(args: argparse.Namespace) -> dict:
    """What has been measured, as it was made: per variant a row for each video."""
    each = {}
    for variant in VARIANTS:
        paths = sorted((args.folder / "measured").glob(f"{variant.name}-*.json"))
        if paths:
            each[variant.name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    steps = {}
    for path in sorted((args.folder / "trained").glob("*/checkpoint-*/training.json")):
        steps[path.parent.parent.name] = json.loads(path.read_text(encoding="utf-8"))["step"]
    return {"trained steps": steps, "hardware": run.hardware(), "torch": torch.__version__, "measured": each}


def table(result: dict) -> str:
    """Markdown: mean and spread (standard deviation over the videos) of every measure, and below, what each variant
    changes, as the mean and spread of the differences between videos of the same face, voice and noise.
    """
    rows = result["measured"]

    def line(name: str, values: dict[str, list[float]], digits: int = 2) -> str:
        cells = []
        for measure in MEASURES:
            spread = f" ± {statistics.stdev(values[measure]):.{digits}f}" if len(values[measure]) > 1 else ""
            cells.append(f"{statistics.fmean(values[measure]):.{digits}f}{spread}")
        return f"| {name} | {len(values['mouth'])} | " + " | ".join(cells) + " |"

    lines = [
        "| variant | videos | " + " | ".join(heading for heading, _ in MEASURES.values()) + " |",
        "| --- | --- | " + " | ".join("---" for _ in MEASURES) + " |",
    ]
    for variant in VARIANTS:
        if variant.name in rows:
            lines.append(line(variant.what, {name: [row[name] for row in rows[variant.name]] for name in MEASURES}))
    for variant in VARIANTS:
        if variant.against in rows and variant.name in rows:
            base = {row["seed"]: row for row in rows[variant.against]}
            pairs = [(row, base[row["seed"]]) for row in rows[variant.name] if row["seed"] in base]
            if pairs:
                name = f"{variant.name} less {variant.against}"
                lines.append(line(name, {m: [row[m] - other[m] for row, other in pairs] for m in MEASURES}, digits=3))
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Likeness over time, and bars of the mouth, the emotion and the seams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4.5), layout="constrained")
    shown = [variant for variant in VARIANTS if variant.name in result["measured"]]
    colours = dict(zip([variant.name for variant in shown], pyplot.get_cmap("tab10").colors))
    for variant in shown:
        rows = result["measured"][variant.name]
        if variant.emotion == "detected":
            # Against each video's own beginning: variants may have different faces measured so far.
            drift = [[row[f"likeness_{second}"] - row["likeness_1"] for row in rows] for second in DRIFT_AT]
            means = [statistics.fmean(values) for values in drift]
            axes[0].plot(DRIFT_AT, means, marker="o", label=variant.name, color=colours[variant.name])
    axes[0].set(title="likeness (SSIM) less that at second 1", xlabel="second", xscale="log")
    axes[0].set_xticks(DRIFT_AT, [str(second) for second in DRIFT_AT], minor=False)
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], ("mouth", "emotion", "seam")):
        for place, variant in enumerate(shown):
            values = [row[name] for row in result["measured"][variant.name]]
            axis.bar(place, statistics.fmean(values), color=colours[variant.name])
            axis.scatter([place] * len(values), values, color="black", s=12, zorder=2)
        axis.set_xticks(range(len(shown)), [variant.name for variant in shown], rotation=60, ha="right")
        axis.set_title(MEASURES[name][1].split(",")[0], fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toon", description=__doc__)
    parser.add_argument("--start", type=Path, default=Path("runs/toon/stage1"), help="first stage (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("runs/toon/data/clips"), help="shards (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where all of it goes (%(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of the second stage (%(default)s)")
    parser.add_argument("--last-steps", type=int, default=300, help="of the last stage (%(default)s)")
    parser.add_argument(
        "--training-seed", type=int, default=0, help="of one training; give each its own --folder (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a video (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="videos of each: faces, voices and noise (%(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--guidance", type=float, default=3.5, help="guidance scale (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], help="these variants alone")
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    args = parser.parse_args(arguments)
    chosen = [variant for variant in VARIANTS if not args.only or variant.name in args.only]
    if not args.report:
        if not args.measure and not export.is_exported(engine.latest(args.start) or args.start):
            raise SystemExit(f"error: no first stage in {args.start}: make it with python -m training toon --all")
        judge = Judge.load()
        for variant in chosen:
            if not args.measure and not variant.weights:
                train(variant, args)
        (args.folder / "measured").mkdir(parents=True, exist_ok=True)
        for seed in range(args.seeds):
            for variant in chosen:
                measured(variant, seed, args, judge)
    result = collect(args)
    if not result["measured"]:
        raise SystemExit(f"error: nothing has been measured in {args.folder}")
    if not args.only:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, RESULT.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
