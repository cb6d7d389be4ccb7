"""`memo sheet`: frames of a video as one picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MemoError
from .arguments import positive_int
from .output import OK, check_picture, named_after, save_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    sub.add_argument("video", metavar="VIDEO")
    sub.add_argument("-o", "--output", metavar="PNG", help="the picture (default: VIDEO.png, here)")
    sub.add_argument("--frames", type=positive_int, default=12, help="how many frames (default: %(default)s)")
    sub.add_argument("--columns", type=positive_int, default=4, help="how many side by side (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from PIL import Image, ImageDraw, ImageFont

    from ..video.read import read_video

    output = Path(args.output or named_after(args.video, ".png"))
    kind = check_picture(output, args.video)
    about, frames = read_video(args.video)
    count = about.frames
    pictures = _evenly(frames, count, args.frames)
    if len(pictures) < min(args.frames, count):  # fewer than listed, as where parts were cut out
        count = sum(1 for _ in read_video(args.video)[1])
        pictures = _evenly(read_video(args.video)[1], count, args.frames)
    if not pictures:
        raise MemoError(f"{args.video} holds no frame that can be decoded")
    columns = min(args.columns, len(pictures))
    height, width = pictures[0][1].shape[:2]
    picture = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * (height + 20)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for place, (number, pixels) in enumerate(pictures):
        x, y = place % columns * width, place // columns * (height + 20)
        picture.paste(Image.fromarray(pixels), (x, y))
        draw.text((x + 4, y + height + 3), f"{number / about.fps:.2f} s", fill="black", font=font)
    save_picture(picture, output, kind)
    return OK


def _evenly(frames: Iterator[NDArray[np.uint8]], listed: int, wanted: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Evenly spaced ones of so many listed frames, at most `wanted`, with their numbers."""
    count = min(wanted, listed)
    numbers = {round((i + 0.5) * listed / count - 0.5) for i in range(count)}
    return [(number, frame) for number, frame in enumerate(frames) if number in numbers]
