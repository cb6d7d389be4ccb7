"""What a run tells of itself: figures of its steps, its log, trackers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from memo_core.files import replace_whole

from .config import ConfigError, Stage
from .reading import parse_json


class Figures:
    """What happened since it was last written down, over all processes."""

    def __init__(self) -> None:
        self.loss, self.kept, self.seen, self.skipped, self.norm = 0.0, 0, 0, 0, 0.0

    def add(self, loss: float, kept: int, seen: int, norm: float) -> None:
        self.loss, self.kept, self.seen = self.loss + loss, self.kept + kept, self.seen + seen
        self.skipped, self.norm = self.skipped + (not math.isfinite(norm)), norm

    def taken(self) -> dict[str, float]:
        """Mean loss of the samples kept (NaN: none), share of them, the last gradient's norm, and steps skipped because
        theirs was not finite.
        """
        figures = {
            "loss": self.loss / self.kept if self.kept else math.nan,
            "gradient_norm": self.norm,
            "kept": self.kept / self.seen,
            "skipped": float(self.skipped),
        }
        self.__init__()
        return figures


def truncate(log: Path, step: int) -> None:
    """Takes out of a log what comes after a step: it is done again."""
    if log.is_file():
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            kept = [row for row in rows if row.endswith("\n") and float(parse_json(row)["step"]) <= step]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"{log} is no log of a run ({error}): repair or delete it") from error
        with replace_whole(log) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def last_step(log: Path) -> int | None:
    """The step of a log's last row; None without one."""
    rows = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return int(parse_json(rows[-1])["step"]) if rows else None


def trackers(config: Stage) -> list[str]:
    """TensorBoard and those asked for; ConfigError for one that is not installed."""
    from accelerate.tracking import get_available_trackers

    wanted = list(dict.fromkeys(["tensorboard", *config.engine.trackers]))
    available = [str(tracker) for tracker in get_available_trackers()]
    if absent := [name for name in wanted if name not in available]:
        raise ConfigError(f"not installed: {', '.join(absent)} (engine.trackers); pip install {' '.join(absent)}")
    return wanted


def layout(tracker: Any) -> dict[str, str]:
    """How a tracker is told that pictures have their channels last."""
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def plain(value: Any) -> Any:
    """What TensorBoard takes as a setting."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)
