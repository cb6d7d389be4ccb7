"""Bar charts of measured parts: plain bars with their values, and lines where a cost grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Bars:
    """Groups of bars: one group per label, one bar in it per series.

    Attributes:
        values: series -> label -> value; a label that a series lacks has no bar.
        line: a level to compare with, drawn across.
    """

    title: str
    values: dict[str, dict[str, float]]
    unit: str = ""
    line: float | None = None


@dataclass
class Curves:
    """Lines over numbers, both axes logarithmic."""

    title: str
    values: dict[str, dict[float, float]]
    x: str
    y: str = ""
    ticks: list[float] = field(default_factory=list)


def pyplot() -> Any:
    """matplotlib's, drawing to files; SystemExit that says how to get it where it is absent."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the figures are written, but the chart needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(path: Path, heading: str, panels: list[Bars | Curves]) -> None:
    """Draws the panels, two in a row, into a picture."""
    plt = pyplot()
    panels = [panel for panel in panels if any(panel.values.values())]
    if not panels:
        return
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, min(2, len(panels)), figsize=(15, 4.6 * rows), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes.flat, panels):
        (_bars if isinstance(panel, Bars) else _curves)(axis, panel)
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _bars(axis: Any, panel: Bars) -> None:
    series = {name: values for name, values in panel.values.items() if values}
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        shown = [(i, values[label]) for i, label in enumerate(labels) if label in values]
        where = [i + (place - (len(series) - 1) / 2) * width for i, _ in shown]
        bars = axis.bar(where, [value for _, value in shown], width, label=name)
        axis.bar_label(bars, [f"{value:.3g}{panel.unit}" for _, value in shown], fontsize=7)
    if panel.line is not None:
        axis.axhline(panel.line, color="black", linewidth=0.8)
    axis.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
    if len(series) > 1:
        axis.legend(fontsize=8, frameon=False)


def _curves(axis: Any, panel: Curves) -> None:
    for name, values in panel.values.items():
        if values:
            places = sorted(values)
            axis.plot(places, [values[place] for place in places], marker="o", label=name)
            for place in places:
                axis.annotate(f"{values[place]:.3g}", (place, values[place]), fontsize=7, xytext=(3, 4),
                              textcoords="offset points")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel=panel.x, ylabel=panel.y)
    ticks = sorted({place for values in panel.values.values() for place in values})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    # Room below and above: a flat line should look flat.
    every = [value for values in panel.values.values() for value in values.values() if value > 0]
    axis.set_ylim(min(every) / 4, max(every) * 4)
    if len(panel.values) > 1:
        axis.legend(fontsize=8, frameon=False)
