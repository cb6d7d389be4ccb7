"""Runs measures over pairs of videos: each pair is decoded once for all that look at frames side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from memo_core.errors import CheckpointError, MemoError

from .frechet import EFid, Fid, Fvd
from .identity import FSim
from .landmarks import HeadMotion, LandmarkDistance
from .metric import Measure, Metric, Reading, Tools
from .pictures import Lpips, Psnr, Ssim
from .sync import Sync
from .videos import Pair, PairReader, pair_videos

logger = logging.getLogger(__name__)

_METRICS: tuple[type[Metric], ...] = (Fid, Fvd, Sync, Ssim, Psnr, Lpips, FSim, EFid, LandmarkDistance, HeadMotion)
METRICS: dict[str, Measure] = {measure.name: measure for metric in _METRICS for measure in metric.measures}


@dataclass
class Total:
    """A measure over all videos.

    value, real: mean over videos, or the one number of measures of sets; None if it could not be taken. spread:
    standard deviation over videos. videos: how many gave a value. missing: what has to be fetched first.
    """

    value: float | None = None
    real: float | None = None
    spread: float | None = None
    videos: int = 0
    note: str = ""
    missing: list[str] = field(default_factory=list)


@dataclass
class VideoRow:
    """One pair. reason: why nothing was measured; else empty. frames: compared, at `fps`."""

    name: str
    readings: dict[str, Reading] = field(default_factory=dict)
    frames: int = 0
    fps: float = 0.0
    note: str = ""
    reason: str = ""


@dataclass
class Evaluation:
    """What `evaluate` found, by measure and by video."""

    generated: Path
    real: Path
    totals: dict[str, Total]
    videos: list[VideoRow]

    @property
    def missing(self) -> list[str]:
        """Names of measures that could not be taken for want of a file or package."""
        return [name for name, total in self.totals.items() if total.missing]


def evaluate(
    generated: str | Path,
    real: str | Path,
    metrics: Sequence[str] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    every: int = 1,
    on_row: Callable[[VideoRow], None] | None = None,
) -> Evaluation:
    """Measures generated videos against real ones.

    Args:
        generated, real: video files, or folders of videos paired by name.
        metrics: names as in METRICS; None takes all.
        weights: folder of network files; None: ./weights, but no programs from there; see `Tools`. Nothing is
            downloaded.
        device: for networks in PyTorch; those in ONNX run on the CPU.
        every: networks that look at single frames look at every n-th.
        on_row: called with each video's row when it is measured.

    Measures whose files or packages are missing are logged before work starts and told in the result, and the others
    are taken. A video that cannot be read costs its row.

    Raises:
        VideoError: nothing to compare. ValueError: an unknown name, a device that is not there, or `every` below 1.
    """
    generated, real = Path(generated), Path(real)
    names = list(METRICS) if metrics is None else list(dict.fromkeys(metrics))
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"there is no measure {', '.join(map(repr, unknown))}; there are {', '.join(METRICS)}")
    if every < 1:
        raise ValueError(f"every is {every}; allowed is 1 and up")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    pairs = pair_videos(generated, real)
    tools = Tools(None if weights is None else Path(weights), device, every)
    totals = {name: Total() for name in names}
    running = _load(tools, totals)

    rows = []
    for pair in tqdm(pairs, desc="evaluate", unit="video", disable=len(pairs) < 2):
        rows.append(_measure(pair, running, names, tools))
        if rows[-1].reason:
            logger.warning("%s: %s", pair.name, rows[-1].reason)
        if on_row is not None:
            on_row(rows[-1])
    for metric in running:
        for name, total in (metric.total() or {}).items():
            if name in totals:
                totals[name] = Total(
                    total.value, total.real, videos=sum(not row.reason for row in rows), note=total.note
                )
    for name, total in totals.items():
        if not total.missing and total.value is None and not total.note:
            totals[name] = _mean([row.readings[name] for row in rows if name in row.readings])
    return Evaluation(generated, real, totals, rows)


def _load(tools: Tools, totals: dict[str, Total]) -> list[Metric]:
    """The metrics that can run; the others' reasons are logged and put into `totals`."""
    running = []
    for kind in _METRICS:
        wanted = [measure.name for measure in kind.measures if measure.name in totals]
        if not wanted:
            continue
        missing = kind.missing(tools)
        if not missing:
            try:
                running.append(kind(tools))
                continue
            except Exception as error:  # packages that do not fit each other raise anything
                missing = [str(error) if isinstance(error, MemoError) else _say(error)]
        for name in wanted:
            totals[name].missing = missing
    lines = dict.fromkeys(line for total in totals.values() for line in total.missing)
    for line in lines:
        names = [name for name, total in totals.items() if line in total.missing]
        logger.warning("%s (%s)", line, ", ".join(names))
    return running


def _measure(pair: Pair, metrics: list[Metric], names: list[str], tools: Tools) -> VideoRow:
    row = VideoRow(pair.name, reason=pair.problem)
    if pair.problem:
        return row
    failed: dict[Metric, str] = {}

    def attempt(metric: Metric, work) -> None:
        if metric not in failed:
            try:
                work(metric)
            except Exception as error:  # networks and codecs raise anything; the other measures and videos go on
                failed[metric] = _say(error)

    try:
        reader = PairReader(pair.generated, pair.real, tools.device)
        for metric in metrics:
            attempt(metric, lambda metric: metric.start(pair))
        with tqdm(total=reader.generated.frames, desc=readable(pair.name), unit="frame", leave=False) as progress:
            for chunk in reader.chunks():
                for metric in metrics:
                    attempt(metric, lambda metric: metric.update(chunk))
                progress.update(len(chunk.generated))
    except Exception as error:  # a hostile file must not end the run
        row.reason = _say(error)
        return row
    row.frames, row.fps, row.note = reader.frames, reader.fps, reader.note()
    for metric in metrics:
        attempt(metric, lambda metric: row.readings.update(metric.finish()))
        if metric in failed:
            row.readings.update({measure.name: Reading(None, note=failed[metric]) for measure in metric.measures})
    row.readings = {name: row.readings[name] for name in names if name in row.readings}
    return row


def readable(text: str) -> str:
    """The text with escapes for what is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _say(error: Exception) -> str:
    known = isinstance(error, MemoError) and not isinstance(error, CheckpointError)
    text = " ".join(str(error).split())[:400]
    return text if known else f"{type(error).__name__}: {text}"


def _mean(readings: list[Reading]) -> Total:
    values = [reading.value for reading in readings if reading.value is not None]
    real = [reading.real for reading in readings if reading.real is not None]
    return Total(
        value=float(np.mean(values)) if values else None,
        real=float(np.mean(real)) if real else None,
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        videos=len(values),
        note="" if values else next((reading.note for reading in readings if reading.note), "no video was measured"),
    )
