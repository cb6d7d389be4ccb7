"""Settings of training as nested dataclasses: presets fill them, commands override them, checkpoints keep them.

`override(config, ["optimizer.learning_rate=1e-4", "data.past_windows=1,2,3"])` returns a changed copy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from memo_core.checks import shown

from .reading import fits, parse_json


class ConfigError(ValueError):
    """A setting that does not exist, or a value that does not fit it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What one sample is.

    single_frames: frames of a clip that do not follow each other, each by itself, without sound or past (stage 1).
    frames: of a sample of single frames; a window has as many as the networks denoise together.
    past_windows: numbers of past windows; one is drawn per micro-step.
    start_ratio: probability that a window is treated as a video's first, whose past is the portrait; windows that
        begin in a clip's first one always are.
    past_noise: greatest standard deviation of noise on past latents, because generated ones are not clean either.
    by_length: clips are drawn as often as whole windows fit into them, so that every second counts the same; in an
        epoch each of these stretches is drawn from once. Otherwise each clip comes once in an epoch, however long.
    portrait_outside: where samples bring no portrait it is any frame of the clip but those to be made, which would
        teach to copy; otherwise any.
    held_out: share of the videos, or of the people where faces are known, that is not trained on, for validation and
        previews (`training.split`).
    workers: processes that read, per training process.
    """

    single_frames: bool = False
    frames: int = 16
    past_windows: tuple[int, ...] = (1,)
    start_ratio: float = 0.0
    past_noise: float = 0.0
    by_length: bool = False
    portrait_outside: bool = False
    held_out: float = 0.0
    workers: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Probabilities, per sample, that a condition is taken away (MEMO appendix D), for guidance and for robustness.

    all: reference, audio and emotion together, as guidance's unconditional row has it. Without it that row is learned
        from the samples alone that lose all three by chance, 0.05 * 0.05 * 0.3 = 0.075% of them.
    """

    emotion: float = 0.3
    reference: float = 0.05
    audio: float = 0.05
    past: float = 0.05
    all: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Rectified flow (MEMO section 3, equation 1) and its robust filter (section 4.3).

    weighting: how noise levels are drawn and weighted, as in Stable Diffusion 3 (Esser et al. 2024, section 3.1):
        logit_normal, mode, cosmap, sigma_sqrt or uniform.
    pure_noise: share of samples at noise level 1, where sampling begins and which few of these draws come near.
    robust_measure: by what samples are dropped from a step. "loss": the mean squared error of the velocity exceeds
        `robust_threshold`, the paper's form. "clean": that error seen in the clean estimate (times sigma squared) does.
        "quantile": it exceeds `robust_factor` times the `robust_quantile` of the last samples near its noise level
        (`training.robust`). Samples without a portrait stay: what they should look like is anybody's guess,
        so their error says nothing.
    robust_threshold: see there; infinity drops none, whatever the measure.
    robust_factor: the paper's threshold, 0.1, is 3.3 times what its loss converges to, 0.03.
    robust_from: step from which on samples are dropped: in the beginning all are far off.
    focus_weight: weight of mouth, eyes and brows, where samples say which latents these are.
    """

    weighting: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    pure_noise: float = 0.0
    robust_threshold: float = 0.1
    robust_measure: str = "loss"
    robust_factor: float = 3.3
    robust_quantile: float = 0.5
    robust_from: int = 0
    focus_weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """AdamW.

    bits: 8 keeps its moments in 8 bits (bitsandbytes; CUDA).
    schedule: "constant" or "cosine", after a linear warm-up.
    batch: samples per process and micro-step; accumulate: micro-steps per step.
    """

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bits: int = 32
    schedule: str = "constant"
    warmup_steps: int = 0
    batch: int = 1
    accumulate: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Low-rank adapters instead of whole weights.

    rank: 0 for none. targets: names that `training.lora` knows. base: "bf16" keeps the frozen weights in half the room;
    they are computed with in that precision anyway where engine.mixed_precision is bf16.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)
    dropout: float = 0.0
    base: str = "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """How it runs; none of these changes what is learned, except mixed_precision and ema.

    mixed_precision: "no", "fp16" or "bf16".
    attention: "auto", or "math" (plain attention: faster backwards on the CPU for narrow heads).
    ema: decay of the averaged weights that checkpoints hold; 0: none.
    save_every, sample_every, log_every: steps. save_minutes: a checkpoint is also written when the last one is so old
        (at a step that is logged; 0: only by steps). save_every=0: only by minutes, and at the end.
    keep: checkpoints kept.
    export_every: steps; checkpoints of these steps hold the weights in the released layout, too, and keep those when
        they are too old to be gone on from; those written before this was asked for are kept as they are. 0: only the
        last checkpoint of a run does.
    guidance: scale that the pictures are sampled with; 1: without.
    validated: held-out windows, or sets of frames, whose loss is measured whenever pictures are made.
    trackers: others that accelerate knows, such as "wandb", besides TensorBoard.
    """

    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True
    attention: str = "auto"
    ema: float = 0.9999
    save_every: int = 1000
    save_minutes: float = 0.0
    keep: int = 3
    export_every: int = 0
    sample_every: int = 1000
    samples: int = 4
    guidance: float = 1.0
    validated: int = 16
    log_every: int = 10
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of training (MEMO section 4.3).

    train: parts that learn: reference (the Reference Net), spatial (attention within a frame, to portrait and face),
        backbone (what else Stable Diffusion's UNet has), face (its projection), audio (modules and projection), memory.
    objective: of `training.objectives`.
    join_step: the parts in `join` stand still until then, while new modules warm up.
    """

    name: str
    steps: int
    objective: str = "flow"
    train: tuple[str, ...] = ("reference", "spatial", "backbone", "face", "audio", "memory")
    join: tuple[str, ...] = ()
    join_step: int = 0
    seed: int = 0
    data: Data = field(default_factory=Data)
    drop: Drop = field(default_factory=Drop)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    engine: Engine = field(default_factory=Engine)


