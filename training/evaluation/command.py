"""`python -m training evaluate`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import get_args

from memo_core.errors import MemoError
from memo_core.release import CROP_MARGIN

from .crop import CropRule
from .evaluate import METRICS, Evaluation, evaluate, readable
from .report import VideoTable, table, write_report


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command `evaluate`; its `run` raises SystemExit(1) if a measure that was asked for is missing."""
    parser = commands.add_parser(
        "evaluate",
        help="measure generated videos against real ones",
        description="Measure generated videos against real ones. Nothing is downloaded: measures whose files are "
        "missing are named, with where to get them, and the others are taken.",
        epilog="\n".join(f"  {measure.name:10} {measure.title}" for measure in METRICS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("generated", type=Path, help="a video, or a folder of videos")
    parser.add_argument("real", type=Path, help="likewise; folders are paired by file name")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        help="report.md, report.json, videos.csv, curves/ (%(default)s)",
    )
    parser.add_argument("--metrics", type=names_of_measures, help="some of the names below, with commas between (all)")
    parser.add_argument(
        "--weights",
        type=Path,
        help="folder of network files (weights; i3d_torchscript.pt, a program, is run only from one given here)",
    )
    parser.add_argument("--device", default="cpu", help="for networks in PyTorch, such as cuda (%(default)s)")
    parser.add_argument(
        "--every", type=int, default=1, help="networks that look at single frames look at every n-th (%(default)s)"
    )
    add_protocol(parser)
    parser.add_argument(
        "--crop",
        choices=get_args(CropRule),
        help="crop real pictures like the generated ones: `portrait`, as `memo generate` crops the real video's first "
        "picture; `match`, so that the first real face lies as the first generated one does (no crop)",
    )
    add_margin(parser, "of `portrait`: ")
    parser.set_defaults(run=run)


def add_margin(parser: argparse.ArgumentParser, of: str = "", default: str = f"{CROP_MARGIN:g}") -> None:
    """Adds --margin; None where it is not given, which `default` explains."""
    parser.add_argument(
        "--margin",
        type=_margin,
        help=f"{of}room around the face, in parts of its size, as the generated videos' portraits had it: the "
        f"checkpoint's crop_margin ({default})",
    )


def _margin(text: str) -> float:
    margin = float(text)
    if not 0 <= margin <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 10")
    return margin


def add_protocol(parser: argparse.ArgumentParser, fps: float | None = None) -> None:
    """Adds the options that make numbers comparable with others'."""
    parser.add_argument(
        "--fps",
        type=float,
        default=fps,
        help="read both sides at this rate, so that none repeats pictures, such as 25 "
        f"({'that of each generated video' if fps is None else '%(default)s'})",
    )
    parser.add_argument(
        "--clips-per-video", type=int, help="clips of a video for FVD, drawn by its name; StyleGAN-V takes 1 (all)"
    )


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with VideoTable(args.out / "videos.csv", args.metrics or list(METRICS)) as videos:
            found = evaluate(
                args.generated,
                args.real,
                args.metrics,
                args.weights,
                args.device,
                args.every,
                videos.write,
                fps=args.fps,
                clips_per_video=args.clips_per_video,
                crop=args.crop,
                margin=args.margin,
            )
        write_report(found, args.out)
    except (MemoError, ValueError, OSError) as error:
        raise SystemExit(f"evaluate: {error}") from error
    show(found)
    print(readable(f"\n{args.out / 'report.md'}"))
    if args.metrics and found.missing:
        raise SystemExit(1)


def show(found: Evaluation) -> None:
    """Prints the totals and what to know of them."""
    print(readable("\n".join([table(found), *(f"- {line}" for line in found.remarks)])))


def names_of_measures(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(METRICS)}")
    return names
