"""One row for every clip, kept or dropped, with its scores and the reason; and the table that holds them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from memo_core.checks import shown
from memo_core.files import open_regular, replace_whole

from ..reading import fits, parse_json

STAGES = ("scenes", "faces", "quality", "sync", "encode")
TABLE = "table.jsonl"


class Drop(Exception):
    """A stage's judgement that a video or clip cannot be used: a cause in two or three words, and the detail."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class PrepareError(ValueError):
    """Arguments or files that the pipeline cannot work with at all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A clip, or a video that has not become clips. None means not measured.

    Attributes:
        id: of the source's content, and of the span in milliseconds.
        source: path below RAW_DIR. identity: of the content, the first part of id, so that a file keeps its clips and
            verdicts under another name. changed: size and time of change in ns, while which the identity holds.
        start, end: seconds in the source.
        width, height, fps: of the source, as decoded.
        decision: keep or drop. stage, cause, detail: where and why it was dropped.
        face_box: around the face in all pictures looked at; box: what is cut out; left, top, right, bottom in pixels
            of the source.
        looks: when the face was looked for, and its box: seconds in the source, left, top, right, bottom.
        face_time: seconds in the source of the surest face; keypoints: its eyes, nose and mouth corners, x and y in
            source pixels.
        eyes_box, mouth_box: where eyes and mouth ever were, in parts of `box`.
        quality: HyperIQA, 0 to 100. sync_confidence, sync_distance: SyncNet's; sync_offset: frames at 25 fps.
        verdict: of the reviewer, keep, drop or empty.
        key: of the sample in the shards.
        skipped: stages left out by --skip.
        done: digest of the settings that each stage ran with.
        failure: stage, cause and detail of what ended the measuring; error: it was no judgement (a crash, a time
            limit), so that --retry runs it again.
    """

    id: str
    source: str
    identity: str
    changed: list[int] | None = None
    decision: str = "keep"
    stage: str = ""
    cause: str = ""
    detail: str = ""
    start: float | None = None
    end: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    face_box: list[float] | None = None
    box: list[float] | None = None
    looks: list[list[float]] | None = None
    face_time: float | None = None
    keypoints: list[float] | None = None
    eyes_box: list[float] | None = None
    mouth_box: list[float] | None = None
    quality: float | None = None
    sync_confidence: float | None = None
    sync_distance: float | None = None
    sync_offset: int | None = None
    verdict: str = ""
    key: str = ""
    skipped: list[str] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    failure: list[str] | None = None
    error: bool = False

    def fail(self, stage: str, cause: str, detail: str, error: bool = False) -> Row:
        return replace(self, failure=[stage, cause, detail], error=error)

    @property
    def seconds(self) -> float:
        return (self.end or 0.0) - (self.start or 0.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Raises ValueError for what is no row, TypeError where something is missing."""
        for name, value in values.items():
            if name in _KINDS and not fits(value, _KINDS[name]):
                raise ValueError(f"{name} is {shown(value)}")
        row = cls(**{name: value for name, value in values.items() if name in _KINDS})
        for name, count in _LENGTHS.items():
            value = getattr(row, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} items, not {count}")
        # Both become names of files: below OUT_DIR, below RAW_DIR.
        for name in (row.id, row.key):
            if set(name) & set("/\\\0") or name.startswith("."):
                raise ValueError(f"{shown(name)} is no id or key, which become names of files")
        if not row.source or os.path.isabs(row.source) or ".." in Path(row.source).parts or "\0" in row.source:
            raise ValueError(f"source is {shown(row.source)}, which does not lie below RAW_DIR")
        return row


_KINDS = get_type_hints(Row)
_LENGTHS = {"changed": 2, "face_box": 4, "box": 4, "keypoints": 10, "eyes_box": 4, "mouth_box": 4, "failure": 3}
# What each stage fills in, cleared when it runs again.
MEASURED = {
    "faces": ("face_box", "box", "looks", "face_time", "keypoints", "eyes_box", "mouth_box"),
    "quality": ("quality",),
    "sync": ("sync_confidence", "sync_distance", "sync_offset"),
    "encode": ("key",),
}


def decide(row: Row, min_quality: float, min_confidence: float) -> Row:
    """The row with its decision: what makes a clip impossible comes first, then the reviewer, then the scores.

    Args:
        min_quality: of HyperIQA, 0 to 100 (the paper: 40).
        min_confidence: of SyncNet (the paper: 5).
    """
    stage = cause = detail = ""
    if row.failure is not None and row.failure[0] not in ("quality", "sync"):
        stage, cause, detail = row.failure
    elif row.verdict == "drop":
        stage, cause, detail = "review", "reviewer", "dropped by hand"
    elif row.verdict == "keep":
        pass
    elif row.quality is not None and row.quality < min_quality:
        stage, cause, detail = "quality", "low quality", f"HyperIQA {row.quality:.1f}, below {min_quality:g}"
    elif row.sync_confidence is not None and row.sync_confidence < min_confidence:
        said = f"SyncNet confidence {row.sync_confidence:.2f}, below {min_confidence:g}"
        stage, cause, detail = "sync", "out of sync", said
    elif row.failure is not None:
        stage, cause, detail = row.failure
    return replace(row, decision="drop" if stage else "keep", stage=stage, cause=cause, detail=detail)


class Table:
    """All rows, by id, kept in a JSON Lines file that is replaced as a whole.

    Raises:
        PrepareError: the file holds a line that is no row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Row] = {}
        self._next_save = 0.0
        if not os.path.lexists(path):
            return
        try:
            with open_regular(path) as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise PrepareError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                row = Row.from_json(parse_json(line))
            except (ValueError, TypeError) as error:
                raise PrepareError(f"{path}, line {number} is not a row: {error}. Repair or delete the file") from error
            self.rows[row.id] = row

    def put(self, rows: Iterable[Row]) -> None:
        self.rows.update((row.id, row) for row in rows)

    def save(self, now: bool = True) -> None:
        """Writes the file; with `now=False` only every few seconds, the less often the larger it is."""
        begun = time.monotonic()
        if not now and begun < self._next_save:
            return
        with replace_whole(self.path) as temporary, open(temporary, "w", encoding="ascii") as file:
            for row in sorted(self.rows.values(), key=lambda row: (row.source, row.start or 0.0, row.id)):
                file.write(json.dumps(row.to_json()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._next_save = time.monotonic() + max(5.0, 50 * (time.monotonic() - begun))
