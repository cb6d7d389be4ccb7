"""Pictures of what travels between the stages: emotions over time, a memory. Fonts, axes and colours are shared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .audio import SAMPLE_RATE, prepare_waveform
from .emotion import COLOURS, EMOTIONS
from .errors import EmotionError, MemoError, MemoryStateError
from .kernels import DECAY

if TYPE_CHECKING:
    import numpy as np

    from .emotion import EmotionTrack
    from .memory import MemoryEntry, MemoryState

INK, MUTED, GRID, SHADE, PAPER = "#22262b", "#66707b", "#e2e6ea", "#f4f6f8", "#ffffff"
BLUES = ("#2f6690", "#6ba3c4")  # neighbours that must be told apart without a meaning of their own
LEFT, RIGHT = 64, 24  # margins of a panel in pixels
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between marks of an axis
_ROW = 24  # height of a row of a legend


def draw_emotion(
    track: EmotionTrack,
    waveform: Tensor | np.ndarray | None = None,
    sample_rate: float = SAMPLE_RATE,
    width: int = 1200,
) -> Image.Image:
    """A picture of a track: a legend, the waveform on the colours of the frames' labels, these labels as a band, which
    a weaker emotion fills in part and neutral above it, and the detector's probabilities, stacked. Time runs in seconds
    of the video for the labels and of the recording for the rest.

    Args:
        waveform: [T] or [channels, T], see `audio.prepare_waveform`; None leaves it out.
        width: of the picture in pixels, at least 600. Its height is 440 (290 without a waveform), and 24 more for each
            further row of the legend.

    Returns:
        an RGB image. Raises AudioError for a bad recording, EmotionError for a width below 600.
    """
    samples = None if waveform is None else prepare_waveform(waveform, sample_rate)
    heard = 0.0 if samples is None else len(samples) / SAMPLE_RATE
    seconds = max(track.seconds, heard, float(track.segment_starts[-1]) if len(track.segment_starts) else 0.0)
    seen = (track.probabilities >= 0.03).any(dim=0).nonzero().flatten()  # wide enough to be seen
    soft = [EMOTIONS.index("neutral")] if bool((track.strengths < 1).any()) else []
    legend = [(EMOTIONS[i], COLOURS[i]) for i in sorted({*track.labels.tolist(), *seen.tolist(), *soft})]
    rows = legend_rows(legend, width)

    voice = 0 if samples is None else 150  # the height that the voice takes
    image, draw = canvas(width, 266 + voice + _ROW * len(rows), EmotionError)
    y = draw_legend(draw, rows, LEFT, 6) + 4
    neutral = COLOURS[EMOTIONS.index("neutral")]
    spans = track.spans()

    if samples is not None:
        panel = Panel(draw, (LEFT, y + 18, width - RIGHT, y + voice - 8), (0, seconds), (-1, 1))
        panel.caption("voice")
        for first, last, label, strength in spans:
            x0, x1 = panel.x(first / track.fps), panel.x(last / track.fps)
            draw.rectangle((x0, panel.top, x1, panel.bottom), fill=blend(COLOURS[label], 0.32 * strength))
        _draw_waveform(panel, samples)
        y += voice

    panel = Panel(draw, (LEFT, y + 18, width - RIGHT, y + 50), (0, seconds))
    panel.caption("emotion")
    for first, last, label, strength in spans:
        x0, x1 = panel.x(first / track.fps), panel.x(last / track.fps)
        draw.rectangle((x0, panel.top, x1, panel.bottom), fill=neutral)
        if strength > 0:
            draw.rectangle((x0, panel.y(strength), x1, panel.bottom), fill=COLOURS[label])
        behind = COLOURS[label] if strength > 0.5 else neutral
        name = EMOTIONS[label]
        for text in (name if strength == 1 else f"{name} {strength:.2g}", name):
            if draw.textlength(text, font=font(13)) + 8 < x1 - x0:
                middle = ((x0 + x1) // 2, (panel.top + panel.bottom) // 2)
                outline = 0 if strength in (0, 1) else 2  # where the text crosses from one colour to the other
                draw.text(middle, text, on(behind), font(13), anchor="mm", stroke_width=outline, stroke_fill=behind)
                break
    y += 58

    panel = Panel(draw, (LEFT, y + 18, width - RIGHT, y + 160), (0, seconds))
    panel.caption("what the detector heard")
    panel.value_axis([(0, "0%"), (0.5, "50%"), (1, "100%")])
    starts = track.segment_starts.tolist()
    for begin, end, shares in zip(starts, [*starts[1:], heard or seconds], track.probabilities.tolist()):
        x0 = panel.x(begin)
        x1 = max(x0, panel.x(end) - 1)
        level = 0.0
        for share, colour in zip(shares, COLOURS):
            low, high = panel.y(level), panel.y(level + share)
            if low > high:
                draw.rectangle((x0, high, x1, low - 1), fill=colour)
            level += share
    panel.time_axis()
    return image


def _draw_waveform(panel: Panel, samples: Tensor) -> None:
    loudest = max(float(samples.abs().max()), 1e-6) * 1.06
    columns = max(1, panel.x(len(samples) / SAMPLE_RATE) - panel.left)
    for x in range(columns):
        # One sample more than the column's own, so that the line is never broken between columns.
        part = samples[min(x * len(samples) // columns, len(samples) - 1) : (x + 1) * len(samples) // columns + 1]
        high, low = (panel.y(float(value) / loudest) for value in (part.max(), part.min()))
        panel.draw.line((panel.left + x, high, panel.left + x, low), fill=INK)


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
    """How many frames before now each entry's newest frame was, as its weight tells, and whether it does: a blend's
    windows overlap in time; they are laid side by side."""
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


# ---- what pictures share


def canvas(width: int, height: int, error: type[MemoError] = MemoError) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty RGB picture and its pen. Raises `error` for a width below 600 pixels."""
    if width < 600:
        raise error(f"width is {width}; at least 600 pixels are needed")
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The one typeface, Pillow's own, `size` pixels high."""
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Panel:
    """A rectangle of a picture with scales.

    Attributes:
        box: left, top, right, bottom in pixels.
        xs: values at its left and right edge (either may be the greater).
        ys: values at its bottom and top; above 0 where log.
        log: the scale along y is logarithmic.
    """

    draw: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    xs: tuple[float, float]
    ys: tuple[float, float] = (0.0, 1.0)
    log: bool = False

    @property
    def left(self) -> int:
        return self.box[0]

    @property
    def top(self) -> int:
        return self.box[1]

    @property
    def right(self) -> int:
        return self.box[2]

    @property
    def bottom(self) -> int:
        return self.box[3]

    def x(self, value: float) -> int:
        """The pixel column of a value."""
        low, high = self.xs
        return self.left + round((value - low) / (high - low) * (self.right - self.left))

    def y(self, value: float) -> int:
        """The pixel row of a value."""
        low, high = self.ys
        if self.log:
            value, low, high = (math.log(number) for number in (value, low, high))
        return self.bottom - round((value - low) / (high - low) * (self.bottom - self.top))

    def caption(self, text: str, above: int = 4) -> None:
        """A line of text that ends `above` pixels over the panel."""
        self.draw.text((self.left, self.top - above), text, fill=MUTED, font=font(13), anchor="ls")

    def value_axis(self, ticks: Iterable[tuple[float, str]]) -> None:
        """Lines across the panel at values of y, named on the left. Draw it before what it measures."""
        for value, name in ticks:
            y = self.y(value)
            self.draw.line((self.left, y, self.right, y), fill=GRID)
            self.draw.text((self.left - 8, y), name, fill=MUTED, font=font(12), anchor="rm")

    def time_axis(self, zero: str = "0 s", ending: str = "") -> None:
        """Seconds along x, below the panel. `zero` names 0, and `ending` follows the time farthest from it."""
        draw, y, longest = self.draw, self.bottom + 4, max(self.xs)
        most = (self.right - self.left) // 76
        step = next((step for step in _TICKS if longest / step <= most), 10 ** math.ceil(math.log10(longest / most)))
        draw.line((self.left, y, self.right, y), fill=MUTED)
        count = int(longest / step + 1e-6)
        for tick in range(count + 1):
            x = self.x(tick * step)
            draw.line((x, y, x, y + 5), fill=MUTED)
            name = zero if tick == 0 else clock(tick * step) + (ending if tick == count else "")
            half = math.ceil(draw.textlength(name, font=font(12)) / 2)
            x = min(max(x, half + 4), draw.im.size[0] - half - 4)
            draw.text((x, y + 15), name, fill=INK, font=font(12), anchor="mm")


