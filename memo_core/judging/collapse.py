"""Whether a video has broken down, noticed while it is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ComposeError
from .quality import Comparison, check_portrait, fit_portrait

# When a window of frames counts as broken; see CollapseDetector.
FLAT, FAR, NOISE, BLUR = 0.10, 35.0, 8.0, 0.03


class CollapseDetector:
    """Tells, window by window, when a clip has collapsed and sampling on is a waste of time.

    A window is broken when its frames have under 10 % of the portrait's contrast, colours more than 35 Delta E away,
    8 times the portrait's sharpness (noise) or under 3 % of it, or hold NaN. Two such in a row are a collapse.

    Args:
        portrait: [3, H, W] in [-1, 1], as in `Reference.pixels`.

    Raises:
        PortraitError: another portrait.
    """

    def __init__(self, portrait: Tensor) -> None:
        self._portrait = check_portrait(portrait)
        self._target: Comparison | None = None
        self._broken = 0

    @torch.no_grad()
    def update(self, frames: Tensor) -> str | None:
        """Takes the next window, [F, 3, H, W] in [0, 1]; says in words what is wrong once the clip has collapsed."""
        reason = self._reason(frames)
        self._broken = self._broken + 1 if reason else 0
        return f"the clip has collapsed: {reason}" if self._broken >= 2 else None

    def _reason(self, frames: Tensor) -> str | None:
        if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ComposeError(f"a window of frames is [F, 3, H, W] in [0, 1]; received {list(frames.shape)}")
        frames = frames.detach().float()
        if not bool(torch.isfinite(frames).all()):
            return "the frames hold NaN or infinite values"
        frames = frames.clamp(0, 1)
        if self._target is None:
            self._target = Comparison(fit_portrait(self._portrait, *frames.shape[2:])).to(frames.device)
        contrast = float(self._target.contrast(frames).mean())
        if contrast < FLAT:
            return f"the picture has gone flat, with {contrast:.1%} of the portrait's contrast"
        sharpness = float(self._target.sharpness(frames).mean())
        if sharpness > NOISE:
            return f"the picture has turned to noise, {sharpness:.1f} times as sharp as the portrait"
        if sharpness < BLUR:
            return f"the picture is blurred away, with {sharpness:.1%} of the portrait's sharpness"
        distance = float(self._target.colour_distance(frames).mean())
        if distance > FAR:
            return f"the colours are far off, {distance:.0f} Delta E from the portrait's"
        return None
