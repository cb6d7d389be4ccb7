"""The index of a folder of shards: which samples lie where; and shards opened so that none leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from memo_core.checks import number, shown, whole
from memo_core.files import open_regular

from .reading import fits, read_json

INDEX = "index.json"
MOST = 2**62  # bytes, frames, sides of a tensor
# What of a sample's .json the index repeats, so that a run knows it without reading every shard, and of which kind.
METADATA = {"video": str, "crop_scale": float, "encoded_fps": float}


class ShardError(ValueError):
    """A shard, an index or a sample that cannot be used."""


def folder_of(folder: Path | str) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder):
        raise ShardError(f"a folder of shards is a path, received {shown(folder)}")
    return Path(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """What the index says, once it makes sense; ShardError names the first thing that does not."""
    path = folder / INDEX
    if not os.path.lexists(path):
        return {"encoders": {}, "shards": []}
    index = read_json(path, lambda text: ShardError(f"{text}. The index is damaged"))
    if not fits(index.get("encoders"), dict[str, str]) or not isinstance(index.get("shards"), list):
        raise ShardError(f"{path} is damaged: it should hold encoders and shards, it is {shown(index)}")
    for shard in index["shards"]:
        if problem := _problem(shard):
            raise ShardError(f"{path} is damaged: {problem}")
    return index


def _problem(shard: Any) -> str:
    """What is wrong with a shard's entry in the index; nothing where it is right."""
    if (
        not isinstance(shard, dict)
        or not isinstance(shard.get("name"), str)
        or not isinstance(shard.get("samples"), list)
    ):
        return f"an entry is {shown(shard)}, not a shard's name, bytes and samples"
    name, size = shard["name"], whole(shard.get("bytes"), 0, MOST)
    if not name.endswith(".tar") or not name.isprintable() or set(name) & set("/\\:"):
        return f"{shown(name)} is not the name of a tar file in this folder"
    if size is None:
        return f"{name} has {shown(shard.get('bytes'))} bytes"
    spans = []
    for sample in shard["samples"]:
        place, metadata = (sample[:4], sample[4:]) if isinstance(sample, (list, tuple)) else (sample, [])
        if not fits(place, tuple[str, int, int, int]) or not is_key(place[0]):
            return f"{name} holds {shown(sample)}, not [key, offset, size, frames]"
        key, offset, length, frames = place
        if len(metadata) > 1 or (metadata and not is_metadata(metadata[0])):
            return f"{key} in {name} has the metadata {shown(metadata)}, not some of {', '.join(METADATA)}"
        if offset < 0 or length < 8 or offset + length > size or frames < 1:
            return f"{key} in {name} has {frames} frames in {length} bytes at {offset}, of {size}"
        spans.append((offset, length, key))
    spans.sort()
    for (offset, length, key), (following, _, other) in zip(spans, spans[1:]):
        if offset + length > following:
            return f"{key} and {other} in {name} overlap"
    return ""


def is_metadata(value: Any) -> bool:
    """Whether an index may say this of a sample besides its place: a video's name, a scale and a rate above 0."""
    return (
        isinstance(value, dict)
        and all(name in METADATA and fits(part, METADATA[name]) for name, part in value.items())
        and all(number(value.get(name, 1.0), 1e-3, 1e3) is not None for name in ("crop_scale", "encoded_fps"))
    )


def crop_scale(box: list[float] | None, looks: list[list[float]] | None) -> float | None:
    """Side of the square that is cut out, in sides of the face as one picture shows it: a portrait that is cut so looks
    like the clip.

    Args:
        box: what is cut out: left, top, right, bottom in pixels.
        looks: time, left, top, right and bottom of each face found.

    Returns:
        None where no face was looked for.
    """
    if box is None or not looks:
        return None
    faces = [max(right - left, bottom - top) for _, left, top, right, bottom in looks]
    return round((box[2] - box[0]) / median(faces), 4)


def metadata_before(about: dict[str, Any]) -> dict[str, Any]:
    """What a sample's .json tells where the index does not: the video, or `identity`, and how wide the square is."""
    found, (box, looks) = {}, (about.get("box"), about.get("looks"))
    if isinstance(video := about.get("video") or about.get("identity"), str):
        found["video"] = video
    four, five = tuple[float, float, float, float], tuple[float, float, float, float, float]
    if fits(box, four) and fits(looks, list[five]) and all(right > left for _, left, _, right, _ in looks):
        found["crop_scale"] = crop_scale(box, looks)
    return {name: value for name, value in found.items() if value is not None and is_metadata({name: value})}


def is_key(key: str) -> bool:
    return bool(key) and not set(key) & set("./\\\0")


def number_of(name: str) -> int:
    digits = name.removeprefix("clips-").removesuffix(".tar")
    if not digits.isdecimal() or len(digits) > 12:
        raise ShardError(f"{name} is not the name of a shard that this program wrote: clips-000000.tar")
    return int(digits)


def open_inside(path: Path) -> BinaryIO:
    """Opens a shard; ShardError where it is no file, or a link to one outside its folder."""
    try:
        if Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
            raise ShardError(f"{path} is a link that leads out of its folder: put the shard itself there")
        return open_regular(path)
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}") from error


def size_of(path: Path) -> int | None:
    """Bytes of a shard, None where there is none."""
    if not os.path.lexists(path):
        return None
    with open_inside(path) as file:
        return os.fstat(file.fileno()).st_size


def pread(path: Path, offset: int, size: int) -> bytes:
    with open_inside(path) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ShardError(f"{path} ends before byte {offset + size}: copy or make it again")
    return data
