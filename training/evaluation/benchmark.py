"""`python -m training benchmark`: chosen clips are made again from first picture and sound, and measured."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from memo_core import devices
from memo_core.checkpoint.digest import base_digest
from memo_core.checkpoint.layout import find
from memo_core.checkpoint.settings import read_net_config
from memo_core.encoders.face import FaceAnalyzer
from memo_core.errors import MemoError
from memo_core.files import replace_whole
from memo_core.release import CROP_MARGIN

from .clips import CLIPS, PEOPLE, Clip, Inputs, choose_clips, make_inputs
from .command import add_margin, add_protocol, names_of_measures, show
from .evaluate import METRICS, Evaluation, evaluate, make_tools, readable
from .generators import Generator, generate, make_generator
from .report import VideoTable, compare, write_report
from .videos import Pair

logger = logging.getLogger(__name__)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command `benchmark`; its `run` raises SystemExit(1) if a video could not be made."""
    parser = commands.add_parser(
        "benchmark",
        help="the paper's benchmark: make clips of a data set again, and measure them",
        description="Choose clips of a data set, make each again from its first picture and its sound, and measure "
        "the made against the real ones, cropped alike. Stopped at any point, the same command goes on. Other systems "
        "are measured on the same clips with another --system and --generator; OUT/systems.md has them beside each "
        "other.",
    )
    parser.add_argument(
        "videos",
        type=Path,
        help="a folder of people's folders, such as VoxCeleb2's idXXXX/VIDEO/CLIP.mp4; or a list, taken whole",
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--people", type=int, default=PEOPLE, help="of a folder (%(default)s)")
    parser.add_argument("--clips", type=int, default=CLIPS, help="of each person (%(default)s)")
    parser.add_argument("--seconds", type=float, help="of each clip, from its beginning (all)")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures (%(default)s)")
    parser.add_argument(
        "--crop",
        choices=("face", "none"),
        default="face",
        help="portrait and real pictures: around the face of the first, as `memo generate` does, or the middle "
        "(%(default)s)",
    )
    add_margin(parser, "of `face`: ", f"the checkpoint's of memo, of others {CROP_MARGIN:g}")
    _add_system(parser)
    parser.add_argument("--part", type=_part, metavar="I/N", help="only make this share of the videos, for N processes")
    parser.add_argument("--weights", type=Path, help="folder of network files, as for `evaluate`")
    parser.add_argument("--metrics", type=names_of_measures, help="some of `evaluate`'s, with commas between (all)")
    parser.add_argument("--every", type=int, default=1, help="as for `evaluate` (%(default)s)")
    add_protocol(parser, fps=25)
    parser.set_defaults(run=run)


def _add_system(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="memo", help="name of what is measured, a folder in OUT (%(default)s)")
    parser.add_argument(
        "--generator",
        default="memo",
        help="memo; a command such as 'python make.py {portrait} {voice} {output}'; or MODULE:FUNCTION, called with "
        "these three paths (%(default)s)",
    )
    parser.add_argument("--checkpoint", default="toon", help="of memo: a folder in the released layout (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of memo (%(default)s)")
    parser.add_argument("--guidance", type=float, default=3.5, help="of memo (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of memo's noise (%(default)s)")
    parser.add_argument("--device", default="cpu", help="for memo and for measures (%(default)s)")


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        failed, found = _run(args)
    except (MemoError, ValueError, OSError) as error:
        raise SystemExit(f"benchmark: {error}") from error
    if failed:
        lines = [f"{name}: {reason}" for name, reason in failed.items()]
        raise SystemExit(readable("\n".join([f"benchmark: {len(failed)} videos could not be made", *lines])))
    if found is not None and args.metrics and found.missing:
        raise SystemExit(1)


def _run(args: argparse.Namespace) -> tuple[dict[str, str], Evaluation | None]:
    tools = make_tools(args.weights, args.device, args.every, args.fps, args.clips_per_video)
    analyzer = tools.analyzer if args.crop == "face" else None
    clips = choose_clips(args.videos, args.people, args.clips)
    margin = _margin_of(args)
    used = margin if args.crop == "face" else None
    _settle_clips(args, clips, used)
    benchmark = Benchmark(clips, args.out, args.system, args.size, args.seconds, analyzer, margin)
    part, parts = args.part or (1, 1)
    todo = [clip for clip in clips[part - 1 :: parts] if not benchmark.video(clip).exists()]
    settings = {"steps": args.steps, "guidance_scale": args.guidance, "seed": args.seed}
    _settle_system(args, benchmark.folder / "system.json", settings, bool(todo))

    failed = {}
    if todo:
        failed = benchmark.make(todo, make_generator(args.generator, args.checkpoint, args.device, **settings))
    if args.part:
        return failed, None
    pairs = benchmark.pairs(failed)
    report = benchmark.folder / "report"
    with VideoTable(report / "videos.csv", args.metrics or list(METRICS)) as rows:
        found = evaluate(
            benchmark.folder / "generated",
            args.videos,
            args.metrics,
            args.weights,
            args.device,
            args.every,
            rows.write,
            fps=args.fps,
            clips_per_video=args.clips_per_video,
            margin=used,
            pairs=pairs,
        )
    write_report(found, report)
    compare(args.out)
    show(found)
    print(readable(f"\n{report / 'report.md'}, {args.out / 'systems.md'}"))
    return failed, found


@dataclass(frozen=True)
class Benchmark:
    """The chosen clips, and where what is made of them lies.

    OUT/inputs/NAME.png, .wav and .json: what every system gets; OUT/SYSTEM/generated/NAME.mp4: what it makes of them.
    """

    clips: list[Clip]
    out: Path
    system: str
    size: int
    seconds: float | None
    analyzer: FaceAnalyzer | None
    margin: float

    def __post_init__(self) -> None:
        if self.system in ("", ".", "..", "inputs") or Path(self.system).name != self.system:
            raise MemoError(f"--system is {self.system!r}; it is the name of a folder, and not inputs")

    @property
    def folder(self) -> Path:
        """Of the system."""
        return self.out / self.system

    def video(self, clip: Clip) -> Path:
        """What the system makes of a clip."""
        return self.folder / "generated" / f"{clip.name}.mp4"

    def make(self, clips: list[Clip], generator: Generator) -> dict[str, str]:
        """Makes videos. Returns those that could not be made, by name, with the reason."""
        failed = {}
        for clip in tqdm(clips, desc=self.system, unit="video"):
            try:
                inputs = self._inputs(clip)
                unfinished = self.folder / "unfinished" / f"{clip.name}.mp4"
                generate(generator, inputs.portrait, inputs.voice, self.video(clip), unfinished)
            except Exception as error:  # a generator raises anything; it costs this video
                failed[clip.name] = f"{type(error).__name__}: {error}"
                logger.warning("%s: %s", readable(clip.name), failed[clip.name])
        return failed

    def pairs(self, failed: dict[str, str]) -> list[Pair]:
        """Made and real videos, these with the crop of their portrait."""
        pairs = []
        for clip in self.clips:
            if clip.name in failed:
                pairs.append(Pair(clip.name, None, clip.source, failed[clip.name]))
            else:
                pairs.append(Pair(clip.name, self.video(clip), clip.source, crop=self._inputs(clip).crop))
        return pairs

    def _inputs(self, clip: Clip) -> Inputs:
        return make_inputs(clip, self.out / "inputs", self.size, self.seconds, self.analyzer, self.margin)


def _margin_of(args: argparse.Namespace) -> float:
    """Room around the portraits' faces."""
    if args.margin is not None:
        return args.margin
    if args.generator != "memo":
        return CROP_MARGIN
    return read_net_config(find(args.checkpoint) / "diffusion_net").crop_margin


def _settle_clips(args: argparse.Namespace, clips: list[Clip], margin: float | None) -> None:
    """Keeps what OUT/inputs are made of."""
    values = {
        "videos": str(args.videos.resolve()),
        "size": args.size,
        "seconds": args.seconds,
        "crop": args.crop,
        "margin": margin,
        "clips": [clip.name for clip in clips],
    }
    before = None if margin is None else CROP_MARGIN  # what it was before it was kept
    _settle(args.out / "clips.json", values, "give that, or another OUT", margin=before)


def _settle_system(args: argparse.Namespace, path: Path, settings: dict[str, Any], makes: bool) -> None:
    """Keeps what makes the videos; where they are only measured any device will do."""
    values: dict[str, Any] = {"generator": args.generator}
    if args.generator == "memo":
        values |= {"checkpoint": str(args.checkpoint), "weights": base_digest(args.checkpoint), **settings}
        if makes:
            dtype = str(devices.of(args.device).dtype).removeprefix("torch.")
            values |= {"device": torch.device(args.device).type, "dtype": dtype}
    _settle(path, values, "give another --system")


def _settle(path: Path, values: dict[str, Any], remedy: str, **assumed: Any) -> None:
    """Writes what a folder was begun with; MemoError where that is something else.

    Args:
        assumed: of files that do not say it. What they lack besides is added.
    """
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known = assumed | before if before else {}
    unlike = [name for name, value in values.items() if known.get(name, value) != value]
    if unlike:
        name = min(unlike)
        was, now = (_short(those[name]) for those in (known, values))
        raise MemoError(f"{path} was begun with {name} {was}, not {now}; {remedy}")
    if values.keys() <= before.keys():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(path) as temporary:
        temporary.write_text(json.dumps(known | values, indent=1), encoding="utf-8")


def _short(value: Any) -> Any:
    return f"of {len(value)} names" if isinstance(value, list) else value


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return int(part), int(parts)
