"""Clip: finished frames of a video, kept as latents and decoded when looked at; ImageClip: the same of plain frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AudioError, SamplingError
from ..release import VAE_SCALE, WINDOW
from .kept import KeptFrames


@dataclass(frozen=True, eq=False)
class Sound:
    """A recording.

    Attributes:
        waveform: [channels, T] float in [-1, 1].
        sample_rate: in Hz.
    """

    waveform: Tensor
    sample_rate: int

    def __post_init__(self) -> None:
        if self.waveform.ndim != 2 or 0 in self.waveform.shape:
            raise AudioError(
                f"the recording holds no sound: [channels, samples] is expected, received {list(self.waveform.shape)}"
            )
        if not 0 < self.sample_rate < math.inf:
            raise AudioError(f"a sound's sample rate is a positive number of Hz, received {self.sample_rate!r}")

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.waveform.shape[1] / self.sample_rate

    def span(self, start: float, seconds: float) -> Sound:
        """The part from `start` on, `seconds` long; silence beyond the recording's end."""
        first, last = (round(time * self.sample_rate) for time in (start, start + seconds))
        part = self.waveform[:, first:last]
        missing = max(1, last - first) - part.shape[1]
        return Sound(torch.nn.functional.pad(part, (0, missing)) if missing else part, self.sample_rate)


class _Frames:
    """What both kinds of clips share."""

    start: int
    fps: float
    sound: Sound | None
    about: Mapping[str, Any]

    @property
    def num_frames(self) -> int:
        """How many there are."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """How long they last."""
        return self.num_frames / self.fps

    @property
    def own_sound(self) -> Sound | None:
        """The part of the recording that these frames speak."""
        return None if self.sound is None else self.sound.span(self.start / self.fps, self.seconds)

    def _check(self) -> None:
        if not 0 < self.fps < math.inf:
            raise SamplingError(f"a clip's fps is a positive number, received {self.fps!r}")


@dataclass(frozen=True, eq=False)
class Clip(_Frames):
    """Frames of one sampling call.

    Attributes:
        latents: [4, F, h, w] float32 on the CPU, scaled, as the sampler left them.
        start: number of the first frame in the audio track.
        fps: frames per second.
        decode: latents [4, F, h, w] of one window -> frames [F, 3, H, W] in [0, 1].
        stopped: sampling was interrupted before the last frame asked for.
        sound: the whole recording that the frames are counted in, if known.
        about: what made it, for the video file's metadata: model, seed, steps, guidance.
        window: frames that were denoised, and are decoded, together.
        kept: frames that were decoded while it was sampled, by window; the others are decoded when they are looked at.
    """

    latents: Tensor
    start: int
    fps: float
    decode: Callable[[Tensor], Tensor]
    stopped: bool = False
    sound: Sound | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    window: int = WINDOW
    kept: KeptFrames | None = None

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or len(self.latents) != 4:
            raise SamplingError(f"a clip's latents are [4, F, h, w], received {list(self.latents.shape)}")
        if not torch.isfinite(self.latents).all():
            raise SamplingError("a clip's latents hold NaN or infinite values")
        self._check()

    @property
    def num_frames(self) -> int:
        """How many there are."""
        return self.latents.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return VAE_SCALE * self.latents.shape[2], VAE_SCALE * self.latents.shape[3]

    def frames(self) -> Iterator[np.ndarray]:
        """Window by window; yields uint8 [H, W, 3]."""
        for number, window in enumerate(self._windows()):
            kept = None if self.kept is None else self.kept.get(number)
            yield from to_uint8(self.decode(window)) if kept is None else kept

    def to_tensor(self) -> Tensor:
        """All frames, float32 [F, H, W, 3] in [0, 1]."""
        frames = torch.empty(self.num_frames, *self.size, 3)
        for i, window in enumerate(self._windows()):
            frames[i * self.window : (i + 1) * self.window] = self.decode(window).permute(0, 2, 3, 1)
        return frames

    def _windows(self) -> Iterator[Tensor]:
        return (window for window in self.latents.split(self.window, dim=1) if window.shape[1])


@dataclass(frozen=True, eq=False)
class ImageClip(_Frames):
    """Frames that came back from elsewhere, such as an upscaler, with their place in the recording.

    Attributes:
        images: [F, H, W, 3] float in [0, 1] on the CPU, or [F, H, W, 4], whose transparent parts count as white.
        start, fps, sound, about: as in `Clip`.
    """

    images: Tensor
    start: int
    fps: float
    sound: Sound | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[3] not in (3, 4) or 0 in self.images.shape:
            raise SamplingError(
                f"images are [F, H, W, 3], or [F, H, W, 4] with transparency, at least one; received "
                f"{list(self.images.shape)}"
            )
        check_finite(self.images)
        self._check()

    @property
    def num_frames(self) -> int:
        """How many there are."""
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[1], self.images.shape[2]

    def frames(self) -> Iterator[np.ndarray]:
        """Yields uint8 [H, W, 3]."""
        for chunk in self.images.split(WINDOW):
            yield from to_uint8(over_white(chunk).permute(0, 3, 1, 2))

    def to_tensor(self) -> Tensor:
        """[F, H, W, 3] in [0, 1]."""
        return over_white(self.images)


def check_finite(images: Tensor) -> None:
    """SamplingError that names the first of the frames [F, ...] with NaN or infinite values, which would be saved as
    black or as noise.
    """
    if not images.is_floating_point():
        return
    for first in range(0, len(images), WINDOW):
        chunk = images[first : first + WINDOW]
        # A tenth of the time of isfinite, and no memory: NaN is the extreme of whatever it is in.
        if chunk.numel() and not all(math.isfinite(value) for value in chunk.aminmax()):
            bad = next(number for number, frame in enumerate(chunk, first) if not frame.isfinite().all())
            raise SamplingError(
                f"frame {bad} of {len(images)} (counted from 0) holds NaN or infinite values: look at the node or "
                "model that made it"
            )


def over_white(images: Tensor, transparency: Tensor | None = None) -> Tensor:
    """Pictures [F, H, W, 4] in [0, 1] laid over white: [F, H, W, 3], to the level what Pillow makes of 8-bit pictures,
    which is what the command does.

    Opaque pixels keep their values to the last bit. Without any transparency this is a view.

    Args:
        images: [F, H, W, 3] or [F, H, W, 4].
        transparency: [F, H, W] or [1, H, W], 1 where the pictures are transparent besides what they say themselves.
    """
    if images.shape[3] == 3 and transparency is None:
        return images
    result = None
    for number, image in enumerate(images):  # one by one: the working memory of many would be a multiple of theirs
        opacity = image[..., 3:].float() if image.shape[2] == 4 else torch.ones(1)
        if transparency is not None:
            hidden = transparency[number if len(transparency) > 1 else 0, ..., None]
            # Whoever gives both gives the same twice.
            opacity = torch.minimum(opacity.to(image.device), 1 - hidden.to(image.device, torch.float32))
        opacity = (opacity.clamp(0, 1) * 255).round().int()
        if bool((opacity == 255).all()):
            continue
        colours = image[..., :3]
        levels = (colours.float().clamp(0, 1) * 255).round().int()
        blended = (levels * opacity + 255 * (255 - opacity) + 127) // 255
        if result is None:
            result = images[..., :3].clone()
        result[number] = torch.where(opacity == 255, colours, (blended.float() / 255).to(colours.dtype))
    return images[..., :3] if result is None else result


def to_uint8(frames: Tensor) -> np.ndarray:
    """[F, 3, H, W] in [0, 1] -> uint8 [F, H, W, 3]."""
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
