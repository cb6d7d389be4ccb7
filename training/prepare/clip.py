"""What is measured on a clip once its square is known, and its encoding: all from one pass over its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import media
from . import preview
from .rows import Drop, Row, Work, decide, failed
from .settings import Settings


class Reader(Protocol):
    """What a stage takes from a clip's pictures, and makes of it."""

    def push(self, time: float, picture: NDArray[np.uint8]) -> None:
        """Takes the next picture [H, W, 3] of the source, shown at `time` seconds."""

    def end(self) -> None:
        """There are no more. Raises Drop where they end too early."""

    def finish(self, row: Row) -> Row:
        """The row with what was measured."""


def read(row: Row, settings: Settings, readers: Iterable[Reader], after: Callable[[], None] = lambda: None) -> None:
    """Decodes a clip once, for all readers, which `after`, called after each picture, may change."""
    path = Path(settings.raw, row.source)
    for time, picture in media.pictures(path, row.start, row.end, settings.max_pixels):
        for reader in readers:
            reader.push(time, picture)
        after()
    for reader in readers:
        reader.end()


def alone(row: Row, settings: Settings, reader: Reader) -> list[Row]:
    """A stage by itself."""
    read(row, settings, [reader])
    return [reader.finish(row)]


def sample_key(row: Row, digest: str) -> str:
    """Name of a clip's sample in the shards: of the clip, of what encodes it, and of how far the sound is moved."""
    moved = f"-sound{row.sync_offset:+d}" if row.sync_offset else ""
    return f"{row.id}-{digest[:8]}{moved}"


def measure(row: Row, work: Work, settings: Settings, begin: Callable[[str], None]) -> list[Row]:
    """The clip after the stages of `work` (quality, sync, encode: name to digest), up to the one that drops it. Writes
    its preview where scores are new or there is none.

    The first picture is judged as soon as it is read, and the rest of a bad clip is read for its preview alone.
    Pictures for the encoder wait until SyncNet has judged.
    """
    return [_Clip(row, work, settings, begin).measured()]


class _Clip:
    def __init__(self, row: Row, work: Work, settings: Settings, begin: Callable[[str], None]) -> None:
        self.row, self.work, self.settings, self.begin = row, work, settings, begin
        self.waiting = list(work)  # stages that have not judged
        self.stages = {stage: _reader(stage, self._named(stage), settings, at_once=len(work) == 1) for stage in work}
        self.readers: list[Reader] = list(self.stages.values())

    def _named(self, stage: str) -> Row:
        """The row, with its sample's key where that is what is to be made. SyncNet's offset changes it."""
        return replace(self.row, key=sample_key(self.row, self.work[stage])) if stage == "encode" else self.row

    def measured(self) -> Row:
        shown = all(path.is_file() for path in preview.files(Path(self.settings.out), self.row.id))
        new = not shown or set(self.work) != {"encode"} or bool(self.row.sync_offset)
        with preview.Preview(self.row, self.settings) if new else nullcontext() as shows:
            if shows is not None:
                self.readers.append(shows)
            if self.waiting:
                self.begin(self.waiting[0])
            try:
                if new or not self.stages["encode"].is_there:
                    read(self.row, self.settings, self.readers, self._judge_first_picture)
                while self.waiting:
                    self._judge()
                if shows is not None:
                    shows.finish(self.row)
            except Exception as error:
                # A picture or sound that cannot be read is what the clip was to be cut out of.
                stage = "faces" if isinstance(error, Drop) or not self.waiting else self.waiting[0]
                self.row = failed(self.row, stage, error).finish(self.work)
        return self.row

    def _judge_first_picture(self) -> None:
        if self.waiting and self.waiting[0] == "quality" and self.stages["quality"].ready:
            self._judge()

    def _judge(self) -> None:
        """Finishes the next stage; the others, too, where it drops the clip."""
        stage = self.waiting[0]
        self.begin(stage)
        try:
            row = self.stages[stage].finish(self._named(stage))
        except Exception as error:
            row = failed(self.row, stage, error)
        self.row = row.finish({stage: self.work[stage]})
        over = self.waiting if decide(self.row, self.settings).decision == "drop" else [stage]
        self.readers[:] = [reader for reader in self.readers if reader not in [self.stages[name] for name in over]]
        self.waiting = self.waiting[len(over) :]


def _reader(stage: str, row: Row, settings: Settings, at_once: bool) -> Any:
    # Not above: each of them brings its own network's packages, and reads clips by itself, too.
    if stage == "quality":
        from .quality import FirstPicture

        return FirstPicture(row, settings)
    if stage == "sync":
        from .sync import Lips

        return Lips(row, settings)
    from .encode import Encoder

    return Encoder(row, settings, at_once)
