"""Curves of quality as a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...errors import ComposeError
from ..quality import Curve, Quality, axis_ticks
from .canvas import INK, LEFT, MUTED, RIGHT, Panel, blend, canvas, font

# --- The picture ------------------------------------------------------------------------------------------------------

HEAD, ROW, PLOT, FOOT = 52, 132, 88, 20  # heights in pixels
BAD = "#be281e"
SMOOTH = 3  # curves are drawn so many times as large and scaled down


def draw_quality(quality: Quality, width: int = 1000) -> Image.Image:
    """The curves over the clip's seconds, one below the other, as an RGB picture.

    Where frames lie closer than pixels, a pale band shows their range and the line their mean. A dashed line marks
    equality with the portrait.

    Args:
        width: of the picture in pixels, at least 600; its height is 600, and 132 more with the identity.

    Raises:
        ComposeError: too narrow.
    """
    curves = quality.curves()
    image, draw = canvas(width, HEAD + ROW * len(curves) + FOOT, ComposeError)
    draw.text((LEFT, 24), "Clip quality", fill=INK, font=font(20), anchor="lm")
    headline = quality.headline()
    if font(14).getlength(headline) > width - RIGHT - LEFT - 120:
        headline = headline.split(":")[0]  # the panels tell the rest
    draw.text((width - RIGHT, 24), headline, fill=MUTED, font=font(14), anchor="rm")
    for row, (curve, values) in enumerate(curves):
        top = HEAD + ROW * row + 26
        low, high = min(0.0, float(values.min())), max(curve.top, 1.08 * float(values.max()))
        panel = Panel(draw, (LEFT, top, width - RIGHT, top + PLOT), (0, quality.num_frames / quality.fps), (low, high))
        panel.value_axis((value, f"{value:g}") for value in axis_ticks(low, high, 3))
        draw.text((LEFT, top - 8), curve.title, fill=curve.colour, font=font(15), anchor="ls")
        after = LEFT + font(15).getlength(curve.title) + 10
        draw.text((after, top - 8), curve.unit, fill=MUTED, font=font(13), anchor="ls")
        words, is_good = curve.verdict(values, quality.fps)
        draw.text((width - RIGHT, top - 8), words, fill=INK if is_good else BAD, font=font(14), anchor="rs")
        if curve.good is not None:
            y = panel.y(curve.good)
            for x in range(panel.left, panel.right, 10):
                draw.line((x, y, min(x + 5, panel.right), y), fill=MUTED)
        _plot(image, panel, values, quality.fps, curve)
    panel.time_axis()
    return image


def _plot(image: Image.Image, panel: Panel, values: NDArray[np.float32], fps: float, curve: Curve) -> None:
    """The values in the middle of their frames; `skip` of them are left out if any remain."""
    first = curve.skip if len(values) > curve.skip else 0
    bins = np.array_split(np.arange(first, len(values)), min(panel.right - panel.left, len(values) - first))
    (low, high), height, edge = panel.ys, panel.bottom - panel.top, 4  # pixels around the panel for a line's width
    size = (panel.right - panel.left + 2 * edge, height + 2 * edge)

    def points(pick: Callable[[NDArray[np.float32]], float]) -> list[tuple[float, float]]:
        across = [(panel.right - panel.left) * (float(part.mean()) + 0.5) / len(values) for part in bins]
        up = [height * (high - float(pick(values[part]))) / (high - low) for part in bins]
        return [((x + edge) * SMOOTH, (y + edge) * SMOOTH) for x, y in zip(across, up)]

    def lay(shape: Callable[[ImageDraw.ImageDraw], None], colour: str | tuple[int, int, int]) -> None:
        mask = Image.new("L", (size[0] * SMOOTH, size[1] * SMOOTH))
        shape(ImageDraw.Draw(mask))
        image.paste(colour, (panel.left - edge, panel.top - edge), mask.resize(size, Image.Resampling.BOX))

    if len(bins) < len(values) - first:
        lay(lambda draw: draw.polygon(points(np.max) + points(np.min)[::-1], fill=255), blend(curve.colour, 0.25))
    line = points(np.mean)
    lay(lambda draw: draw.line(line, fill=255, width=2 * SMOOTH, joint="curve"), curve.colour)
    lay(lambda draw: draw.regular_polygon((*line[-1], 3 * SMOOTH), 24, fill=255), curve.colour)
