"""One row for every clip, kept or dropped, with its scores and the reason; and the table that holds them."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_type_hints

from memo_core.checks import shown
from memo_core.files import open_regular, replace_whole

from ..reading import fits, parse_json

if TYPE_CHECKING:
    from .settings import Settings

STAGES = ("scenes", "faces", "quality", "sync", "encode")
TABLE = "table.jsonl"
SYNC_FPS = 25  # frames a second in which SyncNet counts
TOO_SLOW = "frame rate too low"
NOT_ONE_FACE = ("no face", "several faces", "partial face")  # causes for which clips are divided
SPARE_LINES = 10_000  # that no longer count, beyond as many as do: then the table is written anew during a run

Work = Mapping[str, str]
"""Stages to run in one go, in order: name to the digest of what they run with, which the row then has in `done`."""


class Drop(Exception):
    """A stage's judgement that a video or clip cannot be used: a cause in two or three words, and the detail."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class PrepareError(ValueError):
    """Arguments or files that the pipeline cannot work with at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A clip, or a video that has not become clips. None means not measured.

    Attributes:
        id: of the source's content, and of the span in milliseconds.
        source: path below RAW_DIR. identity: of the content, the first part of id, so that a file keeps its clips and
            verdicts under another name. changed: size and time of change in ns, while which the identity holds.
        start, end: seconds in the source.
        width, height, fps: of the source, as decoded.
        repeated: share of the source's pictures that show the same as the one before.
        decision: keep or drop. stage, cause, detail: where and why it was dropped.
        face_box: around the face in all pictures looked at; box: what is cut out; left, top, right, bottom in pixels
            of the source. scale: what `box` was to be, in longer sides of `face_box`; it may be less at the edge.
        looks: when the face was looked for, and its box: seconds in the source, left, top, right, bottom. Empty where
            the clip failed at that; None there in tables from before clips were divided.
        face_time: seconds in the source of the surest face; keypoints: its eyes, nose and mouth corners, x and y in
            source pixels.
        eyes_box, mouth_box: where eyes and mouth ever were, in parts of `box`.
        quality: HyperIQA, 0 to 100. sync_confidence, sync_distance: SyncNet's.
        sync_offset: frames at 25 fps by which the picture comes later than the sound in the source; in preview and
            sample the sound is moved by it.
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
    repeated: float | None = None
    face_box: list[float] | None = None
    box: list[float] | None = None
    scale: float | None = None
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

    def finish(self, work: Work) -> Row:
        """The row after these stages (name to digest), or those up to the one that it failed at."""
        stages = list(work)
        if self.failure is not None and self.failure[0] in stages:
            stages = stages[: stages.index(self.failure[0]) + 1]
        return replace(self, done={**self.done, **{stage: work[stage] for stage in stages}})

    @property
    def seconds(self) -> float:
        return (self.end or 0.0) - (self.start or 0.0)

    @property
    def delay(self) -> float:
        """Seconds by which the picture comes later than the sound; 0 where that was not measured."""
        return (self.sync_offset or 0) / SYNC_FPS

    def repeated_at(self, fps: float) -> float:
        """Share of pictures that repeat the one before at this rate: the source's own, and those that it lacks."""
        if self.fps is None or self.repeated is None:
            return 0.0
        return 1 - min(1.0, self.fps * (1 - self.repeated) / fps)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Raises ValueError for what is no row, TypeError where something is missing."""
        for name, value in values.items():
            right = _are_looks(value) if name == "looks" else name not in _KINDS or fits(value, _KINDS[name])
            if not right:
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


def _are_looks(value: Any) -> bool:
    """What `fits` says of `looks`, which are most of a row, in a tenth of its time."""
    if value is None:
        return True
    if not isinstance(value, list) or not all(isinstance(look, list) for look in value):
        return False
    numbers = [side for look in value for side in look]
    return {int, float}.issuperset(map(type, numbers)) and all(-(2**53) <= side <= 2**53 for side in numbers)


_NAMES = tuple(item.name for item in fields(Row))
_KINDS = get_type_hints(Row)
_ROW = b'{"id": "'  # how a line begins, so that no other file is taken for a table
_LENGTHS = {"changed": 2, "face_box": 4, "box": 4, "keypoints": 10, "eyes_box": 4, "mouth_box": 4, "failure": 3}
# What each stage fills in, cleared when it runs again.
MEASURED = {
    "faces": ("face_box", "box", "scale", "looks", "face_time", "keypoints", "eyes_box", "mouth_box"),
    "quality": ("quality",),
    "sync": ("sync_confidence", "sync_distance", "sync_offset"),
    "encode": ("key",),
}


def failed(row: Row, stage: str, error: Exception) -> Row:
    """The row after a stage raised a Drop, which is a judgement, or anything else, which is said in the log."""
    if isinstance(error, Drop):
        return row.fail(stage, error.cause, error.detail)
    traceback.print_exception(error)
    return row.fail(stage, "error", f"{type(error).__name__}: {error}"[:500], error=True)


def decide(row: Row, settings: Settings) -> Row:
    """The row with its decision: what makes a clip impossible comes first, then the reviewer, then the thresholds."""
    stage = cause = detail = ""
    if row.failure is not None and row.failure[0] not in ("quality", "sync"):
        stage, cause, detail = row.failure
    elif row.verdict == "drop":
        stage, cause, detail = "review", "reviewer", "dropped by hand"
    elif row.verdict == "keep":
        pass
    elif missed := _missed(row, settings):
        stage, cause, detail = missed
    elif row.failure is not None:
        stage, cause, detail = row.failure
    return replace(row, decision="drop" if stage else "keep", stage=stage, cause=cause, detail=detail)


def _missed(row: Row, settings: Settings) -> tuple[str, str, str] | None:
    """Stage, cause and detail of the first threshold that a row does not reach, in the order of the stages."""
    if row.fps is not None and row.fps < settings.min_fps:
        return "scenes", TOO_SLOW, too_slow(row.fps, settings)
    if (share := row.repeated_at(settings.fps)) > settings.max_repeated:
        said = f"{100 * share:.0f}% at {settings.fps:g} fps, more than --max-repeated {settings.max_repeated:g}"
        return "scenes", "repeated pictures", said
    if row.face_box is not None and row.box is not None and row.box[2] - row.box[0] < settings.min_face:
        said = f"a square of {row.box[2] - row.box[0]:.0f} pixels, less than --min-face {settings.min_face:g}"
        return "faces", "small face", said
    if row.quality is not None and row.quality < settings.min_quality:
        return "quality", "low quality", f"HyperIQA {row.quality:.1f}, below {settings.min_quality:g}"
    if row.sync_confidence is not None and row.sync_confidence < settings.min_confidence:
        said = f"SyncNet confidence {row.sync_confidence:.2f}, below {settings.min_confidence:g}"
        return "sync", "out of sync", said
    if row.sync_offset is not None and abs(row.sync_offset) > settings.max_offset:
        said = f"sound and picture {abs(row.sync_offset)} frames apart, more than --max-offset {settings.max_offset}"
        return "sync", "large offset", said
    return None


def too_slow(fps: float, settings: Settings) -> str:
    """Why a video of this rate is dropped, and what takes it."""
    said = f"{fps:g} fps, less than --min-fps {settings.min_fps:g}"
    if fps < settings.fps:
        said += f": at {settings.fps:g} fps {100 * (1 - fps / settings.fps):.0f}% of pictures would be repeated"
    return said


class Table:
    """All rows, by id, in a JSON Lines file that is appended to: the last line of an id counts, {"removed": id} takes
    it out. `save` writes it anew, a line for each row in the order of sources. In memory there is only where each lies.

    Attributes:
        rows: of the file, read when they are asked for.

    Raises:
        PrepareError: the file holds a line that is no row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: Mapping[str, Row] = _Rows(self)
        self._places: dict[str, int] = {}  # where the line begins
        self._end = self._lines = 0  # bytes and lines of the file
        self._changed, self._next_sync = not os.path.lexists(path), 0.0
        self._reader: BinaryIO | None = None
        self._writer: BinaryIO | None = None
        if not self._changed:
            try:
                with open_regular(path) as file:
                    self._scan(file)
            except OSError as error:
                raise PrepareError(f"{path} cannot be read: {error}") from error

    def _scan(self, file: BinaryIO) -> None:
        for number, line in enumerate(file, 1):
            try:
                values = parse_json(line)
                if isinstance(gone := values.get("removed"), str) and len(values) == 1:
                    self._places.pop(gone, None)
                    self._changed = True
                else:
                    self._place(Row.from_json(values).id)
            except (ValueError, TypeError) as error:
                if not line.endswith(b"\n") and (number > 1 or _ROW.startswith(line[: len(_ROW)])):
                    self._changed = True
                    return  # a run was killed while it wrote this; it is written over
                raise PrepareError(
                    f"{self.path}, line {number} is not a row: {error}. Repair or delete the file"
                ) from error
            self._end += len(line)
            self._lines += 1

    def _place(self, id: str) -> None:
        """The line that begins at the file's end is this row's."""
        self._changed |= id in self._places
        self._places[id] = self._end

    def put(self, rows: Iterable[Row]) -> None:
        """Appends the rows that differ from what is there."""
        for row in rows:
            line = json.dumps(row.to_json()).encode("ascii") + b"\n"
            if row.id not in self._places or self._line(row.id) != line:
                self._append(line, row.id)
        self._flush()

    def remove(self, ids: Iterable[str]) -> None:
        """Takes rows out."""
        for id in list(ids):
            if id in self._places:
                del self._places[id]
                self._append(json.dumps({"removed": id}).encode("ascii") + b"\n")
        self._flush()

    def _append(self, line: bytes, id: str | None = None) -> None:
        if self._writer is None:
            self._writer = open(self.path, "r+b" if os.path.exists(self.path) else "w+b")  # noqa: SIM115 -- see close
            self._writer.truncate(self._end)
            self._writer.seek(0, os.SEEK_END)
            if self._end and not self._ends_well():
                self._end += self._writer.write(b"\n")
        if id is not None:
            self._place(id)
        self._end += self._writer.write(line)
        self._lines += 1
        self._changed = True

    def _ends_well(self) -> bool:
        """Whether the last line is whole; the writer is at the end again after that."""
        self._writer.seek(-1, os.SEEK_END)
        return self._writer.read(1) == b"\n"

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _line(self, id: str) -> bytes:
        if self._reader is None:
            self._reader = open_regular(self.path)
        self._flush()
        self._reader.seek(self._places[id])
        return self._reader.readline()

    def save(self, now: bool = True) -> None:
        """Writes the file anew where it has changed; with `now=False` only makes sure of what was appended, every few
        seconds, and writes anew when most of the file no longer counts.
        """
        if now or self._lines > 2 * len(self._places) + SPARE_LINES:
            if self._changed:
                self._compact()
        elif self._writer is not None and time.monotonic() >= self._next_sync:
            os.fsync(self._writer.fileno())
            self._next_sync = time.monotonic() + 5.0

    def _compact(self) -> None:
        order = sorted((row.source, row.start or 0.0, row.id) for row in self.rows.values())
        places, end = {}, 0
        with replace_whole(self.path) as temporary:
            with open(temporary, "wb") as file:
                for _, _, id in order:
                    places[id] = end
                    end += file.write(self._line(id).rstrip(b"\n") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self.close()
        self._places, self._end, self._lines, self._changed = places, end, len(places), False

    def close(self) -> None:
        """Lets go of the file; what is read or put next opens it again."""
        for file in (self._reader, self._writer):
            if file is not None:
                file.close()
        self._reader = self._writer = None


class _Rows(Mapping[str, Row]):
    """The rows of a table. What is put into it or removed meanwhile does not disturb who goes through it."""

    def __init__(self, table: Table):
        self._table = table

    def __getitem__(self, id: str) -> Row:
        if id not in self._table._places:
            raise KeyError(id)
        values = json.loads(self._table._line(id))  # it was looked at when the file was opened
        return Row(**{name: value for name, value in values.items() if name in _KINDS})

    def __iter__(self) -> Iterator[str]:
        return (id for id in list(self._table._places) if id in self._table._places)

    def __len__(self) -> int:
        return len(self._table._places)

    def __contains__(self, id: object) -> bool:
        return id in self._table._places
