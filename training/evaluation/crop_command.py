"""`python -m training crop`: real videos, or pictures of both sides, cropped alike, for measures of other programs."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
from PIL import Image
from tqdm import tqdm

from memo_core.errors import MemoError
from memo_core.files import replace_whole

from .. import media
from .command import add_margin
from .crop import Crop, CropRule
from .evaluate import crop_pair, readable
from .metric import Tools
from .videos import Pair, frames_at, pair_videos, read_header, video_errors


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command `crop`; its `run` raises SystemExit(1) if a pair could not be cropped."""
    parser = commands.add_parser(
        "crop",
        help="crop real videos like generated ones",
        description="Crop real videos like generated ones, for programs that measure files as they are; `evaluate "
        "--crop` needs none of these. Writes OUT/NAME.mkv, without loss and with the sound, or with --pictures "
        "OUT/generated/ and OUT/real/, PNG files for FID.",
    )
    parser.add_argument("generated", type=Path, help="a video, or a folder of videos")
    parser.add_argument("real", type=Path, help="likewise; folders are paired by file name")
    parser.add_argument("out", type=Path, help="the folder to write; what is there is not made again")
    parser.add_argument(
        "--rule",
        choices=get_args(CropRule),
        default="match",
        help="`portrait`, as `memo generate` crops the real video's first picture; `match`, so that the first real "
        "face lies as the first generated one does (%(default)s)",
    )
    add_margin(parser, "of `portrait`: ")
    parser.add_argument("--weights", type=Path, help="folder with the face models")
    parser.add_argument("--fps", type=float, help="write at this rate (each video's own)")
    parser.add_argument("--pictures", action="store_true", help="write pictures of both sides instead of videos")
    parser.add_argument("--every", type=int, default=1, help="with --pictures: every n-th (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    failed = []
    try:
        if args.every < 1:
            raise ValueError(f"--every is {args.every}; allowed is 1 and up")
        tools = Tools(args.weights)
        _ = tools.analyzer  # says now what is missing
        for pair in tqdm(pair_videos(args.generated, args.real), desc="crop", unit="video"):
            pair = crop_pair(pair, args.rule, tools, args.margin)
            try:
                if pair.problem:
                    raise MemoError(pair.problem)
                if args.pictures:
                    write_pictures(pair, args.out, args.fps, args.every)
                else:
                    write_cropped(pair.real, pair.crop, args.out / f"{pair.name}.mkv", args.fps)
            except MemoError as error:
                failed.append(f"{pair.name}: {error}")
    except (MemoError, ValueError, OSError) as error:
        raise SystemExit(f"crop: {error}") from error
    if failed:
        raise SystemExit(readable("\n".join([f"crop: {len(failed)} videos were not cropped", *failed])))


def write_cropped(real: Path, crop: Crop, target: Path, fps: float | None = None) -> None:
    """Writes the part of a video without loss, and its sound, to `target` (Matroska, FFV1, PCM), unless that is there.

    Raises VideoError where the video is damaged. Time 0 is where the file begins, with sound or picture.
    """
    if target.exists():
        return
    header = read_header(real)
    fps = fps or header.fps
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_whole(target) as temporary,
        video_errors(real),
        av.open(f"file:{temporary.absolute()}", "w", format="matroska") as file,
    ):
        rate = Fraction(fps).limit_denominator(1001)
        picture = file.add_stream("ffv1", rate=rate)
        picture.width, picture.height, picture.pix_fmt = crop.width, crop.height, "bgr0"
        picture.codec_context.time_base = 1 / rate
        _add_sound(real, header.duration, file)
        for number, shown in enumerate(frames_at(real, fps, header.duration)):
            frame = av.VideoFrame.from_ndarray(crop.cut(shown), "rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            file.mux(picture.encode(frame))
        file.mux(picture.encode(None))


def _add_sound(real: Path, seconds: float, file: Any) -> None:
    """Adds the sound from the file's beginning, if there is any: mono, 16 bits, at its own rate."""
    with media.opened(real) as source:
        rate = source.streams.audio[0].rate if source.streams.audio else None
    if rate is None:
        return
    samples, _ = media.sound(real, 0.0, seconds, rate)
    voice = file.add_stream("pcm_s16le", rate=rate, layout="mono")
    frame = av.AudioFrame.from_ndarray((samples.clip(-1, 1) * 32767).round().astype("<i2")[None], "s16", "mono")
    frame.sample_rate, frame.pts = rate, 0
    file.mux(voice.encode(frame))
    file.mux(voice.encode(None))


def write_pictures(pair: Pair, out: Path, fps: float | None, every: int) -> None:
    """Writes every n-th picture of both videos, as many of each, to OUT/generated/NAME-00000.png and OUT/real/.

    Folders in the name become part of the file's name: programs that compute FID look into one folder.
    """
    fps = fps or read_header(pair.generated).fps
    both = zip(frames_at(pair.generated, fps), map(pair.crop.cut, frames_at(pair.real, fps)), strict=False)
    for number, pictures in enumerate(both):
        for side, picture in zip(("generated", "real"), pictures, strict=True):
            target = out / side / f"{pair.name.replace('/', '-')}-{number:05d}.png"
            if number % every == 0 and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with replace_whole(target) as temporary:
                    Image.fromarray(picture).save(temporary, format="png")