PARTS = ("reference", "spatial", "backbone", "face", "audio", "memory")
_CHOICES = {
    "objective": ("flow",),
    "train": PARTS,
    "join": PARTS,
    "loss.weighting": ("logit_normal", "mode", "cosmap", "sigma_sqrt", "uniform"),
    "loss.robust_measure": ("loss", "clean", "quantile"),
    "lora.base": ("fp32", "bf16"),
    "optimizer.bits": (32, 8),
    "optimizer.schedule": ("constant", "cosine"),
    "engine.mixed_precision": ("no", "fp16", "bf16"),
    "engine.attention": ("auto", "math"),
}
_BOUNDS = dict.fromkeys(
    ("data.start_ratio", "data.held_out", "loss.pure_noise", "loss.robust_quantile", "engine.ema"), (0, 1)
)
_BOUNDS |= {"engine.guidance": (1, 100), "engine.validated": (0, 10**6)}


def check(config: Stage) -> Stage:
    """Returns the configuration; ConfigError where a value is not one of those allowed."""
    flat = flatten(config)
    for name, allowed in _CHOICES.items():
        values = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        for value in values:
            if value not in allowed:
                raise ConfigError(f"{name}: {value!r} is none of {', '.join(map(repr, allowed))}")
    for name, (low, high) in (_BOUNDS | {name: (0, 1) for name in flat if name.startswith("drop.")}).items():
        if not low <= flat[name] <= high:
            raise ConfigError(f"{name} must be between {low} and {high}, got {flat[name]}")
    whole = ("steps", "data.frames", "optimizer.batch", "optimizer.accumulate")
    for name in (*whole, *(f"engine.{key}" for key in ("keep", "sample_every", "samples", "log_every"))):
        if flat[name] < 1:
            raise ConfigError(f"{name} must be at least 1, got {flat[name]}")
    for name in ("engine.save_every", "engine.save_minutes", "engine.export_every"):
        if not 0 <= flat[name] < math.inf:
            raise ConfigError(f"{name} must be 0 or more, got {flat[name]}")
    if config.lora.rank and config.lora.base == "bf16" and config.engine.mixed_precision != "bf16":
        raise ConfigError(
            f"lora.base=bf16 needs engine.mixed_precision=bf16, got {config.engine.mixed_precision}; "
            "set that, or lora.base=fp32"
        )
    _check_filter(config)
    if not config.data.past_windows or min(config.data.past_windows) < 1:
        raise ConfigError(f"data.past_windows must be numbers from 1 on, got {config.data.past_windows}")
    return config


def _check_filter(config: Stage) -> None:
    judged = config.loss.robust_measure == "quantile" and not math.isinf(config.loss.robust_threshold)
    if judged and config.data.single_frames and config.data.frames > 1:
        raise ConfigError(
            f"loss.robust_measure=quantile judges a sample at its noise level, and data.frames={config.data.frames} "
            "single frames have one each: set data.frames=1, loss.robust_measure=clean, or loss.robust_threshold=inf"
        )
    if not config.loss.robust_factor > 0:
        raise ConfigError(f"loss.robust_factor must be above 0, got {config.loss.robust_factor}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by dotted name."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def override(config: Stage, changes: list[str]) -> Stage:
    """A copy with `name=value` changes; names are dotted, lists comma-separated.

    Raises:
        ConfigError: there is no such name, or the value is not of its kind.
    """
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"{change!r} is not of the form name=value")
        config = _replaced(config, name.split("."), text, name)
    return check(config)


def _replaced(config: Any, path: list[str], text: str, name: str) -> Any:
    hints = typing.get_type_hints(type(config))
    if path[0] not in hints:
        raise ConfigError(f"there is no setting {name!r}; here there are {', '.join(hints)}")
    if len(path) > 1:
        inner = getattr(config, path[0])
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(f"there is no setting {name!r}: {path[0]} has nothing inside")
        return dataclasses.replace(config, **{path[0]: _replaced(inner, path[1:], text, name)})
    if dataclasses.is_dataclass(hints[path[0]]):
        raise ConfigError(f"{name} is a group of settings: {', '.join(flatten(getattr(config, path[0])))}")
    return dataclasses.replace(config, **{path[0]: _parsed(hints[path[0]], text, name)})


def _parsed(kind: Any, text: str, name: str) -> Any:
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(typing.get_args(kind)[0](item) for item in text.split(",") if item)
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{name}: {text!r} is not {getattr(kind, '__name__', kind)}") from error


def to_json(config: Stage) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Stage:
    """What `to_json` wrote; ConfigError for anything else."""
    try:
        return _built(Stage, parse_json(text))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"these are not the settings of a run: {error}") from error


def _built(kind: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    given = {name: value for name, value in values.items() if name in hints}
    for name, value in given.items():
        inner = dataclasses.is_dataclass(hints[name])
        if not fits(value, dict if inner else hints[name]):
            raise ConfigError(f"{name} = {shown(value)} is not of its kind, {hints[name]}")
        given[name] = _built(hints[name], value) if inner else tuple(value) if isinstance(value, list) else value
    return kind(**given)
