"""What a stage costs, counted instead of guessed: operations and memory of a step, storage, GPU hours.

The step itself runs, at full size and in full, on tensors without data (`FakeTensorMode`): every operation of its
forward and backward pass is seen, with the sizes of what it makes and how long that is held. So the count follows the
code, gradient checkpointing, adapters and all. Operations are those of matrix products, convolutions and attention, a
multiplication and an addition counted as two (torch's formulas); what is recomputed counts again.

It runs as on a CUDA device: mixed precision keeps norms, softmax and sums in float32, and attention is fused. What
only the device knows (its context, work space of its libraries, fragmentation) is `RESERVE`, an assumption.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memo_core.budget.report import RELEASED_VAE
from memo_core.inputs.speech import NEIGHBOURS
from memo_core.release import FPS, WINDOW

from .batches import Batch
from .config import Stage, override
from .counting import Live, Step, measure
from .disk import CheckpointSize, checkpoint_size
from .learning import moments, prepare_to_learn
from .nets import RELEASED, Nets, Sizes
from .objectives.flow import FlowModel

GIB = 2**30
# Dense bf16 products with float32 sums, operations per second, as the manufacturer states; and memory in bytes.
DEVICES = {
    "H100 SXM": (989e12, 80 * GIB),
    "H200": (989e12, 141 * 10**9),
    "A100 80 GB": (312e12, 80 * GIB),
    "RTX 4090": (165e12, 24 * GIB),
}
UTILISATION = 0.3  # assumed share of that speed; measure a step and say so with --utilisation
RESERVE = 3 * GIB // 2  # assumed: context 0.5 GiB, work space of cuDNN and cuBLAS and fragmentation 1 GiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a stage needs. Bytes are those of one device that holds everything."""

    stage: Stage
    step: Step
    learning: int  # parameters that learn
    moments: int  # bytes of the optimiser
    small_moments: int  # of the optimiser with optimizer.bits=8
    checkpoint: CheckpointSize
    average: int  # bytes of the averaged weights
    window: int = WINDOW  # frames that are denoised together

    @property
    def total(self) -> int:
        """Bytes of device memory, at the greater of two moments: in the backward pass, or in the optimiser's step,
        which holds all gradients (and needs nothing besides: it is fused).
        """
        return self._total(self.stage.optimizer.accumulate > 1)

    @property
    def total_of_many(self) -> int:
        """`total`, of each of many processes (DDP), where all gradients lie in the buckets that are exchanged."""
        return self._total(True)

    def _total(self, all_gradients: bool) -> int:
        gradients = self.step.gradients if all_gradients else self.step.peak_gradients
        backward = self.step.peak - self.step.peak_gradients + gradients
        held = self.step.weights + self.moments + self.average + RESERVE
        return held + max(backward, self.step.gradients)

    @property
    def operations(self) -> int:
        """Of one step of the optimiser on one process."""
        return self.step.operations * self.stage.optimizer.accumulate

    def hours(self, speed: float, utilisation: float = UTILISATION) -> float:
        """GPU hours of the whole stage at `speed` operations per second."""
        return self.operations * self.stage.steps / (speed * utilisation) / 3600


