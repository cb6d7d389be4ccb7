"""Networks: all that a checkpoint holds, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import short_hash
from ..nets.config import NetConfig
from ..nets.diffusion_net import DiffusionNet
from ..nets.projections import AudioProjection, ImageProjection
from ..nets.reference_net import ReferenceNet
from ..running.options import Options
from . import layout

if TYPE_CHECKING:
    from ..encoders.autoencoder import AutoencoderKL
    from ..encoders.emotion2vec import Emotion2Vec
    from ..encoders.emotion_head import EmotionHead
    from ..encoders.speech import SpeechEncoder


@dataclass(kw_only=True)
class SamplingNetworks:
    """The networks of a checkpoint that sample, ready to run on one device."""

    reference_net: ReferenceNet
    diffusion_net: DiffusionNet
    image_proj: ImageProjection
    audio_proj: AudioProjection
    vae: AutoencoderKL
    folder: Path
    device: torch.device  # where they run
    base_digest: str  # identifies the four MEMO networks and the VAE as saved, whatever the dtype they run in
    sample_size: int  # latent height and width of training
    adapters: tuple[tuple[str, str, float], ...] = ()  # name, digest, strength of what `lora.apply` merged
    options: Options | None = None  # what `optimise` did; None: nothing
    own_config: NetConfig | None = None  # the Diffusion Net's before adapters; None: as it is
    followed: tuple[Mapping[str, Any], ...] = ()  # what merged adapters say (`NetConfig.following`)

    @property
    def window(self) -> int:
        """Frames that are denoised together."""
        return self.diffusion_net.config.window

    @property
    def fps(self) -> int:
        """Frames a second that they were trained at."""
        return self.diffusion_net.config.fps

    @property
    def in_fp8(self) -> bool:
        """Whether weights are kept rounded to 8 bits."""
        return self.options is not None and self.options.fp8_weights

    @property
    def digest(self) -> str:
        """Identifies what these networks compute: `base_digest`, or another one with every adapter and strength, and
        where weights are kept in fp8.
        """
        parts = [f"{digest}:{strength!r}" for _, digest, strength in self.adapters] + ["fp8 weights"] * self.in_fp8
        return short_hash("|".join([self.base_digest, *parts])) if parts else self.base_digest

    @property
    def title(self) -> str:
        """Checkpoint, adapters, fp8 and digest, as written into videos."""
        names = [self.folder.name, *(f"{name}:{strength:g}" for name, _, strength in self.adapters)]
        return f"{' + '.join(names + ['fp8 weights'] * self.in_fp8)} ({self.digest})"

    @property
    def embedded(self) -> bool:
        """Whether this is a checkpoint that ships with the program; those know no faces, only toon heads."""
        return self.folder.resolve().parent == layout.assets().resolve()


@dataclass(kw_only=True)
class Networks(SamplingNetworks):
    """Everything a checkpoint holds: also what listens, in float32."""

    speech_encoder: SpeechEncoder
    emotion_encoder: Emotion2Vec
    emotion_head: EmotionHead
