"""Stages of training, ready to run: those of the paper (MEMO section 4.3, appendix D), and small ones for the toons."""

from __future__ import annotations

import math
from dataclasses import replace

from .config import Data, Drop, Engine, Lora, Loss, Optimizer, Stage

# By the clock: the state of stage 2 is 41 GB.
_ENGINE = Engine(save_every=0, save_minutes=45.0, keep=2, sample_every=5000)


def memo_stage1() -> Stage:
    """Face domain adaptation: Reference Net, spatial attention and the face projection learn from single frames."""
    return Stage(
        name="stage1",
        steps=15_000,
        train=("reference", "spatial", "face"),
        data=Data(single_frames=True, frames=1, workers=4),
        drop=Drop(emotion=0.0, audio=0.0, past=0.0),
        loss=Loss(robust_threshold=math.inf),
        optimizer=Optimizer(batch=8),
        engine=_ENGINE,
    )


def memo_stage2() -> Stage:
    """Robust scale-up: audio and memory modules warm up, then all parts learn; 16 past frames; bad samples dropped."""
    return Stage(
        name="stage2",
        steps=500_000,
        join=("reference", "spatial", "backbone", "face"),
        join_step=15_000,
        data=Data(workers=4),
        loss=Loss(robust_from=15_000),
        engine=_ENGINE,
    )


def memo_stage3() -> Stage:
    """Dynamic past frames: 16, 32 or 48 of them, and only audio and memory modules learn."""
    return Stage(
        name="stage3",
        steps=100_000,
        train=("audio", "memory"),
        data=Data(past_windows=(1, 2, 3), workers=4),
        engine=_ENGINE,
    )


def memo_lora() -> Stage:
    """Fine-tuning on one card of 24 GB: adapters of rank 16, 8-bit Adam; start from a whole checkpoint."""
    return Stage(
        name="lora",
        steps=2000,
        data=Data(past_windows=(1, 2, 3), workers=2),
        loss=Loss(robust_threshold=math.inf),  # a few clips are looked through by hand
        optimizer=Optimizer(learning_rate=1e-4, bits=8, warmup_steps=100),
        lora=Lora(rank=16, alpha=16.0, targets=("attention", "audio", "memory"), base="bf16"),
        engine=Engine(ema=0.0, save_every=250, sample_every=250),
    )


_TOON_ENGINE = Engine(
    gradient_checkpointing=False, attention="math", ema=0.998, save_every=200, keep=2, sample_every=300, samples=6
)
_TOON_DROP = Drop(all=0.08)


def toon_stage1() -> Stage:
    """As the paper's, on drawn faces; a few poses of each face."""
    return Stage(
        name="stage1",
        steps=1800,
        train=("reference", "spatial", "backbone", "face"),
        data=Data(single_frames=True, frames=4),
        drop=_TOON_DROP,
        loss=Loss(logit_mean=0.3, robust_threshold=math.inf),
        optimizer=Optimizer(learning_rate=1e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=100, batch=12),
        engine=_TOON_ENGINE,
    )


def toon_stage2() -> Stage:
    """As the paper's; noisier levels, because windows show through more noise than single frames do."""
    return Stage(
        name="stage2",
        steps=2400,
        join=("reference", "spatial", "backbone", "face"),
        join_step=150,
        data=Data(start_ratio=0.1, past_noise=0.2),
        drop=_TOON_DROP,
        # The mouth is a twentieth of the picture and the point of it.
        loss=Loss(logit_mean=0.7, robust_threshold=0.3, robust_measure="clean", robust_from=1600, focus_weight=4.0),
        optimizer=Optimizer(learning_rate=8e-4, betas=(0.9, 0.99), schedule="cosine", warmup_steps=100, batch=4),
        engine=_TOON_ENGINE,
    )


def toon_stage3() -> Stage:
    stage = toon_stage2()
    return replace(
        stage,
        name="stage3",
        steps=300,
        train=("audio", "memory"),
        join=(),
        join_step=0,
        data=replace(stage.data, past_windows=(1, 2, 3)),
        loss=replace(stage.loss, robust_from=0),
        optimizer=replace(stage.optimizer, learning_rate=2e-4, warmup_steps=30),
    )


PRESETS = {
    preset.__name__: preset
    for preset in (memo_stage1, memo_stage2, memo_stage3, memo_lora, toon_stage1, toon_stage2, toon_stage3)
}