def count(config: Stage, sizes: Sizes = RELEASED, size: int = 512) -> Cost:
    """Counts a stage's step with the real networks and the real loss; takes a minute at full size and no memory.

    Where the number of past windows is drawn, the step counted has the most of them.

    Args:
        config: of the stage.
        sizes: of the networks.
        size: height and width of the video in pixels.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mixed = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.engine.mixed_precision]
    with torch.device("meta"):
        nets = Nets(sizes)
        prepare_to_learn(nets, config)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # those of `nets`, just below
        if config.engine.attention == "math":
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        nets.to_empty(device="cpu")
        model, batch = FlowModel(nets, config.loss), example(config, sizes, size)
        step = measure(model, lambda: model(batch)[0].mean(), mixed)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size_on_disk = checkpoint_size(nets, learning, config)
    averaged = config.engine.ema and not config.lora.rank
    return Cost(
        stage=config,
        step=step,
        learning=sum(parameter.numel() for parameter in learning),
        moments=sum(moments(parameter.numel(), config.optimizer.bits) for parameter in learning),
        small_moments=sum(moments(parameter.numel(), 8) for parameter in learning),
        checkpoint=size_on_disk,
        average=sum(p.numel() * p.element_size() for p in learning) if averaged else 0,
        window=_window(sizes),
    )


def example(config: Stage, sizes: Sizes, size: int = 512) -> Batch:
    """A batch of the stage's shapes, of zeros; past windows as many as the stage may draw."""
    count, side, window = config.optimizer.batch, size // 8, _window(sizes)
    frames = config.data.frames if config.data.single_frames else window
    channels = sizes.diffusion_net["in_channels"]
    windows = None if config.data.single_frames else max(config.data.past_windows)
    clip = torch.zeros(count, channels, frames, side, side)
    batch = Batch(
        keys=("",) * count,
        latents=clip,
        portrait=torch.zeros(count, channels, side, side),
        face_embedding=torch.zeros(count, sizes.face_embedding),
        focus=torch.zeros(count, side, side),
        noise=torch.zeros_like(clip),
        sigma=torch.full((count, frames), 0.5),
        no_reference=torch.zeros(count, dtype=torch.bool),
    )
    if windows is None:
        return batch
    return replace(
        batch,
        past=torch.zeros(count, windows * window, channels, side, side),
        past_windows=torch.full((count,), windows),
        audio=torch.zeros(count, frames, 2 * NEIGHBOURS + 1, sizes.speech_layers, sizes.speech_dim),
        no_audio=torch.zeros(count, dtype=torch.bool),
        emotion=torch.zeros(count, dtype=torch.long),
    )


def _window(sizes: Sizes) -> int:
    """Frames that networks of these sizes denoise together."""
    return sizes.diffusion_net.get("window_frames", WINDOW)


def storage(hours: float, size: int = 512, sizes: Sizes = RELEASED, clip_seconds: float = 15.0) -> int:
    """Bytes of shards for so many hours of video at the networks' rate; the format is that of `shards`."""
    side = size // 8
    frame = 2 * sizes.diffusion_net["in_channels"] * side**2 + 2 * sizes.speech_layers * sizes.speech_dim + 1
    clip = 2 * sizes.diffusion_net["in_channels"] * side**2 + 2 * side**2 + 4 * sizes.face_embedding
    clip += 2 * 512 + 1024  # tar headers; safetensors header, record and padding
    fps = sizes.diffusion_net.get("fps", FPS)
    return round(hours * 3600 * (fps * frame + clip / clip_seconds))


def encoding(size: int = 512, config: dict[str, Any] | None = None) -> int:
    """Operations of the VAE's encoder for one picture of `size` pixels a side; `config` is diffusers' AutoencoderKL's.

    The step is that of `prepare`, which runs it once for every picture of every clip.
    """
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode

    live = Live()
    # Plain attention, whose products are counted one by one.
    with FakeTensorMode(), sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        vae = AutoencoderKL.from_config(config or RELEASED_VAE)
        picture = torch.zeros(1, vae.config.in_channels, size, size)
        with live:
            vae.encode(picture)
    return live.flops


def preparation(hours: float, size: int = 512, config: dict[str, Any] | None = None, share: float = UTILISATION) -> str:
    """What encoding so many hours of video takes, as text."""
    pictures, operations = hours * 3600 * FPS, encoding(size, config)
    times = [f"{name} {pictures * operations / (speed * share) / 3600:,.0f}" for name, (speed, _) in DEVICES.items()]
    return (
        f"Encoding {hours:g} h of video, {pictures / 1e6:,.1f} M pictures of {operations / 1e12:.3g} TFLOP by the VAE, "
        f"in GPU hours: {', '.join(times)}"
    )


