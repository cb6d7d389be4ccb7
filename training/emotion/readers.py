"""From folders and lists of recordings to labelled clips."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from memo_core.files import replace_whole
from memo_core.release import EMOTIONS

from .labels import PLAIN, LabelError, LabelTable, published

AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".webm", ".mp4", ".avi"))
SPLITS = ("", "train", "test")
_TAG_COLUMNS = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
_MOOD = "mood/theme---"


@dataclass(frozen=True)
class Clip:
    """One labelled recording.

    Attributes:
        path: absolute path of the sound.
        dataset: key of its label table.
        label: the data set's own label.
        emotion: the class, an index from 0 to 7 into `memo_core.release.EMOTIONS`.
        speaker: as the data set names it, of music the artist; "" where unknown.
        split: "train" or "test" where the list says so, else "".
        name: path below the folder of the data set or of the list, which stays when the folder moves.
    """

    path: str
    dataset: str
    label: str
    emotion: int
    speaker: str = ""
    split: str = ""
    name: str = ""


@dataclass(frozen=True)
class Rejected:
    """A recording or line that was left out, and why."""

    path: str
    dataset: str
    reason: str


@dataclass
class Found:
    """What a reader found. `dropped` counts, by (data set, label), recordings whose label the tables drop."""

    clips: list[Clip] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, path: str, table: LabelTable, text: str, speaker: str = "", split: str = "", name: str = "") -> None:
        """Files one recording under clips, dropped or rejected."""
        try:
            label, emotion = table.original(text), table.emotion(text)
        except LabelError as error:
            self.rejected.append(Rejected(path, table.key, str(error)))
            return
        if emotion is None:
            self.dropped[table.key, label] += 1
        else:
            self.clips.append(Clip(path, table.key, label, emotion, speaker, split, name))

    def extend(self, other: Found) -> None:
        self.clips += other.clips
        self.rejected += other.rejected
        self.dropped += other.dropped

    def summary(self) -> str:
        """A table: per data set its clips, speakers, clips per class, and what was left out."""
        names = sorted(
            {c.dataset for c in self.clips} | {r.dataset for r in self.rejected} | {d for d, _ in self.dropped}
        )
        rows = []
        for name in names:
            clips = [clip for clip in self.clips if clip.dataset == name]
            classes = Counter(clip.emotion for clip in clips)
            rows.append(
                [
                    name,
                    len(clips),
                    len({clip.speaker for clip in clips if clip.speaker}),
                    *(classes[i] for i in range(8)),
                    sum(count for (dataset, _), count in self.dropped.items() if dataset == name),
                    sum(row.dataset == name for row in self.rejected),
                ]
            )
        return text_table(["data set", "clips", "speakers", *EMOTIONS[:8], "dropped", "rejected"], rows)


def read_folder(folder: str | Path, table: LabelTable) -> Found:
    """Reads a data set from its files' names, in their published form, or from its published list of tags.

    Every audio file below `folder`, in order of its path; others and hidden ones are passed over. A name that does not
    have the form, or a label that the table lacks, is a rejected row.

    Raises LabelError for a set whose names carry no labels, and FileNotFoundError for a folder that is none.
    """
    folder = Path(folder)
    if table.pattern is None and not table.tags:
        raise LabelError(f"{table.key} keeps its labels in tables of its own, not in file names; list it in a --csv")
    if not folder.is_dir():
        raise FileNotFoundError(f"{table.key}: {folder} is not a folder")
    if table.pattern is None:
        return _read_tags(folder.absolute(), table)
    found = Found()
    for path in _audio_files(folder.absolute()):
        match = table.pattern.search(path.with_suffix("").as_posix())
        if match is None:
            form = f", which look like {table.example[0]}" if table.example else ""
            found.rejected.append(Rejected(str(path), table.key, f"not named like this set's recordings{form}"))
        else:
            speaker, name = match.groupdict().get("speaker") or "", path.relative_to(folder.absolute()).as_posix()
            found.add(str(path), table, match["label"], speaker, name=name)
    return found


def _read_tags(folder: Path, table: LabelTable) -> Found:
    """Reads the list of a set of music, in MTG-Jamendo's form: see `datasets.yaml`.

    Tags are written as "mood/theme---happy"; those of other kinds are passed over. A recording's label is
    `LabelTable.leading`, its speaker the artist. Sound lies at PATH below the folder, or at PATH with the suffix
    .low.mp3, the published smaller files.
    """
    path = folder / table.tags
    found = Found()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if next(lines, [])[:6] != _TAG_COLUMNS:
                raise LabelError(f"{path} does not begin with the columns {', '.join(_TAG_COLUMNS)}")
            for number, line in enumerate(lines, 2):
                if len(line) < len(_TAG_COLUMNS):
                    found.rejected.append(Rejected("", table.key, f"line {number} of {path} names no file and tag"))
                else:
                    tags = [tag.removeprefix(_MOOD) for tag in line[5:] if tag.startswith(_MOOD)]
                    _add_tagged(found, table, folder, line[3], line[1], tags)
    except FileNotFoundError as error:
        raise LabelError(f"{table.key} is read from its list of tags: copy it from {table.url} to {path}") from error
    except (OSError, UnicodeError, csv.Error) as error:
        raise LabelError(f"{path} cannot be read: {error}") from error
    return found


def _add_tagged(found: Found, table: LabelTable, folder: Path, name: str, artist: str, tags: list[str]) -> None:
    places = [folder / name, (folder / name).with_suffix(".low.mp3")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        found.rejected.append(Rejected(str(places[0]), table.key, "not in the folder"))
        return
    try:
        label = table.leading(tags)
    except LabelError as error:
        found.rejected.append(Rejected(str(path), table.key, str(error)))
        return
    if label is None:
        found.dropped[table.key, "tags of several emotions"] += 1
    else:
        found.add(str(path), table, label, artist, name=name)


def read_csv(path: str | Path, tables: Mapping[str, LabelTable] | None = None) -> Found:
    """Reads a list of recordings: columns path and label, and perhaps split (train or test), speaker, dataset.

    Paths are relative to the list's folder. The label is one of the data set's own where `dataset` names a table
    (default: `published()`); without one it is a class. A bad line is a rejected row.

    Raises LabelError for a list that cannot be read or has no such columns.
    """
    path = Path(path)
    tables = published() if tables is None else tables
    found = Found()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            missing = {"path", "label"} - set(lines.fieldnames or ())
            if missing:
                raise LabelError(f"{path} has no column {' and '.join(sorted(missing))}; it has {lines.fieldnames}")
            for number, line in enumerate(lines, 2):
                line = {key: (value or "").strip() for key, value in line.items() if isinstance(value, str | None)}
                where, name, split = line["path"], line.get("dataset", ""), line.get("split", "").lower()
                if not where:
                    found.rejected.append(Rejected("", name or PLAIN.key, f"line {number} of {path} names no file"))
                elif name and name not in tables:
                    found.rejected.append(Rejected(where, name, f"no label table is called {name!r}"))
                elif split not in SPLITS:
                    found.rejected.append(Rejected(where, name or PLAIN.key, f"split {split!r}; allowed: train, test"))
                else:
                    table = tables[name] if name else PLAIN
                    file_path = os.path.abspath(path.parent / where)
                    short = Path(os.path.relpath(file_path, path.parent.absolute())).as_posix()
                    found.add(file_path, table, line["label"], line.get("speaker", ""), split, short)
    except (OSError, UnicodeError, csv.Error) as error:
        raise LabelError(f"{path} cannot be read: {error}") from error
    return found


def without_repeats(found: Found) -> Found:
    """The same, where a file listed twice is a clip once; the second is a rejected row."""
    result = Found(rejected=list(found.rejected), dropped=found.dropped.copy())
    seen: set[str] = set()
    for clip in found.clips:
        if clip.path in seen:
            result.rejected.append(Rejected(clip.path, clip.dataset, "listed twice"))
        else:
            seen.add(clip.path)
            result.clips.append(clip)
    return result


def write_rows(path: str | Path, kind: type[Clip] | type[Rejected], rows: Iterable[Clip | Rejected]) -> None:
    """Writes clips or rejected rows as CSV, whole or not at all."""
    path = Path(path)
    with (
        replace_whole(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.DictWriter(file, [item.name for item in fields(kind)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_clips(path: str | Path) -> list[Clip]:
    """What `write_rows` wrote of clips. LabelError for anything else."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            clips = [Clip(**{**line, "emotion": int(line["emotion"])}) for line in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise LabelError(f"{path} is absent; run `python -m training emotion prepare` first") from error
    except (OSError, UnicodeError, csv.Error, TypeError, KeyError, ValueError) as error:
        raise LabelError(f"{path} is not a list of clips: {error}") from error
    if any(not 0 <= clip.emotion < 8 or clip.split not in SPLITS for clip in clips):
        raise LabelError(f"{path} holds an emotion beyond 0 to 7, or a split that is neither train nor test")
    return clips


def text_table(heads: list[str], rows: list[list[object]]) -> str:
    """Aligned columns, the first to the left."""
    cells = [heads, *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    )


def _audio_files(folder: Path) -> Iterable[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES:
                yield Path(root, name)
