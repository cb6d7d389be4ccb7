"""`python -m training prepare`: the stages in order, on what is new; then the table, the page, the picture."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from memo_core.inputs.portrait import check_size

from ..shards import ShardWriter
from .engines import Engine, Local, OnRay
from .rows import MEASURED, STAGES, TABLE, PrepareError, Row, Table, decide
from .settings import Settings

VIDEOS = frozenset(
    ".3gp .asf .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
PICTURE = "funnel.png"
LOCK = "running.pid"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `prepare` to `python -m training`."""
    usual = Settings(raw="", out="", models="")
    parser = commands.add_parser(
        "prepare",
        help="make training shards from talking videos",
        description="Make training shards from talking videos. Run it again after adding videos, changing thresholds "
        "or judging clips on OUT_DIR/review.html: only what is new is computed.",
    )
    parser.add_argument("raw", type=Path, metavar="RAW_DIR", help="folder with videos, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="where table, previews, page and shards are written")
    parser.add_argument(
        "--models", type=Path, default=Path("memo-weights"), help="checkpoint in the released layout, and the files of "
        "HyperIQA and SyncNet anywhere below it (%(default)s)"
    )  # fmt: skip
    parser.add_argument("--skip", nargs="+", default=[], choices=STAGES, help="leave out stages; the rows say so")
    parser.add_argument(
        "--verdicts",
        type=Path,
        help="more verdicts; those of OUT_DIR/verdicts.json or .csv, which the page saves, are always read",
    )
    parser.add_argument("--retry", action="store_true", help="run clips again that ended in a crash or time limit")

    parser.add_argument("--prune", action="store_true", help="take out clips whose video is gone")

    how = parser.add_argument_group("where it runs")
    how.add_argument("--engine", choices=("local", "ray"), default="local", help="processes, or Ray Data (%(default)s)")
    how.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes (%(default)s)")
    how.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster; without it Ray starts on this machine")
    how.add_argument("--gpus", type=float, default=0.0, help="share of a GPU that each task of Ray reserves (0)")
    how.add_argument("--device", default=usual.device, help="of HyperIQA, SyncNet and the encoders (%(default)s)")
    how.add_argument("--time-limit", type=float, default=3600.0, help="seconds for a video in a stage (%(default)g)")

    what = parser.add_argument_group("what is kept")
    for name, text in {
        "scene_threshold": "PySceneDetect's adaptive threshold, fewer cuts the higher it is",
        "min_seconds": "a shorter clip is dropped",
        "max_seconds": "a scene of this length or more is cut into equal pieces",
        "max_hours": "a longer video is refused",
        "max_pixels": "a video with larger pictures is refused",
        "min_fps": "a video with fewer pictures a second is refused",
        "detect_fps": "how often a second faces are looked for",
        "scale": "of the square that is cut out, relative to the face",
        "min_quality": "HyperIQA of the first picture, 0 to 100",
        "min_confidence": "SyncNet's confidence",
        "size": "side of the pictures that are encoded",
        "fps": "their rate",
    }.items():
        value = getattr(usual, name)
        what.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, metavar="N", help=f"{text} (%(default)g)"
        )
    what.add_argument("--scorer", default=usual.scorer, help="module:function that makes the image quality scorer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command; ends the program with a message where it cannot start."""
    try:
        settings = check(args)
        make_engine = (
            (lambda: Local(args.out.resolve(), args.jobs, args.time_limit))
            if args.engine == "local"
            else (lambda: OnRay(args.out.resolve(), args.time_limit, args.ray_address, args.gpus))
        )
        with make_engine() as engine:
            prepare(settings, engine, args.verdicts, args.retry, args.prune)
    except PrepareError as error:
        sys.exit(f"error: {error}")


def check(args: argparse.Namespace) -> Settings:
    """The settings, once all that can be known beforehand is right: folders, numbers, model files, packages, shards.

    Raises:
        PrepareError: names everything that is missing, and how to get it.
    """
    raw, out, models = (path.expanduser().resolve() for path in (args.raw, args.out, args.models))
    if not raw.is_dir():
        raise PrepareError(f"{args.raw} is not a folder; RAW_DIR holds the videos")
    if args.jobs < 1 or not args.time_limit > 0:
        raise PrepareError(f"--jobs {args.jobs}, --time-limit {args.time_limit}: at least 1 and more than 0 are needed")
    named = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name in vars(args)}
    named |= {"raw": str(raw), "out": str(out), "models": str(models)}
    settings = Settings(**{**named, "skip": tuple(stage for stage in STAGES if stage in args.skip)})
    check_size(settings.size)
    for name, low, high in (
        ("min_seconds", 0.5, 600), ("max_seconds", 2 * settings.min_seconds, 600), ("max_hours", 0, 1000),
        ("min_fps", 1, 240), ("detect_fps", 0.1, 240), ("scale", 1, 4), ("fps", 1, 240), ("max_pixels", 1, 2**30),
    ):  # fmt: skip
        if not low <= getattr(settings, name) <= high:
            raise PrepareError(
                f"--{name.replace('_', '-')} is {getattr(settings, name)}; {low:g} to {high:g} is allowed"
            )
    missing = settings.missing()
    if missing:
        raise PrepareError("these are missing:\n  " + "\n  ".join(dict.fromkeys(missing)))
    out.mkdir(parents=True, exist_ok=True)
    if "encode" not in settings.skip:
        ShardWriter(out / "shards", settings.encoders())  # refuses samples of other encoders before any work
    return settings


