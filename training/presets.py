"""Stages of training, ready to run: those of the paper (MEMO section 4.3, appendix D), and small ones for the toons.

What the paper's text does not give is ours, and chosen so that training sees what sampling meets:

- Noise levels. Sampling begins at level 1 and spends one of its 20 steps there; of logit-normal(0, 1) draws 0.16% lie
  above 0.95. So a twentieth of the samples is pure noise, and the others are shifted by ln 2, as Stable Diffusion 3
  (Esser et al. 2024) shifts its schedule for pictures of twice the side: it began at 256.
- The past. A video begins with the portrait as its past, which clips of 15 s show in 3.7% of their windows: with
  `start_ratio` a tenth more are begun so. A past that was generated is not clean: `past_noise`. Both as in the toon
  stages; at full size neither was measured.
- Clips count by the second, and one in a hundred videos is held out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from .config import Data, Drop, Engine, Lora, Loss, Optimizer, Stage, flatten, override

# The paper's rates, and its "5%" once more for all conditions together: that is guidance's unconditional row, which
# every step of sampling reads. In stage 1 the reference is all there is to drop.
_MEMO_DROP = Drop(all=0.05)

_DATA = Data(workers=4, by_length=True, portrait_outside=True, held_out=0.01)
_WINDOWS = replace(_DATA, start_ratio=0.1, past_noise=0.2)
_LOSS = Loss(logit_mean=0.7, pure_noise=0.05)
# By the clock: the state of stage 2 is 41 GB. Pictures as sampling makes them.
_ENGINE = Engine(save_every=0, save_minutes=45.0, keep=2, sample_every=5000, guidance=3.5)


def memo_stage1() -> Stage:
    """Face domain adaptation: Reference Net, spatial attention and the face projection learn from single frames."""
    return Stage(
        name="stage1",
        steps=15_000,
        train=("reference", "spatial", "face"),
        data=replace(_DATA, single_frames=True, frames=1),
        drop=Drop(emotion=0.0, audio=0.0, past=0.0),
        loss=replace(_LOSS, robust_threshold=math.inf),
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
        data=_WINDOWS,
        drop=_MEMO_DROP,
        loss=replace(_LOSS, robust_measure="quantile", robust_from=15_000),
        engine=_ENGINE,
    )


def memo_stage3() -> Stage:
    """Dynamic past frames: 16, 32 or 48 of them, and only audio and memory modules learn."""
    return Stage(
        name="stage3",
        steps=100_000,
        train=("audio", "memory"),
        data=replace(_WINDOWS, past_windows=(1, 2, 3)),
        drop=_MEMO_DROP,
        loss=replace(_LOSS, robust_measure="quantile"),
        engine=_ENGINE,
    )


def memo_lora() -> Stage:
    """Fine-tuning on one card of 24 GB: adapters of rank 16, 8-bit Adam; start from a whole checkpoint.

    Nothing is held out: a few clips of one person would all be on one side.
    """
    return Stage(
        name="lora",
        steps=2000,
        data=replace(_WINDOWS, past_windows=(1, 2, 3), workers=2, held_out=0.0),
        drop=_MEMO_DROP,
        loss=replace(_LOSS, robust_threshold=math.inf),  # a few clips are looked through by hand
        optimizer=Optimizer(learning_rate=1e-4, bits=8, warmup_steps=100),
        lora=Lora(rank=16, alpha=16.0, targets=("attention", "audio", "memory"), base="bf16"),
        engine=Engine(ema=0.0, save_every=250, sample_every=250, guidance=_ENGINE.guidance),
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


# What presets of earlier versions set otherwise. A run that was begun so goes on so.
EARLIER = {"data.start_ratio": 0.0, "data.past_noise": 0.0, "data.by_length": False, "data.held_out": 0.0}
EARLIER |= {"data.portrait_outside": False}
EARLIER |= {"loss.logit_mean": 0.0, "loss.pure_noise": 0.0}
EARLIER |= {"loss.robust_measure": "loss", "drop.all": 0.0}


def settings(name: str, changes: list[str], out: Path | None = None) -> Stage:
    """A preset's settings with changes `name=value`, for the run in `out`, be it new or begun by an earlier version.

    Raises:
        ConfigError: a change is not possible; what is in `out` is no run.
    """
    from . import engine

    config = PRESETS[name]()
    found = None if out is None else engine.latest(out)
    if found is not None:
        before, now = flatten(engine.begun(found)[0]), flatten(config)
        earlier = [f"{k}={v}" for k, v in EARLIER.items() if before[k] == v != now[k]]
        changes = [*earlier, *changes]
    return override(config, changes)


PRESETS = {
    preset.__name__: preset
    for preset in (memo_stage1, memo_stage2, memo_stage3, memo_lora, toon_stage1, toon_stage2, toon_stage3)
}
