"""A memory state as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

from ...errors import MemoryStateError
from ...release import DECAY
from .canvas import BLUES, INK, LEFT, MUTED, RIGHT, SHADE, Panel, canvas, font

if TYPE_CHECKING:
    from ...memory.state import MemoryEntry, MemoryState


def draw_memory(state: MemoryState, fps: float = 30, width: int = 1000) -> Image.Image:
    """A picture of a memory: how much each past frame weighs, over the seconds before now, window by window.

    Args:
        fps: frames a second of the video that made it.
        width: of the picture in pixels, at least 600; its height is 340.

    Returns:
        an RGB image. Raises MemoryStateError for a width below 600 or an fps that is not a positive number.
    """
    if not 0 < fps < math.inf:
        raise MemoryStateError(f"fps is {fps!r}; it must be a positive number")
    image, draw = canvas(width, 340, MemoryStateError)
    horizon = "all of the past" if state.horizon is None else f"last {_count(state.horizon, 'window')}"
    draw.text((LEFT, 24), f"{_count(state.windows, 'window')} seen", fill=INK, font=font(20), anchor="lm")
    about = f"horizon: {horizon}    size: {state.nbytes / 2**20:.2f} MiB"
    draw.text((width - RIGHT, 24), about, fill=MUTED, font=font(14), anchor="rm")
    box = (LEFT, 88, width - RIGHT, 290)
    if state.is_empty:
        draw.rectangle(box, fill=SHADE)
        middle = ((LEFT + width - RIGHT) // 2, 189)
        draw.text(middle, "empty: a new video starts from the portrait", fill=MUTED, font=font(17), anchor="mm")
        return image

    ages, ordered = _ages(state.entries)
    weights = [[entry.weight * DECAY**age for age in range(len(entry.latents))] for entry in state.entries]
    total = sum(map(sum, weights))
    past = max(age + len(frames) for age, frames in zip(ages, weights))
    lowest = 10.0 ** min(-1, math.floor(math.log10(min(map(min, weights)))))
    panel = Panel(draw, box, (past / fps, 0), (lowest, max(1.0, *map(max, weights))), log=True)
    decades = round(-math.log10(lowest))
    step = -(-decades // 6)
    panel.value_axis((10.0**-i, f"{10.0**-i:g}" if i < 5 else f"1e-{i}") for i in range(0, decades + 1, step))
    what = "weight of each past frame (logarithmic); above each window, its share of the whole"
    panel.caption(
        what if ordered else "a blend, window by window: weights (logarithmic), shares of the whole", above=24
    )
    for index, (age, frames) in enumerate(zip(ages, weights)):
        for i, weight in enumerate(frames):
            x0, x1 = panel.x((age + i + 1) / fps), panel.x((age + i) / fps) - 1
            if x1 - x0 > 3:
                x1 -= 1
            draw.rectangle((x0, panel.y(weight), max(x0, x1), panel.bottom), fill=BLUES[(len(ages) - index + 1) % 2])
        x0, x1 = panel.x((age + len(frames)) / fps), panel.x(age / fps)
        share = sum(frames) / total
        text = f"{share:.0%}" if share >= 0.0095 else f"{share:.1%}" if share >= 0.00095 else "<0.1%"
        if draw.textlength(text, font=font(13)) < x1 - x0:
            draw.text(((x0 + x1) // 2, panel.top - 11), text, fill=INK, font=font(13), anchor="mm")
    for begin, end in zip([0, *(age + len(frames) for age, frames in zip(ages[::-1], weights[::-1]))], ages[::-1]):
        x0, x1 = panel.x(end / fps), panel.x(begin / fps)
        if end > begin:
            draw.rectangle((x0, panel.top, x1 - 1, panel.bottom), fill=SHADE)
        text = f"silence {(end - begin) / fps:.1f} s"
        if draw.textlength(text, font=font(13)) + 8 < x1 - x0:
            draw.text(((x0 + x1) // 2, (panel.top + panel.bottom) // 2), text, fill=MUTED, font=font(13), anchor="mm")
    panel.time_axis("now" if ordered else "0 s", " before now" if ordered else "")
    return image


def _ages(entries: tuple[MemoryEntry, ...]) -> tuple[list[int], bool]:
    """How many frames before now each entry's newest frame was, as its weight tells, and whether it does.

    A blend's windows overlap in time; they are laid side by side.
    """
    weights = [entry.weight for entry in entries] + [1.0]
    lengths = [len(entry.latents) for entry in entries[1:]] + [0]
    gaps = [
        round(math.log(before / after) / math.log(DECAY)) - length
        for before, after, length in zip(weights, weights[1:], lengths)
    ]
    ordered = min(gaps) >= 0
    ages, age = [], 0
    for entry, gap in zip(reversed(entries), reversed(gaps)):
        age += gap if ordered else 0
        ages.append(age)
        age += len(entry.latents)
    return ages[::-1], ordered


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