def find_videos(raw: Path, out: Path, known: Iterable[Row] = ()) -> Iterator[Row]:
    """A row for every video below `raw`, with its identity; links are followed, each folder once, each content once.

    Args:
        known: rows of an earlier run; a file that has not changed since keeps its identity unread.
    """
    identities = {(row.source, tuple(row.changed)): row.identity for row in known if row.changed}
    folders, contents = set(), {}
    for folder, names, members in os.walk(raw, followlinks=True, onerror=_say):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in folders or Path(folder).resolve() == out:
            names.clear()
            continue
        folders.add((place.st_dev, place.st_ino))
        names.sort()
        for name in sorted(members):
            if os.path.splitext(name)[1].lower() not in VIDEOS:
                continue
            path = os.path.join(folder, name)
            source = os.path.relpath(path, raw)
            try:
                found = os.stat(path)
                if not stat.S_ISREG(found.st_mode):
                    yield _unusable(source, "cannot be read", "it is not a regular file")
                    continue
                changed = [found.st_size, found.st_mtime_ns]
                identity = identities.get((source, tuple(changed))) or _identify(path, found.st_size)
            except OSError as error:
                yield _unusable(source, "cannot be read", error.strerror or str(error))
                continue
            other = contents.setdefault(identity, source)
            if other == source:
                yield Row(id=identity, source=source, identity=identity, changed=changed)
            else:
                yield _unusable(source, "same file", f"as {other}")


def _identify(path: str, size: int) -> str:
    """Of the content: of its size and the first and last MiB, where containers keep what differs between videos."""
    digest = hashlib.sha256(b"%d\0" % size)
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:12]


def _unusable(source: str, cause: str, detail: str) -> Row:
    identity = hashlib.sha256(b"path\0" + os.fsencode(source)).hexdigest()[:12]
    return Row(id=identity, source=source, identity=identity).fail("scenes", cause, detail)


