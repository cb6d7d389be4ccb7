"""What all drawings share: paper, type, colours, panels with axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...errors import MemoError

INK, MUTED, GRID, SHADE, PAPER = "#22262b", "#66707b", "#e2e6ea", "#f4f6f8", "#ffffff"
BLUES = ("#2f6690", "#6ba3c4")  # neighbours that must be told apart without a meaning of their own
LEFT, RIGHT = 64, 24  # margins of a panel in pixels
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between marks of an axis
LEGEND_ROW = 24  # height of a row of a legend


# ---- what pictures share


def canvas(width: int, height: int, error: type[MemoError] = MemoError) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty RGB picture and its pen. Raises `error` for a width below 600 pixels."""
    if width < 600:
        raise error(f"width is {width}; at least 600 pixels are needed")
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
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
        """The first pixel column."""
        return self.box[0]

    @property
    def top(self) -> int:
        """The first pixel row."""
        return self.box[1]

    @property
    def right(self) -> int:
        """The last pixel column."""
        return self.box[2]

    @property
    def bottom(self) -> int:
        """The last pixel row."""
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
        middle = top + y * LEGEND_ROW + LEGEND_ROW // 2
        for at, name, colour in row:
            draw.rectangle((left + at, middle - 7, left + at + 14, middle + 7), fill=colour)
            draw.text((left + at + 21, middle), name, fill=INK, font=font(14), anchor="lm")
    return top + len(rows) * LEGEND_ROW


def blend(colour: str, share: float) -> tuple[int, int, int]:
    """`colour` ("#rrggbb") laid over white with the given opacity."""
    red, green, blue = (round(255 - share * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))
    return red, green, blue


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
