"""Label tables: each data set's own labels and the eight classes they are merged into (MEMO appendix A, table 2)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from memo_core.errors import MemoError
from memo_core.release import EMOTIONS

CLASSES = EMOTIONS[:8]  # angry to surprised; the head's ninth class, unknown, is never a target
OTHER = "other"
DROP = "drop"
TABLES = Path(__file__).with_name("datasets.yaml")


class LabelError(MemoError):
    """A label table that cannot be read, or a data set or label that none has."""


@dataclass(frozen=True)
class LabelTable:
    """One data set.

    Attributes:
        key: its name in `datasets.yaml` and on the command line.
        name, language, licence, url: for people; the licence is "" where none is known.
        labels: original label -> one of CLASSES, or DROP.
        codes: what file names carry -> original label.
        pattern: for the end of a file's path without suffix, with groups `label` and perhaps `speaker`; None for a set
            whose file names carry no labels.
        example: (path, original label, speaker) as published; None without a pattern.
        tags: name of the published list of recordings and their tags, for a set that has one, else "".
        source: who speaks: "Act", "TV", "Talk show" or "Media", as in the paper's table 2.
        emotions, utterances, hours: as counted there; 0 where not known.
        accuracy: (emotion2vec with a linear layer, MEMO's detector) on the set's test clips, in percent, from the
            paper's figure 12; None for a set that is not in the paper.
        extra: True for a set that is not in the paper.
    """

    key: str
    name: str
    language: str
    licence: str
    url: str
    labels: Mapping[str, str]
    codes: Mapping[str, str] = field(default_factory=dict)
    pattern: re.Pattern[str] | None = None
    example: tuple[str, str, str] | None = None
    tags: str = ""
    source: str = ""
    emotions: int = 0
    utterances: int = 0
    hours: float = 0.0
    accuracy: tuple[float, float] | None = None
    extra: bool = False

    def original(self, text: str) -> str:
        """The label that `text`, a label or a code in any case, stands for. LabelError if none."""
        wanted = _plain(text)
        for code, label in self.codes.items():
            if _plain(code) == wanted:
                return label
        for label in self.labels:
            if _plain(label) == wanted:
                return label
        raise LabelError(f"{self.key} has no label {text!r}; it has {', '.join([*self.labels, *self.codes])}")

    def emotion(self, text: str) -> int | None:
        """The class (index into EMOTIONS) of a label or code, None where it is to be dropped. LabelError if unknown."""
        name = self.labels[self.original(text)]
        return None if name == DROP else EMOTIONS.index(name)

    def leading(self, tags: Sequence[str]) -> str | None:
        """That of a recording's tags which stands for its emotion: the first whose class is not other.

        Beside it tags of the class other say nothing; alone they are the recording's label. None where tags name two
        different emotions. LabelError for an unknown tag, or none.
        """
        if not tags:
            raise LabelError(f"{self.key}: a recording without tags")
        named = {self.labels[label]: label for label in map(self.original, reversed(tags))}
        other = named.pop(OTHER, None)
        return None if len(named) > 1 else next(iter(named.values()), other)


# For recordings of no listed set: their labels are the classes themselves.
PLAIN = LabelTable("plain", "labels are the classes", "", "", "", {name: name for name in CLASSES})


def load_tables(path: str | Path) -> dict[str, LabelTable]:
    """Reads label tables of the form of `datasets.yaml`.

    Raises LabelError for a file that cannot be read, a label without a class, a code without a label, or a bad pattern.
    """
    import yaml

    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LabelError(f"the label tables {path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise LabelError(f"{path} is not a table of data sets")
    return {str(key): _table(str(key), value, path) for key, value in raw.items()}


@lru_cache
def published() -> dict[str, LabelTable]:
    """The tables of `datasets.yaml`, by key."""
    return load_tables(TABLES)


def _plain(text: str) -> str:
    """Without case, and an accent is one character, however a file's author typed it."""
    return unicodedata.normalize("NFC", text.strip()).casefold()


def _table(key: str, raw: Any, path: Path) -> LabelTable:
    if not isinstance(raw, dict) or not isinstance(raw.get("labels"), dict) or not raw["labels"]:
        raise LabelError(f"{path}: {key} has no labels")
    labels = {str(label): str(name) for label, name in raw["labels"].items()}
    for label, name in labels.items():
        if name not in (*CLASSES, DROP):
            raise LabelError(f"{path}: {key}'s label {label!r} is {name!r}; allowed are {', '.join(CLASSES)}, {DROP}")
    codes = {str(code): str(label) for code, label in (raw.get("codes") or {}).items()}
    for code, label in codes.items():
        if label not in labels:
            raise LabelError(f"{path}: {key}'s code {code!r} stands for {label!r}, which is not among its labels")
    pattern = None
    if raw.get("pattern"):
        try:
            pattern = re.compile(f"(?:^|/){raw['pattern']}$", re.IGNORECASE)
        except re.error as error:
            raise LabelError(f"{path}: {key}'s pattern {raw['pattern']!r} is no regular expression: {error}") from error
        if "label" not in pattern.groupindex:
            raise LabelError(f"{path}: {key}'s pattern {raw['pattern']!r} has no group named label")
    language = raw.get("language") or ""
    example, accuracy = raw.get("example"), raw.get("accuracy")
    return LabelTable(
        key,
        str(raw.get("name") or key),
        ", ".join(map(str, language)) if isinstance(language, list) else str(language),
        str(raw.get("licence") or ""),
        str(raw.get("url") or ""),
        labels,
        codes,
        pattern,
        tuple(map(str, example)) if example else None,
        str(raw.get("tags") or ""),
        str(raw.get("source") or ""),
        int(raw.get("emotions") or 0),
        int(raw.get("utterances") or 0),
        float(raw.get("hours") or 0),
        tuple(map(float, accuracy)) if accuracy else None,
        bool(raw.get("extra")),
    )
