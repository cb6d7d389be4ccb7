"""Runs measures over pairs of videos: each pair is decoded once for all that look at frames side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from memo_core.errors import CheckpointError, MemoError
from memo_core.release import CROP_MARGIN

from .crop import CropRule, find_crop
from .frechet import EFid, Fid, Fvd
from .identity import FSim
from .landmarks import HeadMotion, LandmarkDistance
from .metric import Measure, Metric, Reading, Tools
from .pictures import Lpips, Psnr, Ssim
from .sync import Sync
from .videos import MAX_PIXELS, Pair, PairReader, pair_videos, read_header, video_errors

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
    """One pair. reason: why nothing was measured; else empty. frames: compared, at `fps`. sizes: width and height of
    the generated and of the real pictures.
    """

    name: str
    readings: dict[str, Reading] = field(default_factory=dict)
    frames: int = 0
    fps: float = 0.0
    sizes: tuple[tuple[int, int], ...] = ()
    note: str = ""
    reason: str = ""


@dataclass
class Evaluation:
    """What `evaluate` found, by measure and by video. settings: what it was told that changes numbers."""

    generated: Path
    real: Path
    totals: dict[str, Total]
    videos: list[VideoRow]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Names of measures that could not be taken for want of a file or package."""
        return [name for name, total in self.totals.items() if total.missing]

    @property
    def remarks(self) -> list[str]:
        """What a reader of the numbers has to know: what was told, and where pictures of two sizes were compared."""
        told = self.settings
        lines = []
        if told.get("fps"):
            lines.append(f"Both sides are read at {told['fps']:g} frames a second.")
        if told.get("clips_per_video"):
            lines.append(f"FVD takes {told['clips_per_video']} clips of a video, drawn by its name.")
        if told.get("every", 1) > 1:
            lines.append(f"Networks that look at single frames look at one in {told['every']}.")
        if told.get("crop"):
            margin = "" if told.get("margin") is None else f", margin {told['margin']:g}"
            lines.append(f"Real pictures are cropped like the generated ones (rule: {told['crop']}{margin}).")
        unlike = [row for row in self.videos if len(set(row.sizes)) > 1]
        if unlike:
            sizes = " and ".join(f"{width}x{height}" for width, height in unlike[0].sizes)
            lines.append(
                f"In {len(unlike)} of {len(self.videos)} videos generated and real pictures differ in size (the first: "
                f"{sizes}): FID, FVD and E-FID see another sharpness there, or another part of the picture, and SSIM, "
                "PSNR and LPIPS scaled pictures. --crop makes the real ones like the generated ones."
            )
        return lines


def evaluate(
    generated: str | Path,
    real: str | Path,
    metrics: Sequence[str] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    every: int = 1,
    on_row: Callable[[VideoRow], None] | None = None,
    *,
    fps: float | None = None,
    clips_per_video: int | None = None,
    crop: CropRule | None = None,
    margin: float | None = None,
    pairs: Sequence[Pair] | None = None,
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
        fps: both sides are read at this rate; None: at each generated video's. Sync has a rate of its own, 25.
        clips_per_video: how many clips of a video FVD takes, drawn by its name; None takes all.
        crop: real pictures are cropped and scaled like the generated ones, see `find_crop`; a pair that has a crop
            keeps it. Sync looks at the whole real pictures, in which it crops by itself.
        margin: room around the face, in parts of its size, that the rule "portrait" leaves (None: 0.35), or that the
            pairs' own crops have.
        pairs: what is compared, where names do not say it; `generated` and `real` are then titles.

    Measures whose files or packages are missing are logged before work starts and told in the result, and the others
    are taken. A video that cannot be read costs its row.

    Raises:
        VideoError: nothing to compare. CheckpointError: a crop without face models. ValueError: an unknown name, a
            device that is not there, or a number that cannot be.
    """
    generated, real = Path(generated), Path(real)
    names = list(METRICS) if metrics is None else list(dict.fromkeys(metrics))
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"there is no measure {', '.join(map(repr, unknown))}; there are {', '.join(METRICS)}")
    tools = make_tools(weights, device, every, fps, clips_per_video)
    pairs = pair_videos(generated, real) if pairs is None else pairs
    if crop is not None:
        _ = tools.analyzer  # says now what is missing
    if crop == "portrait" and margin is None:
        margin = CROP_MARGIN
    totals = {name: Total() for name in names}
    running = _load(tools, totals)

    rows = []
    for pair in tqdm(pairs, desc="evaluate", unit="video", disable=len(pairs) < 2):
        rows.append(_measure(crop_pair(pair, crop, tools, margin), running, names, tools))
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
    rule = crop or ("given" if any(pair.crop for pair in pairs) else None)
    settings = {"every": every, "fps": fps, "clips_per_video": clips_per_video, "crop": rule, "margin": margin}
    return Evaluation(generated, real, totals, rows, settings)


def make_tools(
    weights: str | Path | None, device: str | torch.device, every: int, fps: float | None, clips_per_video: int | None
) -> Tools:
    """What measures share; ValueError for a number that cannot be, or a device that is not there."""
    if every < 1:
        raise ValueError(f"every is {every}; allowed is 1 and up")
    if fps is not None and not 0.1 <= fps <= 1000:
        raise ValueError(f"fps is {fps}; allowed is 0.1 to 1000, or None for that of each generated video")
    if clips_per_video is not None and clips_per_video < 1:
        raise ValueError(f"clips_per_video is {clips_per_video}; allowed is 1 and up, or None for all")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return Tools(None if weights is None else Path(weights), device, every, fps, clips_per_video)


def crop_pair(pair: Pair, rule: CropRule | None, tools: Tools, margin: float | None = None) -> Pair:
    """The pair with the crop that the rule finds; with the problem where it finds none."""
    if rule is None or pair.crop is not None or pair.problem:
        return pair
    try:
        header = read_header(pair.generated)
        with video_errors(pair.real):
            size = header.width, header.height
            margin = CROP_MARGIN if margin is None else margin
            found = find_crop(rule, tools.analyzer, pair.generated, pair.real, size, MAX_PIXELS, margin)
    except Exception as error:  # networks and codecs raise anything; the other videos go on
        return replace(pair, problem=_say(error))
    return replace(pair, crop=found)


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
        reader = PairReader(pair.generated, pair.real, tools.device, tools.fps, pair.crop)
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
    row.frames, row.fps, row.sizes, row.note = reader.frames, reader.fps, reader.sizes, reader.note()
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
