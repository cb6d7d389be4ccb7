r"""Writes what was found: report.md, report.json, videos.csv, and curves over time as pictures.

Names that are not UTF-8 are written with escapes, such as \udcff.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from memo_core.files import replace_whole

from .evaluate import METRICS, Evaluation, VideoRow, readable

ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def table(evaluation: Evaluation) -> str:
    """The totals as a table in Markdown."""
    lines = ["| measure | value | spread | real | videos | remark |", "|---|---:|---:|---:|---:|---|"]
    for name, total in evaluation.totals.items():
        measure = METRICS[name]
        cells = [f"{measure.title} {ARROWS[measure.better]}".strip()]
        cells += ["–" if total.value is None else _number(total.value), _number(total.spread), _number(total.real)]
        cells += [str(total.videos), _escaped("; ".join(total.missing) or total.note)]
        lines.append(_row(cells))
    return "\n".join(lines)


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Writes the report into `folder`, which is made. Pictures are left out where matplotlib is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with replace_whole(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(_plain(evaluation), indent=1, allow_nan=False), encoding="utf-8")
    with VideoTable(folder / "videos.csv", list(evaluation.totals)) as videos:
        for row in evaluation.videos:
            videos.write(row)
    pictures = [path for row in evaluation.videos if (path := draw_curves(row, folder)) is not None]
    text = _markdown(evaluation, [path.relative_to(folder) for path in pictures])
    with replace_whole(folder / "report.md") as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")


def compare(folder: Path) -> None:
    """Writes systems.md: the totals of every report at SYSTEM/report/report.json below `folder`, side by side.

    A note says so where they were not measured alike.
    """
    reports = {path.parts[-3]: json.loads(path.read_text("utf-8")) for path in folder.glob("*/report/report.json")}
    names = [name for name in METRICS if any(name in report["measures"] for report in reports.values())]
    lines = [_row(["system", "videos", *(f"{METRICS[name].title} {ARROWS[METRICS[name].better]}" for name in names)])]
    lines.append("|---|---:|" + "---:|" * len(names))
    for system in sorted(reports):
        measures, videos = reports[system]["measures"], reports[system]["videos"]
        values = [_number(measures.get(name, {}).get("value")) or "–" for name in names]
        lines.append(_row([_escaped(system), str(sum(not video["reason"] for video in videos)), *values]))
    settings = [report["settings"] for report in reports.values()]
    kept = sorted(set.intersection(*map(set, settings))) if settings else []  # older reports have fewer
    if len({json.dumps([those[name] for name in kept]) for those in settings}) > 1:
        lines += ["", "**Not measured alike**: the settings in the reports differ."]
    with replace_whole(folder / "systems.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8", "backslashreplace")


class VideoTable:
    """videos.csv, which begins with the first row and has each on disk at once: what ends the run loses none."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._file: Any = None

    def __enter__(self) -> VideoTable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, video: VideoRow) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
            real = [f"{name}_real" for name in self.names]
            csv.writer(self._file).writerow(["video", "reason", "frames", "fps", *self.names, *real, "remark"])
        readings = [video.readings.get(name) for name in self.names]
        values = ["" if r is None or r.value is None else r.value for r in readings]
        real = ["" if r is None or r.real is None else r.real for r in readings]
        remarks = [video.note, *(f"{name}: {r.note}" for name, r in video.readings.items() if r.note)]
        remark = "; ".join(filter(None, remarks))
        row = [video.name, video.reason, video.frames, video.fps, *values, *real, remark]
        csv.writer(self._file).writerow(row)
        self._file.flush()


def draw_curves(row: VideoRow, folder: Path) -> Path | None:
    """Draws a pair's measures over time, curves/NAME.png; None if it has none or matplotlib is not installed."""
    curves = {name: reading for name, reading in row.readings.items() if reading.curve is not None}
    if not curves:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 0.6 + 1.6 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for panel, (name, reading) in zip(panels, curves.items(), strict=True):
        measure = METRICS[name]
        second = len(reading.times) if len(reading.times) < 2 else round(1 / (reading.times[1] - reading.times[0]))
        smooth = 3 < 3 * second < len(reading.curve)  # a line of means over a second before the pale one of frames
        panel.plot(reading.times, reading.curve, linewidth=1.2, color="#2f6690", alpha=0.3 if smooth else 1)
        if smooth:
            means = np.convolve(reading.curve, np.full(second, 1 / second), mode="valid")
            panel.plot(reading.times[second // 2 :][: len(means)], means, linewidth=1.6, color="#2f6690")
        panel.margins(x=0)
        panel.axhline(reading.value, linewidth=0.8, linestyle="--", color="#66707b")
        better = f", {measure.better} is better" if measure.better else ""
        panel.set_title(f"{measure.title}: mean {_number(reading.value)}{better}", loc="left", fontsize=10)
        panel.grid(color="#e2e6ea")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(readable(row.name).replace("$", r"\$"), fontsize=12)
    path = folder / "curves" / f"{row.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _markdown(evaluation: Evaluation, pictures: list[Path]) -> str:
    parts = [f"# {_escaped(str(evaluation.generated))} against {_escaped(str(evaluation.real))}", table(evaluation)]
    parts += ["\n".join(f"- {_escaped(line)}" for line in evaluation.remarks)] if evaluation.remarks else []
    names = list(evaluation.totals)
    rows = [_row(["video", "frames", *(METRICS[name].title for name in names), "remark"])]
    rows.append("|---|---:|" + "---:|" * len(names) + "---|")
    for video in evaluation.videos:
        readings = [video.readings.get(name) for name in names]
        remark = [video.reason, video.note, *(f"{name}: {r.note}" for name, r in video.readings.items() if r.note)]
        values = ["–" if reading is None or reading.value is None else _number(reading.value) for reading in readings]
        rows.append(_row([_escaped(video.name), str(video.frames), *values, _escaped("; ".join(filter(None, remark)))]))
    parts += ["## Videos", "\n".join(rows), "## Definitions"]
    parts.append("\n".join(f"- **{METRICS[name].title}**: {METRICS[name].definition}" for name in names))
    parts.append(
        "A mean over videos counts each video once, however long; the spread is their standard deviation. `real` is "
        "the same measure of the real videos, where it needs no pair."
    )
    if pictures:
        links = [f"![{_escaped(path.stem)}](<{urllib.parse.quote(os.fsencode(path.as_posix()))}>)" for path in pictures]
        parts += ["## Over time", "\n".join(links)]
    return "\n\n".join(parts) + "\n"


def _plain(evaluation: Evaluation) -> Any:
    """For JSON: numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(
        {
            "generated": str(evaluation.generated),
            "real": str(evaluation.real),
            "settings": evaluation.settings,
            "remarks": evaluation.remarks,
            "measures": {name: asdict(METRICS[name]) | asdict(total) for name, total in evaluation.totals.items()},
            "videos": [asdict(row) for row in evaluation.videos],
        }
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# What Markdown or HTML could take for markup: the rest of the punctuation is as common in names as it is harmless.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&#!$]|:(?=//)|@|(?<!\w)_|_(?!\w)|(?<=www)\.")


def _escaped(text: str) -> str:
    """A name, or a remark that may hold one, as Markdown that shows it and does nothing else, on one line."""
    text = "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else " " for c in text)
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def _row(cells: list[str]) -> str:
    """A row of a table, of cells of Markdown."""
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"
