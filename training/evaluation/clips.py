"""Which clips of a data set a benchmark takes, and what a generator gets of each: first picture and sound."""

from __future__ import annotations

import json
import math
import wave
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from memo_core.encoders.face import FaceAnalyzer
from memo_core.errors import VideoError
from memo_core.files import replace_whole, short_hash

from .. import media
from .crop import Crop, portrait_crop
from .videos import MAX_PIXELS, SUFFIXES, read_header, video_errors

PEOPLE, CLIPS = 46, 10  # of VoxCeleb2's test set in the paper, section 5.1


@dataclass(frozen=True)
class Clip:
    """A real video. name: its path without suffix below the data set's folder, with slashes."""

    name: str
    source: Path


@dataclass(frozen=True)
class Inputs:
    """What a generator gets of a clip. crop: the part of the real pictures that the portrait shows."""

    portrait: Path
    voice: Path
    crop: Crop


def choose_clips(videos: Path, people: int = PEOPLE, clips: int = CLIPS) -> list[Clip]:
    """The clips of a list, or of a folder so many people and so many of each.

    A folder holds one folder for each person, as VoxCeleb2's idXXXX/VIDEO/CLIP.mp4. People who have enough clips, and
    their clips, are taken in the order of a hash of their names: the same wherever the folder lies and whoever else is
    in it. A list names a video in every line, relative to its own folder; empty lines and those after # do not count.

    Raises:
        VideoError: nothing there, too few, or videos that cannot be told apart.
    """
    if videos.is_file():
        return _listed(videos)
    if not videos.is_dir():
        raise VideoError(f"{videos} does not exist; give a list of videos, or a folder of people's folders")
    found: dict[str, list[Clip]] = defaultdict(list)
    for path in videos.rglob("*"):
        name = path.relative_to(videos)
        if path.suffix.lower() in SUFFIXES and len(name.parts) > 1 and path.is_file():
            found[name.parts[0]].append(Clip(name.with_suffix("").as_posix(), path))
    enough = sorted((person for person, theirs in found.items() if len(theirs) >= clips), key=short_hash)
    if not 0 < people <= len(enough):
        raise VideoError(
            f"{people} people with {clips} clips each were asked for, and {videos} has {len(enough)}, of {len(found)} "
            "folders; allowed is 1 to that many (--people, --clips)"
        )
    chosen = []
    for person in sorted(enough[:people]):
        theirs = sorted(found[person], key=lambda clip: short_hash(clip.name))[:clips]
        chosen += sorted(theirs, key=lambda clip: clip.name)
    return _distinct(chosen)


def _listed(path: Path) -> list[Clip]:
    folder = path.parent.absolute()
    chosen = []
    for line in path.read_text("utf-8", "surrogateescape").splitlines():
        text = line.split("#", 1)[0].strip()
        if text:
            source = folder / text
            below = source.relative_to(folder) if source.is_relative_to(folder) else Path(*source.parts[-3:])
            chosen.append(Clip(below.with_suffix("").as_posix(), source))
    if not chosen:
        raise VideoError(f"{path} names no video; a line holds the path of one")
    bad = [clip.name for clip in chosen if ".." in Path(clip.name).parts or Path(clip.name).is_absolute()]
    if bad:
        raise VideoError(f"{path} names {bad[0]}; give paths without .. in them")
    return _distinct(chosen)


def _distinct(clips: list[Clip]) -> list[Clip]:
    known: dict[str, Path] = {}
    for clip in clips:
        if clip.name in known:
            raise VideoError(
                f"{known[clip.name]} and {clip.source} would both be {clip.name}; rename one, or leave it out"
            )
        known[clip.name] = clip.source
    return clips


def make_inputs(
    clip: Clip, folder: Path, size: int, seconds: float | None, analyzer: FaceAnalyzer | None, margin: float
) -> Inputs:
    """First picture and sound of a clip as files NAME.png and NAME.wav; made unless they are there.

    Args:
        folder: where they, and NAME.json with the crop, are kept; it belongs to one choice of the other arguments.
        size: of the square portrait.
        seconds: of the clip, from its beginning; None takes all.
        analyzer: finds the face that the portrait is cut around; None cuts out the middle.
        margin: room around the face, see `portrait_crop`.

    Raises:
        VideoError: the clip is damaged, has no sound, or no face in its first picture.
    """
    portrait, voice, about = (folder / f"{clip.name}{suffix}" for suffix in (".png", ".wav", ".json"))
    if not about.exists():  # it is written last
        about.parent.mkdir(parents=True, exist_ok=True)
        header = read_header(clip.source)
        with video_errors(clip.source):
            _, first = next(media.pictures(clip.source, max_pixels=MAX_PIXELS), (0.0, None))
            if first is None:
                raise VideoError(f"{clip.source.name} has no pictures")
            faces = [] if analyzer is None else analyzer.detect(first)
            if analyzer is not None and not faces:
                raise VideoError(f"no face was found in the first picture of {clip.source.name}")
            crop = portrait_crop(first, faces[0] if faces else None, size, size, margin)
            _write_voice(clip.source, min(header.duration, seconds or math.inf), voice)
        with replace_whole(portrait) as temporary:
            Image.fromarray(crop.cut(first)).save(temporary, format="png")
        with replace_whole(about) as temporary:
            temporary.write_text(json.dumps(asdict(crop)), encoding="utf-8")
    return Inputs(portrait, voice, Crop(**json.loads(about.read_text("utf-8"))))


def _write_voice(source: Path, seconds: float, target: Path) -> None:
    """The sound of so many seconds from the file's beginning, mono, 16 bits, at its own rate."""
    with media.opened(source, "audio") as container:
        rate = container.streams.audio[0].rate
    samples, _ = media.sound(source, 0.0, seconds, rate)
    with replace_whole(target) as temporary, temporary.open("wb") as plain, wave.open(plain, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
