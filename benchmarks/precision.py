"""Which parts have to work in float32 when the networks run in bfloat16: `python -m benchmarks.precision`, 20 minutes.

Three chained windows of the small random fixture and of the toon checkpoint, in bfloat16 with one part or another in
float32, against the same windows in float32. Printed are the relative error of each window's latents, the mean of
several seeds (toon: of several faces with voices of their own), the worst, and the processor time against plain
bfloat16. What is done outside of these trials is in `memo_core.precision`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memo_core import MemoPipeline
from memo_core.nets.past import LinearSums, Memory
from memo_core.running import precision
from memo_core.sampling.job import Job
from training.toon import evaluate

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "memo_tiny"
FRAMES = 48
Change = Callable[[MemoPipeline, MemoPipeline], None]  # of a pipeline in bfloat16, given the same one in float32


def decoder(pipe: MemoPipeline, full: MemoPipeline) -> None:
    pipe.nets.vae.decoder, pipe.nets.vae.post_quant_conv = full.nets.vae.decoder, full.nets.vae.post_quant_conv


def encoder(pipe: MemoPipeline, full: MemoPipeline) -> None:
    pipe.nets.vae.encoder, pipe.nets.vae.quant_conv = full.nets.vae.encoder, full.nets.vae.quant_conv


def carried(pipe: MemoPipeline, full: MemoPipeline) -> None:
    """Hidden states of the Diffusion Net."""
    pipe.carried = torch.float32


def projections(pipe: MemoPipeline, full: MemoPipeline) -> None:
    """The tokens of face and sound."""
    _computes_in_full(pipe.nets.image_proj, lambda answer: answer.bfloat16())
    _computes_in_full(pipe.nets.audio_proj, lambda answer: answer.bfloat16())


def reference_net(pipe: MemoPipeline, full: MemoPipeline) -> None:
    """It computes in float32; its features are rounded."""
    _computes_in_full(pipe.nets.reference_net, lambda features: [feature.bfloat16() for feature in features])


def sums(pipe: MemoPipeline, full: MemoPipeline) -> None:
    """Keys, values and sums of the past are computed in float32; what is kept is rounded once a window."""
    net = pipe.nets.diffusion_net
    wide = copy.deepcopy(net).float()

    def past(self, features: list[Tensor], *args: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for _, key, value in wide.past([feature.float() for feature in features], *args):
            yield SimpleNamespace(carries=_SumsInFull()), key, value

    net.past = MethodType(past, net)


class _SumsInFull(LinearSums):
    """Computes in the format of keys and values, float32, and keeps bfloat16."""

    def of_window(self, key: Tensor, value: Tensor) -> Memory:
        kv, z = super().of_window(key, value)
        return kv.bfloat16(), z.bfloat16()

    def update(self, memory: Memory, factor: float, key: Tensor, value: Tensor) -> Memory:
        kv, z = super().update((memory[0].float(), memory[1].float()), factor, key, value)
        return kv.bfloat16(), z.bfloat16()


def everything_but_weights(pipe: MemoPipeline, full: MemoPipeline) -> None:
    """What rounding the weights alone does: the four networks compute in float32."""
    for name in ("reference_net", "diffusion_net", "image_proj", "audio_proj"):
        getattr(pipe.nets, name).float()
    pipe.nets.vae = full.nets.vae


def _computes_in_full(net: nn.Module, rounded: Callable) -> None:
    forward = net.float().forward
    net.forward = MethodType(lambda self, *given: rounded(forward(*(part.float() for part in given))), net)


TRIALS: dict[str, tuple[Change, ...]] = {
    "plain bfloat16": (),
    "decoder": (decoder,),
    "encoder": (encoder,),
    "Reference Net": (reference_net,),
    "memory's sums": (sums,),
    "tokens of face and sound": (projections,),
    "hidden states carried": (carried,),
    "decoder, Reference Net": (decoder, reference_net),
    "decoder, hidden states carried": (decoder, carried),
    "whole VAE, hidden states carried": (decoder, encoder, carried),
    "whole VAE, Reference Net, hidden states carried": (decoder, encoder, reference_net, carried),
    "everything but weights": (everything_but_weights,),
}


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


def windows(pipe: MemoPipeline, job: Job) -> tuple[list[Tensor], float]:
    """Latents of each window, and seconds of processor time."""
    started = time.process_time()
    with patch.object(precision, "carried", lambda dtype: getattr(pipe, "carried", dtype)):
        latents = [window.latents for window in pipe.sample_windows(job)]
    return latents, time.process_time() - started


def plain(checkpoint: str | Path, full: MemoPipeline) -> MemoPipeline:
    pipe = MemoPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    pipe.nets.vae = nn.Module.to(copy.deepcopy(full.nets.vae), torch.bfloat16)
    return pipe


def fixture_jobs(pipe: MemoPipeline, seeds: int) -> list[Job]:
    inputs = load_file(FIXTURE / "expected.safetensors")
    reference = pipe.encode_reference(inputs["in.reference_image"][0], inputs["in.face_embedding"])
    audio = pipe.encode_audio(inputs["in.waveform"], 16000)
    emotion = pipe.detect_emotion(inputs["in.waveform"], 16000, audio.num_padded_frames)
    noise = torch.cat([inputs[f"clip{i}.noise"] for i in range(3)])
    given = [{"noise": noise}, *({"seed": seed} for seed in range(1, seeds))]
    return [pipe.job(reference, audio, emotion, num_frames=FRAMES, steps=4, **how) for how in given]


def toon_jobs(pipe: MemoPipeline, seeds: int) -> list[Job]:
    jobs = []
    for number in range(seeds):
        case = evaluate.draw_case(5 * number, seconds=1.7)
        audio = pipe.encode_audio(case.spoken.waveform, evaluate.RATE, fps=30)
        emotion = pipe.detect_emotion(case.spoken.waveform, evaluate.RATE, audio.num_padded_frames)
        reference = pipe.encode_reference(case.portrait.permute(1, 2, 0).numpy())
        jobs.append(pipe.job(reference, audio, emotion, num_frames=FRAMES, steps=10, seed=number))
    return jobs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="clips of each checkpoint (default: %(default)s)")
    parser.add_argument("--only", choices=("fixture", "toon"), help="one checkpoint alone")
    parser.add_argument("--trials", nargs="*", choices=TRIALS, default=list(TRIALS), help="some of them alone")
    args = parser.parse_args(arguments)
    print("| in float32 | window 1 | window 2 | window 3 | worst | time |\n| --- | --- | --- | --- | --- | --- |")
    for name, checkpoint, make in (("fixture", FIXTURE, fixture_jobs), ("toon", "toon", toon_jobs)):
        if args.only not in (None, name):
            continue
        full = MemoPipeline.from_pretrained(checkpoint)
        jobs = make(full, args.seeds)
        wanted = [windows(full, job)[0] for job in jobs]
        for trial in args.trials:
            pipe, base = plain(checkpoint, full), plain(checkpoint, full)
            for change in TRIALS[trial]:
                change(pipe, full)
            errors, mine, theirs = [], 0.0, 0.0
            for job, latents in zip(jobs, wanted):
                made, seconds = windows(pipe, job)
                errors.append([relative(*pair) for pair in zip(made, latents)])
                mine, theirs = mine + seconds, theirs + (windows(base, job)[1] if TRIALS[trial] else seconds)
            means = " | ".join(f"{sum(window) / len(window):.4f}" for window in zip(*errors))
            print(f"| {name}: {trial} | {means} | {max(map(max, errors)):.4f} | {mine / theirs:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
