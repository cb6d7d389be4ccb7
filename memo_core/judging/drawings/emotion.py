"""An emotion track as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ...errors import EmotionError
from ...inputs.emotion import COLOURS
from ...inputs.sound import prepare_waveform
from ...release import EMOTIONS, SAMPLE_RATE
from .canvas import INK, LEFT, LEGEND_ROW, RIGHT, Panel, blend, canvas, draw_legend, font, legend_rows, on

if TYPE_CHECKING:
    import numpy as np

    from ...inputs.emotion import EmotionTrack


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
        waveform: [T] or [channels, T], see `inputs.sound.prepare_waveform`; None leaves it out.
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
    image, draw = canvas(width, 266 + voice + LEGEND_ROW * len(rows), EmotionError)
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