def table(costs: list[Cost], utilisation: float = UTILISATION) -> str:
    """The costs side by side, as text."""
    rows: list[tuple[str, Callable[[Cost], str]]] = [
        ("gradient checkpointing", lambda c: "yes" if c.stage.engine.gradient_checkpointing else "no"),
        ("batch x accumulation", lambda c: f"{c.stage.optimizer.batch} x {c.stage.optimizer.accumulate}"),
        ("past frames, up to", lambda c: "-" if c.stage.data.single_frames else _past(c)),
        ("parameters that learn, M", lambda c: f"{c.learning / 1e6:.1f}"),
        ("forward, TFLOP", lambda c: f"{c.step.forward / 1e12:.2f}"),
        ("backward, TFLOP", lambda c: f"{c.step.backward / 1e12:.2f}"),
        ("step, TFLOP", lambda c: f"{c.operations / 1e12:.2f}"),
        ("weights, GiB", lambda c: _gib(c.step.weights)),
        ("gradients, GiB", lambda c: _gib(c.step.gradients)),
        ("optimiser, GiB", lambda c: _gib(c.moments)),
        ("averaged weights, GiB", lambda c: _gib(c.average)),
        ("saved by forward, GiB", lambda c: _gib(c.step.saved)),
        ("activations at peak, GiB", lambda c: _gib(c.step.peak - c.step.peak_gradients)),
        ("reserve, GiB", lambda c: _gib(RESERVE)),
        ("all in all, GiB", lambda c: _gib(c.total)),
        ("with 8-bit Adam, GiB", lambda c: _gib(c.total - c.moments + c.small_moments)),
        ("each of many processes, GiB", lambda c: _gib(c.total_of_many)),
        ("fits", lambda c: ", ".join(name for name, (_, memory) in DEVICES.items() if c.total <= memory) or "none"),
        ("checkpoint, GB", lambda c: f"{c.checkpoint.state / 1e9:.1f}"),
        ("exported, GB", lambda c: f"{c.checkpoint.export / 1e9:.1f}"),
        ("steps", lambda c: f"{c.stage.steps:,}"),
    ]
    for name, (speed, _) in DEVICES.items():
        rows.append((f"s per step, {name}", lambda c, s=speed: f"{c.operations / (s * utilisation):.2f}"))
        rows.append((f"GPU hours, {name}", lambda c, s=speed: f"{c.hours(s, utilisation):,.0f}"))
    cells = [["", *(cost.stage.name for cost in costs)]]
    cells += [[name, *(show(cost) for cost in costs)] for name, show in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    lines.append(f"Times assume {utilisation:.0%} of the device's dense bf16 speed, which is not a measurement.")
    lines.append("Hours are those of one process; N of them spend N times as many, on N times the samples.")
    return "\n".join(lines)


def _past(cost: Cost) -> str:
    return str(max(cost.stage.data.past_windows) * cost.window)


def _gib(number: int) -> str:
    return f"{number / GIB:.2f}"


def add_command(commands: argparse._SubParsersAction) -> None:
    """`budget`."""
    from .presets import PRESETS

    command = commands.add_parser(
        "budget",
        help="what a stage needs: operations, memory, GPU hours, storage",
        description="Count operations and memory of a step by running it on tensors without data; needs no GPU.",
    )
    full = [name for name in PRESETS if name.startswith("memo_")]
    command.add_argument("presets", nargs="*", metavar="PRESET", default=full, help=f"of {', '.join(PRESETS)}")
    command.add_argument("--size", type=int, help="height and width in pixels (512, or 128 for toons)")
    command.add_argument("--batch", type=int, help="samples per process and micro-step (the preset's)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change a setting")
    command.add_argument("--both", action="store_true", help="with and without gradient checkpointing")
    command.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="share of the device's speed (%(default)s)"
    )
    command.add_argument("--hours", type=float, default=100.0, help="of video, for storage and encoding (%(default)s)")
    command.set_defaults(run=run_budget)


def run_budget(args: argparse.Namespace) -> None:
    from .presets import PRESETS
    from .toon.sizes import NETS as TOON
    from .toon.sizes import VAE as TOON_VAE

    costs = []
    for name in args.presets:
        if name not in PRESETS:
            raise SystemExit(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        changes = args.set + ([f"optimizer.batch={args.batch}"] if args.batch else [])
        config = override(PRESETS[name](), changes)
        sizes = TOON if name.startswith("toon_") else RELEASED
        size = args.size or 8 * sizes.diffusion_net["sample_size"]
        for checkpointing in (True, False) if args.both else (config.engine.gradient_checkpointing,):
            engine = replace(config.engine, gradient_checkpointing=checkpointing)
            costs.append(count(replace(config, engine=engine), sizes, size))
    print(table(costs, args.utilisation))
    print(f"Shards of {args.hours:g} h of video: {storage(args.hours, size, sizes) / 1e9:.0f} GB")
    print(preparation(args.hours, size, TOON_VAE if sizes is TOON else None, args.utilisation))