def _say(error: OSError) -> None:
    print(f"cannot look into {error.filename}: {error.strerror}", file=sys.stderr)


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
    table, digests = Table(out / TABLE), settings.digests()
    judged = review.read_verdicts(out)
    if verdicts is not None:
        before = {row.id: row.verdict for row in table.rows.values() if row.verdict} if judged is None else judged
        judged = before | review.read_verdicts(out, verdicts)
        review.save_verdicts(out, judged)  # so that the next run, without the file, finds the same
    run = _Run(settings, engine, table, digests, retry)
    try:
        run.scenes()
        if prune:
            run.prune()
        if judged is not None:
            table.put(replace(row, verdict=judged.get(row.id, "")) for row in list(table.rows.values()))
            unknown = len({id for id, verdict in judged.items() if verdict} - table.rows.keys())
            print(
                f"{sum(map(bool, judged.values())) - unknown} verdicts read"
                + (f", {unknown} of clips that are not here" if unknown else "")
            )
        for stage in STAGES[1:-1]:
            run.stage(stage)
        run.decide()
        review.write_page(out, table.rows.values(), settings)
        if "encode" not in settings.skip:
            run.encode()
    finally:
        run.decide()
        table.save()
    review.write_page(out, table.rows.values(), settings)
    picture.draw_funnel(table.rows.values(), settings).save(out / PICTURE)
    print(picture.describe_funnel(table.rows.values(), settings))
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
    """One run over a table: which rows each stage is due for, and what becomes of them."""

    def __init__(self, settings: Settings, engine: Engine, table: Table, digests: dict[str, str], retry: bool):
        self.settings, self.engine, self.table, self.digests, self.retry = settings, engine, table, digests, retry
        self.present: set[str] = set()  # sources that are there

    def scenes(self) -> None:
        videos = list(find_videos(Path(self.settings.raw), Path(self.settings.out), self.table.rows.values()))
        self.present = {video.source for video in videos}
        known: dict[str, list[Row]] = {}
        for row in self.table.rows.values():
            known.setdefault(row.identity, []).append(row)
        new, again = [], {}
        for video in videos:
            rows = [replace(row, source=video.source, changed=video.changed) for row in known.pop(video.identity, [])]
            self.table.put(rows)  # it may have been moved
            again[video.identity] = rows
            if rows and all(self._is_done(row, "scenes") for row in rows):
                continue
            if video.failure is not None:
                self._put("scenes", [video])
            else:
                new.append(video)
        for rows in known.values():
            self._forget(row for row in rows if row.source in self.present)  # the file holds something else now
        for video, clips in self._results("scenes", new):
            old = again.get(video.identity, [])
            verdicts = {row.id: row.verdict for row in old}
            self._forget(old)
            self._put("scenes", [replace(clip, verdict=verdicts.get(clip.id, "")) for clip in clips])

    def gone(self) -> list[Row]:
        """Rows whose source is not there any more; they stay, with their samples, until they are pruned."""
        return [row for row in self.table.rows.values() if row.source not in self.present]

    def prune(self) -> None:
        rows = self.gone()
        self._forget(rows)
        for row in rows:
            for folder, suffix in (("clips", "mp4"), ("review", "jpg")):
                Path(self.settings.out, folder, f"{row.id}.{suffix}").unlink(missing_ok=True)

    def _forget(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.table.rows.pop(row.id, None)

    def stage(self, stage: str) -> None:
        if stage in self.settings.skip and stage != "faces":
            return
        due = []
        for row in self.table.rows.values():
            if row.source in self.present and not self._is_done(row, stage):
                row = _without(row, stage)
                if row.start is not None and self._decided(row).decision == "keep":
                    due.append(row)
        for _, rows in self._results(stage, due):
            self._put(stage, rows)

    def encode(self) -> None:
        from .encode import Packer

        kept = {}
        for row in self.table.rows.values():
            if not self._is_done(row, "encode"):
                row = _without(row, "encode")
            if row.start is not None and self._decided(row).decision == "keep":
                key = f"{row.id}-{self.digests['encode'][:8]}" if row.source in self.present else row.key
                kept[key] = replace(row, key=key)
        packer = Packer(self.settings, set(kept))
        self._put("encode", [row for key, row in kept.items() if key in packer.keys])
        due = [row for key, row in kept.items() if key not in packer.keys and row.source in self.present]
        try:
            for _, rows in self._results("encode", due):
                failed = [row.failure is not None and row.failure[0] == "encode" for row in rows]
                self._put("encode", [row if bad else packer.add(row) for row, bad in zip(rows, failed)])
        finally:
            packer.close()

    def decide(self) -> None:
        for row in list(self.table.rows.values()):
            skipped = [s for s in self.settings.skip if s in ("scenes", "faces") or s not in row.done]
            self.table.put([replace(self._decided(row), skipped=skipped)])

    def _decided(self, row: Row) -> Row:
        return decide(row, self.settings.min_quality, self.settings.min_confidence)

    def _is_done(self, row: Row, stage: str) -> bool:
        again = self.retry and row.error and row.failure is not None and row.failure[0] == stage
        return row.done.get(stage) == self.digests[stage] and not again

    def _results(self, stage: str, rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
        if not rows:
            return
        by_id = {row.id: row for row in rows}
        for id, results in tqdm(self.engine(stage, rows, self.settings), stage, len(rows), file=sys.stderr):
            yield by_id[id], results
            self.table.save(now=False)

    def _put(self, stage: str, rows: list[Row]) -> None:
        self.table.put(self._decided(replace(row, done={**row.done, stage: self.digests[stage]})) for row in rows)


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
