"""`python -m training prepare`: the stages in order, on what is new; then the table, the page, the picture."""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from memo_core.face import check_size

from ..shards import ShardWriter
from .engines import Engine, Local, OnRay
from .rows import MEASURED, STAGES, TABLE, PrepareError, Row, Table, decide
from .settings import Settings

VIDEOS = frozenset(
    ".3gp .asf .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
PICTURE = "funnel.png"


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
    parser.add_argument("--verdicts", type=Path, help="what the page saved (OUT_DIR/verdicts.json or .csv if there)")
    parser.add_argument("--retry", action="store_true", help="run clips again that ended in a crash or time limit")

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
            prepare(settings, engine, args.verdicts, args.retry)
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


def find_videos(raw: Path, out: Path) -> Iterator[Row]:
    """A row for every video below `raw`, with its identity; links are followed, each folder and file once."""
    folders, files = set(), {}
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
            except OSError as error:
                yield _video(source, 0, 0).fail("scenes", "cannot be read", error.strerror or str(error))
                continue
            row = _video(source, found.st_size, found.st_mtime_ns)
            other = files.setdefault((found.st_dev, found.st_ino), source)
            if not stat.S_ISREG(found.st_mode):
                row = row.fail("scenes", "cannot be read", "it is not a regular file")
            elif other != source:
                row = row.fail("scenes", "same file", f"as {other}")
            yield row


def _say(error: OSError) -> None:
    print(f"cannot look into {error.filename}: {error.strerror}", file=sys.stderr)


def _video(source: str, size: int, changed: int) -> Row:
    identity = hashlib.sha256(b"%s\0%d\0%d" % (os.fsencode(source), size, changed)).hexdigest()[:12]
    return Row(id=identity, source=source, identity=identity)


def prepare(settings: Settings, engine: Engine, verdicts: Path | None = None, retry: bool = False) -> Table:
    """Runs all stages on what is new; returns the table, which is also written, as are page, picture and shards.

    Args:
        verdicts: the page's file; None looks for OUT_DIR/verdicts.json and .csv.
        retry: also runs rows whose failure was a crash, an exception or a time limit.
    """
    from . import picture, review

    out = Path(settings.out)
    table, digests = Table(out / TABLE), settings.digests()
    judged = review.read_verdicts(out, verdicts)
    run = _Run(settings, engine, table, digests, retry)
    try:
        run.scenes()
        if judged is not None:
            table.put(replace(row, verdict=judged.get(row.id, "")) for row in list(table.rows.values()))
            unknown = len(judged.keys() - table.rows.keys())
            print(
                f"{len(judged) - unknown} verdicts read"
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
    print(f"all clips: {table.path}\nreview: {out / review.PAGE}\npicture: {out / PICTURE}")
    return table


class _Run:
    """One run over a table: which rows each stage is due for, and what becomes of them."""

    def __init__(self, settings: Settings, engine: Engine, table: Table, digests: dict[str, str], retry: bool):
        self.settings, self.engine, self.table, self.digests, self.retry = settings, engine, table, digests, retry
        self.present: set[str] = set()  # sources that are there

    def scenes(self) -> None:
        known: dict[str, list[Row]] = {}
        for row in self.table.rows.values():
            known.setdefault(row.source, []).append(row)
        new = []
        for video in find_videos(Path(self.settings.raw), Path(self.settings.out)):
            self.present.add(video.source)
            rows = known.get(video.source, [])
            if rows and all(row.identity == video.identity and self._is_done(row, "scenes") for row in rows):
                continue
            if video.failure is not None:
                self._replace(rows, [video])
            else:
                new.append(video)
        for video, clips in self._results("scenes", new):
            self._replace(known.get(video.source, []), clips)

    def _replace(self, old: list[Row], clips: list[Row]) -> None:
        verdicts = {row.id: row.verdict for row in old}
        for row in old:
            self.table.rows.pop(row.id, None)
        self._put("scenes", [replace(clip, verdict=verdicts.get(clip.id, "")) for clip in clips])

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
