"""The stages in order, on what is new; then the table, the page, the picture."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from . import preview
from .clip import sample_key
from .engines import Engine
from .rows import MEASURED, NOT_ONE_FACE, STAGES, TABLE, TOO_SLOW, PrepareError, Row, Table, decide
from .settings import Settings
from .videos import find_videos

PICTURE = "funnel.png"
LOCK = "running.pid"


def prepare(
    settings: Settings, engine: Engine, verdicts: Path | None = None, retry: bool = False, prune: bool = False
) -> Table:
    """Runs all stages on what is new; returns the table, which is also written, as are page, picture and shards.

    Args:
        verdicts: a file of verdicts that adds to those there are; None looks for OUT_DIR/verdicts.json and .csv, which
            the page saves and which hold all of them.
        retry: also runs rows whose failure was a crash, an exception or a time limit.
        prune: takes out the clips of videos that are gone.

    Raises:
        PrepareError: another run works in OUT_DIR; a file there cannot be read.
    """
    with _locked(Path(settings.out)):
        return _prepare(settings, engine, verdicts, retry, prune)


def _prepare(settings: Settings, engine: Engine, verdicts: Path | None, retry: bool, prune: bool) -> Table:
    from . import picture, review

    out = Path(settings.out)
    table = Table(out / TABLE)
    judged = review.read_verdicts(out)
    if verdicts is not None:
        before = {row.id: row.verdict for row in table.rows.values() if row.verdict} if judged is None else judged
        judged = before | review.read_verdicts(out, verdicts)
        review.save_verdicts(out, judged)  # so that the next run, without the file, finds the same
    run = _Run(settings, engine, table, retry)
    try:
        run.scenes()
        if prune:
            run.prune()
        if judged is not None:
            run.judge(judged)
        run.faces()
        run.clips()
        run.decide()
        if run.packer is not None:
            review.write_page(out, table.rows, settings)  # to be judged while the rest is encoded
            run.encode()
    finally:
        if run.packer is not None:
            run.packer.close()
        run.decide()
        table.save()
    review.write_page(out, table.rows, settings)
    found = picture.Funnel(table.rows.values())
    picture.draw_funnel(found, settings).save(out / PICTURE)
    print(picture.describe_funnel(found, settings))
    gone = [row.source for row in run.gone() if row.decision == "keep"]
    if gone:
        print(f"{len(gone)} clips of {len(set(gone))} sources that are gone; --prune takes them out")
    print(f"all clips: {table.path}\nreview: {out / review.PAGE}\npicture: {out / PICTURE}")
    return table


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps a second run out of OUT_DIR by a file with this process's number, which a killed run leaves behind."""
    path, own = out / LOCK, f"{os.getpid()} {platform.node()}"
    for _ in range(10):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(own)
            break
        except FileExistsError:
            pass
        try:
            pid, _, node = path.read_text("utf-8").partition(" ")
        except FileNotFoundError:
            continue
        if not pid.isdigit() or (node == platform.node() and not _is_running(int(pid))):
            path.unlink(missing_ok=True)
            continue
        where = "" if node == platform.node() else f" on {node}"
        raise PrepareError(f"another run (pid {pid}{where}) works here. If there is none, delete {path}")
    else:
        raise PrepareError(f"cannot make {path}, which is made and deleted by others again and again")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process of the same number, as in a container
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


