"""Small networks, clips and settings, with which a step of training takes a fraction of a second."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT

from training import config, engine
from training.config import Engine, Loss, Optimizer, Stage
from training.nets import Nets, begin_from_nothing
from training.shards import ShardWriter
from training.toon import sizes

SIZE = 8  # latents: 64 x 64 pixels
NARROW = {"block_out_channels": [16, 16, 32]}
SIZES = replace(sizes.NETS, reference_net=sizes.REFERENCE_NET | NARROW, diffusion_net=sizes.DIFFUSION_NET | NARROW)
TINY = Stage(
    name="tiny",
    steps=6,
    loss=Loss(robust_threshold=math.inf),
    optimizer=Optimizer(learning_rate=1e-3, batch=2),
    engine=Engine(
        mixed_precision="no", gradient_checkpointing=False, ema=0.9, save_every=2, keep=2, sample_every=100, log_every=1
    ),
)


def small_nets(seed: int = 0) -> Nets:
    torch.manual_seed(seed)
    nets = Nets(SIZES)
    begin_from_nothing(nets)
    for parameter in nets.parameters():  # what begins at zero would pass nothing back in the first steps
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return nets


def write_clips(folder: Path, deviation: float = 1.0, **about: object) -> Path:
    """Eight random clips of 64 frames, of latents with this standard deviation; `about`: what their .json says."""
    torch.manual_seed(0)
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(8):
            tensors = {
                "latents": deviation * torch.randn(64, 4, SIZE, SIZE).half(),
                "portrait": torch.randn(4, SIZE, SIZE).half(),
                "speech": torch.randn(64, sizes.SPEECH_LAYERS, sizes.SPEECH_DIM).half(),
                "emotion": torch.full((64,), number, dtype=torch.uint8),
                "focus": torch.rand(SIZE, SIZE).half(),
            }
            writer.add(f"clip{number}", tensors, about)
    return folder


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def learn(data: str, out: str, settings: str) -> None:
    """What each process does that `launch` starts."""
    engine.train(config.from_json(settings), data, out, small_nets(), None)


def launch(stage: Stage, data: Path, out: Path, processes: int, first: str = "", cpu: bool = True) -> None:
    """Trains with several processes, as `accelerate launch` would start them: on the CPU, joined by gloo, or with a
    CUDA device each, joined by NCCL. Each runs the lines in `first` before, where `t` is this module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import sys; root = sys.argv[1]\n"
        "sys.path[:0] = [root, root + '/tests']; import small_training as t\n"
        f"{first}\n"
        "t.learn(*sys.argv[2:])\n"
    )
    running = []
    for rank in range(processes):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **({"ACCELERATE_USE_CPU": "true"} if cpu else {}),
        }
        arguments = [sys.executable, "-c", script, str(ROOT), str(data), str(out), config.to_json(stage)]
        running.append(
            subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in running:
        try:
            said = process.communicate(timeout=240)[0]
        finally:
            process.kill()
        assert process.returncode == 0, said


# Steps in which the loss falls, of clips that are little against the noise: to see that is soon learned.
CALM = 0.2
LEARNING = replace(
    TINY,
    steps=8,
    loss=Loss(robust_threshold=math.inf, logit_mean=0.5, logit_std=0.3),
    optimizer=Optimizer(learning_rate=1e-2, batch=4),
    engine=replace(TINY.engine, ema=0.0, save_every=100),
)


def in_half_precision(again: bool = False) -> Stage:
    """`LEARNING` under bfloat16 autocast; `again`: activations are computed again."""
    return replace(LEARNING, engine=replace(LEARNING.engine, mixed_precision="bf16", gradient_checkpointing=again))


def assert_learns_alike(rows: list[dict[str, float]], others: list[dict[str, float]], rel: float = 0.02) -> None:
    """Step by step the same loss, finite and falling."""
    loss, other = ([row["loss"] for row in log] for log in (rows, others))
    assert len(loss) == len(other) == LEARNING.steps and all(map(math.isfinite, loss))
    assert sum(loss[-3:]) < 0.9 * sum(loss[:3])
    assert all(abs(a - b) < rel * b for a, b in zip(loss, other, strict=True)), [*zip(loss, other, strict=True)]
    assert all(row["skipped"] == 0 for row in rows)


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Runs end there as by Ctrl-C, what was done since the last checkpoint lost."""
    done = engine.Trainer._step

    def stop(trainer: engine.Trainer, *rest: Any) -> float:
        if trainer.step == step:
            raise KeyboardInterrupt
        return done(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.Trainer, "_step", stop)
        yield