def legend_rows(items: Iterable[tuple[str, str]], width: int) -> list[list[tuple[int, str, str]]]:
    """(name, colour) items in as many rows as a picture of `width` needs: (pixels from the left, name, colour)."""
    rows: list[list[tuple[int, str, str]]] = [[]]
    at = 0
    for name, colour in items:
        wide = 40 + math.ceil(font(14).getlength(name))
        if rows[-1] and at + wide - 18 > width - LEFT - RIGHT:
            rows.append([])
            at = 0
        rows[-1].append((at, name, colour))
        at += wide
    return rows


def draw_legend(draw: ImageDraw.ImageDraw, rows: list[list[tuple[int, str, str]]], left: int, top: int) -> int:
    """Draws what `legend_rows` laid out; returns the first pixel row below it."""
    for y, row in enumerate(rows):
        middle = top + y * _ROW + _ROW // 2
        for at, name, colour in row:
            draw.rectangle((left + at, middle - 7, left + at + 14, middle + 7), fill=colour)
            draw.text((left + at + 21, middle), name, fill=INK, font=font(14), anchor="lm")
    return top + len(rows) * _ROW


def blend(colour: str, share: float) -> tuple[int, int, int]:
    """`colour` ("#rrggbb") laid over white with the given opacity."""
    return tuple(round(255 - share * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))


def on(colour: str) -> str:
    """The colour in which text is legible on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 145 else PAPER


def clock(time: float) -> str:
    """Seconds as "2.5 s" below a minute, else as "m:ss" or "h:mm:ss"."""
    if time < 60:
        return f"{time:g} s"
    minutes, seconds = divmod(round(time), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