class _Run:
    """One run over a table: which rows each stage is due for, and what becomes of them. Rows are read when they are
    worked on; lists are of their ids.
    """

    def __init__(self, settings: Settings, engine: Engine, table: Table, retry: bool):
        self.settings, self.engine, self.table, self.retry = settings, engine, table, retry
        self.digests = settings.digests()
        self.present: set[str] = set()  # sources that are there
        self.packer = None
        if "encode" not in settings.skip:
            from .encode import Packer

            self.packer = Packer(settings)

    def scenes(self) -> None:
        rows = self.table.rows
        known: dict[str, list[str]] = {}
        for row in rows.values():
            known.setdefault(row.identity, []).append(row.id)
        new, again = [], {}
        for video in find_videos(Path(self.settings.raw), Path(self.settings.out), rows.values()):
            self.present.add(video.source)
            ids = known.pop(video.identity, [])
            clips = [replace(rows[id], source=video.source, changed=video.changed) for id in ids]
            self.table.put(clips)  # it may have been moved
            if clips and all(self._is_done(row, "scenes") for row in clips):
                continue
            if video.failure is not None:
                self._put([video.finish({"scenes": self.digests["scenes"]})])
            else:
                new.append(video)
                again[video.id] = ids
        for ids in known.values():  # those whose file holds something else now
            self.table.remove(id for id in ids if rows[id].source in self.present)
        for id, clips in self._results(("scenes", "faces"), new, len(new)):
            old = again.pop(id)
            verdicts = {id: rows[id].verdict for id in old}
            self.table.remove(set(old) - {clip.id for clip in clips})
            self._put([replace(clip, verdict=verdicts.get(clip.id, "")) for clip in clips])

    def gone(self) -> Iterator[Row]:
        """Rows whose source is not there any more; they stay, with their samples, until they are pruned."""
        return (row for row in self.table.rows.values() if row.source not in self.present)

    def prune(self) -> None:
        self._forget([row.id for row in self.gone()])

    def _forget(self, ids: list[str]) -> None:
        self.table.remove(ids)
        for id in ids:
            for path in preview.files(Path(self.settings.out), id):
                path.unlink(missing_ok=True)

    def judge(self, verdicts: dict[str, str]) -> None:
        """Gives all rows their verdicts, or none."""
        for row in self.table.rows.values():
            if row.verdict != verdicts.get(row.id, ""):
                self.table.put([replace(row, verdict=verdicts.get(row.id, ""))])
        unknown = sum(bool(verdict) and id not in self.table.rows for id, verdict in verdicts.items())
        print(
            f"{sum(map(bool, verdicts.values())) - unknown} verdicts read"
            + (f", {unknown} of clips that are not here" if unknown else "")
        )

    def faces(self) -> None:
        """Looks for faces again in clips that were cut before with other settings."""
        due = [row.id for row in self.table.rows.values() if self._is_due(row, "faces")]
        for id, rows in self._results(("faces",), self._before("faces", due), len(due)):
            if id not in [row.id for row in rows]:
                self._forget([id])  # it was divided
            self._put(rows)

    def clips(self) -> None:
        """Measures what is not measured, and encodes what is found good on the way."""
        stages = [stage for stage in STAGES[2:] if stage not in self.settings.skip]
        encoded = set() if self.packer is None else {key.partition("-sound")[0] for key in self.packer.keys}
        due: dict[tuple[str, ...], list[str]] = {}
        for row in self.table.rows.values():
            missing = [stage for stage in stages if not self._is_done(row, stage)]
            work = tuple(stages[stages.index(missing[0]) :]) if missing else ()
            if work[-1:] == ("encode",) and sample_key(row, self.digests["encode"]).partition("-sound")[0] in encoded:
                work = work[:-1]  # it is encoded, unless its sound is found to lie elsewhere
            if work == ("encode",):
                continue  # below, when it is known what else is kept
            if self._is_due(row, work[0] if work else None):
                due.setdefault(work, []).append(row.id)
        for work, ids in due.items():
            for _, rows in self._results(work, self._before(work[0] if work else None, ids), len(ids)):
                self._put([self._packed(row) if "encode" in work else row for row in rows])

    def encode(self) -> None:
        """Encodes what is kept and is not in the shards, and takes out what is not kept."""
        wanted, due, lost = set(), [], {}
        for row in self.table.rows.values():
            old, decided = row.key, self._decided(row)
            lost[old] = (decided.cause if decided.decision == "drop" else "encoded again", row.seconds)
            key = sample_key(row, self.digests["encode"]) if row.source in self.present else row.key
            if not self._is_done(row, "encode") or row.key != key:
                row = _without(row, "encode")
            if row.start is None or self._decided(row).decision != "keep":
                continue
            wanted.add(key)
            if key in self.packer.keys:
                self._put([replace(row, key=key).finish({"encode": self.digests["encode"]})])
            elif row.source in self.present:
                due.append(row.id)
        if gone := self.packer.keys - wanted:
            print(_describe_lost([lost.get(key, ("no clip any more", 0.0)) for key in gone]))
        self.packer.keep(wanted)
        for _, rows in self._results(("encode",), self._before("encode", due), len(due)):
            self._put([self._packed(row) for row in rows])
        self.packer.close()

    def _packed(self, row: Row) -> Row:
        encoded = row.failure is None and row.done.get("encode") == self.digests["encode"]
        return self.packer.add(row) if encoded else row

    def decide(self) -> None:
        for row in self.table.rows.values():
            skipped = [s for s in self.settings.skip if s in ("scenes", "faces") or s not in row.done]
            self.table.put([replace(self._decided(row), skipped=skipped)])

    def _decided(self, row: Row) -> Row:
        return decide(row, self.settings)

    def _is_done(self, row: Row, stage: str) -> bool:
        failed_here = row.failure is not None and row.failure[0] == stage
        if failed_here and row.failure[1] == TOO_SLOW and (row.fps or 0) >= self.settings.min_fps:
            return False  # it was not read, and would be now
        if failed_here and stage == "faces" and row.failure[1] in NOT_ONE_FACE and row.looks is None:
            return False  # before clips were divided
        return row.done.get(stage) == self.digests[stage] and not (self.retry and row.error and failed_here)

    def _is_due(self, row: Row, stage: str | None) -> bool:
        """Whether a clip that would not be dropped lacks a stage, or without one its preview."""
        if row.source not in self.present or row.start is None:
            return False
        if stage is None:
            shown = all(path.is_file() for path in preview.files(Path(self.settings.out), row.id))
            return not shown and row.box is not None and self._decided(row).decision == "keep"
        return not self._is_done(row, stage) and self._decided(_without(row, stage)).decision == "keep"

    def _before(self, stage: str | None, ids: Iterable[str]) -> Iterator[Row]:
        return (self.table.rows[id] if stage is None else _without(self.table.rows[id], stage) for id in ids)

    def _results(self, stages: Iterable[str], rows: Iterable[Row], count: int) -> Iterator[tuple[str, list[Row]]]:
        if not count:
            return
        work = {stage: self.digests[stage] for stage in stages}
        title = ", ".join(work) or "previews"
        for id, results in tqdm(self.engine(work, rows, self.settings), title, count, file=sys.stderr):
            yield id, results
            self.table.save(now=False)

    def _put(self, rows: Iterable[Row]) -> None:
        self.table.put(map(self._decided, rows))


def _describe_lost(samples: list[tuple[str, float]]) -> str:
    """What the shards lose: cause and seconds of each sample."""

    def amount(seconds: list[float]) -> str:
        return f"{len(seconds)} ({sum(seconds) / 3600:.2f} h)"

    causes = [f"{amount([s for c, s in samples if c == cause])} {cause}" for cause in sorted({c for c, _ in samples})]
    return f"samples taken out of the shards: {amount([s for _, s in samples])}: {', '.join(causes)}"


def _without(row: Row, stage: str) -> Row:
    """The row as it was before `stage` ran."""
    later = STAGES[STAGES.index(stage) :]
    cleared = {name: "" if name == "key" else None for s in later for name in MEASURED.get(s, ())}
    failed = row.failure is not None and row.failure[0] in later
    return replace(
        row,
        **cleared,
        done={name: digest for name, digest in row.done.items() if name not in later},
        failure=None if failed else row.failure,
        error=row.error and not failed,
    )
