"""`python -m training prepare`: its arguments, and what is checked before any work."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from memo_core.inputs.portrait import check_size

from ..shards import ShardWriter
from .engines import Local, OnRay
from .pipeline import prepare
from .rows import STAGES, PrepareError
from .settings import Settings

# Of settings that follow from another one: what they are without being told, as text and as a number.
FOLLOWS = {
    "min_fps": ("29/30 of --fps", lambda named: named["fps"] * 29 / 30),
    "min_face": ("half of --size", lambda named: named["size"] / 2),
}


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
    how.add_argument("--gpus", type=float, default=0.0, help="share of a GPU that each task of Ray reserves (0), where "
                     "it computes on one")  # fmt: skip
    how.add_argument("--device", default=usual.device, help="of SCRFD (with onnxruntime-gpu), HyperIQA, SyncNet and "
                     "the encoders; with cuda the processes share all GPUs evenly (%(default)s)")  # fmt: skip
    how.add_argument(
        "--time-limit",
        type=float,
        default=3600.0,
        help="seconds for a clip, or for 10 minutes of a video (%(default)g)",
    )

    what = parser.add_argument_group("what is kept")
    for name, text in {
        "scene_threshold": "PySceneDetect's adaptive threshold, fewer cuts the higher it is",
        "min_seconds": "a shorter clip is dropped",
        "max_seconds": "a scene of this length or more is cut into equal pieces",
        "max_hours": "a longer video is refused",
        "max_pixels": "a video with larger pictures is refused",
        "min_fps": "a video with fewer pictures a second is dropped, as --fps would repeat some",
        "max_repeated": "a clip is dropped whose pictures at --fps repeat the one before more often, as a share",
        "detect_fps": "how often a second faces are looked for",
        "min_face": "a clip whose square has fewer pixels in the source is dropped",
        "min_quality": "HyperIQA of the first picture, 0 to 100",
        "min_confidence": "SyncNet's confidence",
        "max_offset": "a clip is dropped whose sound and picture lie more frames at 25 fps apart; less is put right",
        "size": "side of the pictures that are encoded",
        "fps": "their rate",
    }.items():
        value, option = getattr(usual, name), f"--{name.replace('_', '-')}"
        if name in FOLLOWS:
            what.add_argument(option, type=float, metavar="N", help=f"{text} ({FOLLOWS[name][0]})")
        else:
            what.add_argument(option, type=type(value), default=value, metavar="N", help=f"{text} (%(default)g)")
    what.add_argument(
        "--scale", type=float, nargs="+", default=[usual.scale], metavar="N",
        help=f"of the square around the face; of two each clip draws one between ({usual.scale:g})",
    )  # fmt: skip
    what.add_argument("--scorer", default=usual.scorer, help="module:function that makes the image quality scorer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command; ends the program with a message where it cannot start."""
    try:
        settings = check(args)
        make_engine = (
            (lambda: Local(args.out.resolve(), args.jobs, args.time_limit, args.device))
            if args.engine == "local"
            else (lambda: OnRay(args.out.resolve(), args.time_limit, args.ray_address, args.gpus))
        )
        with make_engine() as engine:
            prepare(settings, engine, args.verdicts, args.retry, args.prune)
    except PrepareError as error:
        sys.exit(f"error: {error}")


def _scale(given: list[float]) -> float | tuple[float, float]:
    """One number, or a rising pair."""
    if len(given) > 2 or not all(1 <= scale <= 4 for scale in given) or given != sorted(given):
        raise PrepareError(f"--scale is {' '.join(map(str, given))}; one number from 1 to 4 is allowed, or two, rising")
    return given[0] if given[0] == given[-1] else (given[0], given[1])


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
    named |= {"raw": str(raw), "out": str(out), "models": str(models), "scale": _scale(args.scale)}
    named |= {name: follow(named) for name, (_, follow) in FOLLOWS.items() if named[name] is None}
    settings = Settings(**{**named, "skip": tuple(stage for stage in STAGES if stage in args.skip)})
    check_size(settings.size)
    for name, low, high in (
        ("min_seconds", 0.5, 600), ("max_seconds", 2 * settings.min_seconds, 600), ("max_hours", 0, 1000),
        ("min_fps", 1, 240), ("detect_fps", 0.1, 240), ("fps", 1, 240), ("max_pixels", 1, 2**30),
        ("min_face", 0, 2**15), ("max_repeated", 0, 1), ("max_offset", 0, 15),
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
