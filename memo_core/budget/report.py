"""`memo info --budget`: what each speed preset takes, as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.networks import SamplingNetworks
from ..errors import SamplingError
from ..running import precision
from ..sampling.settings import PRESETS, Settings
from .counting import GIB, needs
from .plan import choose_plan, least_plan, plan_of

DRIVER = GIB // 2  # what the driver and torch's context take of a card

# Stable Diffusion 1.5's, as diffusers names it; the rest is as the class has it.
RELEASED_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def released(dtype: torch.dtype = torch.bfloat16) -> SamplingNetworks:
    """The networks that sample, at the released size and without data: nothing needs to have been downloaded."""
    from ..encoders.autoencoder import AutoencoderKL
    from ..inputs.speech import NEIGHBOURS
    from ..nets.config import NetConfig
    from ..nets.diffusion_net import DiffusionNet
    from ..nets.projections import AudioProjection, ImageProjection
    from ..nets.reference_net import ReferenceNet

    with torch.device("meta"):
        vae = AutoencoderKL(**RELEASED_VAE)
        modules: dict[str, Any] = {
            "reference_net": ReferenceNet(NetConfig()),
            "diffusion_net": DiffusionNet(NetConfig()),
            "image_proj": ImageProjection(),
            "audio_proj": AudioProjection((2 * NEIGHBOURS + 1) * 12 * 768),
            "vae": vae,
        }
    return SamplingNetworks(
        **{name: precision.set_weights(name, module, dtype).requires_grad_(False) for name, module in modules.items()},
        folder=Path("released"),
        device=torch.device("meta"),
        base_digest="",
        sample_size=64,
    )


def table(nets: SamplingNetworks, height: int, width: int, budgets: Sequence[tuple[str, int]]) -> str:
    """What each speed preset takes, and the plan for each budget, as text.

    Args:
        budgets: names, and bytes that sampling may take.
    """
    ways = {
        f"{name}{how}": Settings(speed=PRESETS[name], guidance_scale=scale)
        for name in PRESETS
        for how, scale in (("", 3.5), (", guidance 1", 1.0))
    }
    dtype = str(nets.diffusion_net.conv_in.weight.dtype).removeprefix("torch.")
    lines = [
        f"{width}x{height} pixels in {dtype}; GB are 2^30 bytes, at the moment when most is on the device.",
        "",
        f"{'all on the device':<22}{'weights':>9}{'sums':>7}{'features':>10}{'working':>9}{'peak':>7}",
    ]
    for name, settings in ways.items():
        whole = plan_of(needs(nets, height, width, settings))
        columns = zip((whole.weights, whole.sums, whole.features, whole.working, whole.peak), (9, 7, 10, 9, 7))
        lines.append(name.ljust(22) + "".join(f"{part / GIB:>{wide}.1f}" for part, wide in columns))
    for title, room in budgets:
        lines += ["", f"{title + f' ({room / GIB:.1f} GB)':<31}{'sums':>7}{'host RAM':>10}{'':9}{'peak':>7}"]
        for name, settings in ways.items():
            try:
                chosen = choose_plan(nets, height, width, settings, room)
            except SamplingError:
                fewest = least_plan(nets, height, width, settings).peak
                lines.append(f"{name:<22}{'':26}{fewest / GIB:>16.1f}   does not fit: at least so much is needed")
                continue
            parts = f"{chosen.sums / GIB:>16.1f}{chosen.on_host / GIB:>10.1f}{chosen.peak / GIB:>16.1f}"
            lines.append(f"{name:<22}{parts}   {chosen.describe()}")
    lines += ["", f"Of a card {DRIVER / GIB:.1f} GB are the driver's."]
    return "\n".join(lines)
