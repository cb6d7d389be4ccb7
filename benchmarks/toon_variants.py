"""Networks that differ from MEMO's in one thing, for the toon bench: configurations of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from training.nets import Nets


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the bench; it differs in one thing from the row `against`.

    layers: settings of the Diffusion Net's config.json that name other kinds of layers. past_windows: of the last stage
    of training. emotion: "detected" per window, "static" (the label most heard, for the whole video) or "none".
    weights: the variant whose weights it samples with, where it needs none of its own.
    """

    name: str
    what: str
    against: str = ""
    layers: Mapping[str, Any] = field(default_factory=dict)
    past_windows: tuple[int, ...] = (1,)
    emotion: str = "detected"
    weights: str = ""

    def nets(self, start: Path, seed: int = 0) -> Nets:
        """The networks of a checkpoint, with this variant's layers. Layers of a kind that the checkpoint does not have
        begin anew, as the seed says.
        """
        nets = Nets.from_pretrained(start)
        settings = {**nets.sizes.diffusion_net, **self.layers}
        if settings == nets.sizes.diffusion_net:
            return nets
        torch.manual_seed(seed)
        changed, weights = Nets(replace(nets.sizes, diffusion_net=settings)), nets.state_dict()
        own = changed.state_dict()
        there = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
        changed.load_state_dict(there, strict=False)
        return changed


def _temporal(kind: str, frames: int) -> dict[str, Any]:
    return {"temporal_modules": {"kind": kind, "frames": frames}}


VARIANTS = (
    Variant(name="memo", what="MEMO: memory of all past, dynamic past frames", past_windows=(1, 2, 3)),
    Variant(name="fixed-past", what="memory of all past, always 16 past frames in training", against="memo"),
    Variant(name="last-2", what="last 2 frames", layers=_temporal("last_frames", 2), against="fixed-past"),
    Variant(name="last-4", what="last 4 frames", layers=_temporal("last_frames", 4), against="fixed-past"),
    Variant(
        name="self-16",
        what="16 past frames, self-attention",
        layers=_temporal("past_attention", 16),
        against="fixed-past",
    ),
    Variant(
        name="cross",
        what="audio by cross-attention",
        layers={"audio_modules": "cross"},
        past_windows=(1, 2, 3),
        against="memo",
    ),
    Variant(name="static", what="one emotion for the whole video", emotion="static", weights="memo", against="memo"),
    Variant(name="none", what="no emotion", emotion="none", weights="memo", against="memo"),
)
