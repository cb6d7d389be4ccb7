"""What was dropped where: how many clips each stage left, as a picture and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from PIL import Image

from memo_core.judging.drawings.canvas import clock

from .rows import Row
from .settings import Settings

COLUMNS = ("scenes", "faces", "quality", "sync", "review", "encode")
NAMES = {
    "scenes": "scene cuts",
    "faces": "faces",
    "quality": "image quality",
    "sync": "lip sync",
    "review": "review",
    "encode": "encoding",
}
KEPT, COLOURS = "#2f6690", ("#d1495b", "#c77d0a", "#7b5ea7", "#7a8b3c", "#a0785a", "#2a9d8f", "#5c6370")


class Funnel:
    """How many rows there are, and for every stage how many it left and what it dropped, by cause.

    Attributes:
        total: rows. steps: (stage, rows left, how many were dropped by cause). seconds: of what was dropped, by stage
            and cause. kept: seconds.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        counts: dict[str, Counter] = {stage: Counter() for stage in COLUMNS}
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.total, self.kept = 0, 0.0
        for row in rows:
            self.total += 1
            if row.stage:
                counts[row.stage][row.cause] += 1
                self.seconds[row.stage, row.cause] += row.seconds
            else:
                self.kept += row.seconds
        self.steps, left = [], self.total
        for stage in COLUMNS:
            left -= counts[stage].total()
            self.steps.append((stage, left, counts[stage]))


def describe_funnel(found: Funnel, settings: Settings) -> str:
    """The same as lines of text, with how long it is what was dropped."""
    lines = [f"{found.total:7d}  clips and unusable videos"]
    for stage, left, causes in found.steps:
        parts = ["left out"] if stage in settings.skip else []
        for cause, count in causes.most_common():
            seconds = round(found.seconds[stage, cause], 1)
            parts.append(f"{count} {cause}{f' {clock(seconds)}' if seconds else ''}")
        said = ", ".join(parts)
        lines.append(f"{left:7d}  after {NAMES[stage]}{f' ({said})' if said else ''}")
    return "\n".join(lines)


def draw_funnel(found: Funnel, settings: Settings) -> Image.Image:
    """A bar for every stage: what it left, and beside it what it dropped, by cause. An RGB image, 1200 pixels wide."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total, steps = found.total, found.steps
    figure = Figure(figsize=(12, 5.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(0, total, color=KEPT)
    names, gap = ["found"], 0.01 * max(total, 1)
    for y, (stage, left, causes) in enumerate(steps, 1):
        axes.barh(y, left, color=KEPT)
        begin, label = left, None
        if stage in settings.skip:
            axes.text(begin + gap, y, "left out", va="center", fontsize=10, color="#66707b")
        shown = causes.most_common(len(COLOURS) - 1)
        if causes.total() > sum(count for _, count in shown):
            shown.append(("other", causes.total() - sum(count for _, count in shown)))
        for (_, count), colour in zip(shown, COLOURS):
            axes.barh(y, count, left=begin, color=colour)
            begin += count
        for (cause, count), colour in zip(shown, COLOURS):  # each beside the one before, under its colour
            place = {"xy": (begin + gap, y)} if label is None else {"xy": (1, 0.5), "xycoords": label}
            space = "" if label is None else "  "
            label = axes.annotate(f"{space}{count} {cause}", **place, va="center", fontsize=10, color=colour)
            label.set_fontweight("bold")
        names.append(NAMES[stage])
    for y, count in enumerate([total, *(left for _, left, _ in steps)]):
        if count:
            axes.text(0.006 * max(total, 1), y, f"{count}", va="center", color="white", fontsize=11, fontweight="bold")
    length = clock(round(found.kept, 1))
    axes.set_title(f"{steps[-1][1]} of {total} clips kept, {length}", loc="left")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, max(total, 1) * 1.35)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("clips (a video that could not be cut counts as one)")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
