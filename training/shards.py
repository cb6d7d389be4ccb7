"""Training samples on disk: WebDataset shards (plain tar files) with an index that says where each sample lies.

A sample is two members of a tar, `<key>.safetensors` and `<key>.json`, so that any WebDataset reader can stream the
shards. The index adds what streaming cannot do: which sample comes when is a pure function of a seed, every process
reads its own share, nothing is seen twice in an epoch, and only the frames that a step needs are read.

Tensors of a sample of F frames (the first two are all that single faces have):
    latents [F, 4, h, w] half     scaled VAE means
    portrait [4, h, w] half       optional; without it a frame of the clip is the portrait
    speech [F, L, C] half         speech features without context
    emotion [F] uint8             labels 0 to 8
    face_embedding [512] float    optional; zeros without it
    focus [h, w] half             optional; how much of a latent covers mouth, eyes or brows
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from memo_core.checks import shown, whole
from memo_core.files import Unfinished, replace_whole

from .reading import fits, parse_json
from .shard_index import (
    INDEX,
    METADATA,
    MOST,
    ShardError,
    folder_of,
    is_key,
    is_metadata,
    metadata_before,
    number_of,
    open_inside,
    pread,
    read_index,
    size_of,
)

_MAX_HEADER, _MAX_META = 2**20, 2**24  # bytes of a sample's safetensors header, and of its .json
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample lies: `size` bytes of safetensors at `offset` of the tar file `shard`.

    video: that it was cut from, by a name of its own; empty where the index does not say.
    crop_scale: side of the square that was cut out, in sides of the face; None where the index does not say.
    encoded_fps: frames a second; None likewise.
    """

    key: str
    shard: str
    offset: int
    size: int
    frames: int
    video: str = ""
    crop_scale: float | None = None
    encoded_fps: float | None = None


class Shards:
    """The samples of a folder, by the order in which they were written.

    Raises:
        ShardError: where there is no index, or a shard of it is missing or shorter than it was.
    """

    def __init__(self, folder: Path | str):
        self.folder = folder_of(folder)
        index = read_index(self.folder)
        if not index["shards"]:
            raise ShardError(f"no shards in {self.folder}: there is no {INDEX} there, or it lists none")
        self.encoders: dict[str, str] = index["encoders"]
        self.samples = [
            Sample(key, shard["name"], offset, size, frames, **(metadata[0] if metadata else {}))
            for shard in index["shards"]
            for key, offset, size, frames, *metadata in shard["samples"]
        ]
        for shard in index["shards"]:
            path = self.folder / shard["name"]
            found = size_of(path)
            if found != shard["bytes"]:
                raise ShardError(f"{path} should have {shard['bytes']} bytes, found {found}: copy or make it again")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """Tells sets of samples apart: their keys, order, lengths, and the encoders that made them."""
        listed = json.dumps([self.encoders, [(sample.key, sample.frames) for sample in self.samples]], sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    @property
    def crop_scale(self) -> float | None:
        """Mean side of the squares that were cut out, in sides of the face; None where no sample tells.

        Shards whose index is from before it had metadata are read through, once.
        """
        scales = [sample.crop_scale for sample in self._described if sample.crop_scale is not None]
        return fmean(scales) if scales else None

    @property
    def fps(self) -> int | None:
        """Frames a second of all samples, in whole ones; None where no sample tells.

        Raises:
            ShardError: they have several rates, which networks cannot tell apart.
        """
        rates = {round(sample.encoded_fps) for sample in self.samples if sample.encoded_fps is not None}
        if len(rates) > 1:
            several = ", ".join(map(str, sorted(rates)))
            raise ShardError(f"samples in {self.folder} have {several} frames a second: encode all at one --fps")
        return next(iter(rates), None)

    def videos(self) -> list[str]:
        """The video of each sample; one of which neither the index nor its .json tells is a video of its own.

        Shards whose index is from before it had metadata are read through, once.
        """
        return [sample.video or f"sample {sample.key}" for sample in self._described]

    @cached_property
    def _described(self) -> list[Sample]:
        """The samples; of those whose video the index does not tell, with what their .json does."""
        silent = {sample.shard for sample in self.samples if not sample.video}
        found = {name: self._metadata_in(name) for name in sorted(silent)}
        return [s if s.video else replace(s, **found[s.shard].get(s.key, {})) for s in self.samples]

    def _metadata_in(self, name: str) -> dict[str, dict[str, Any]]:
        """What the .json of a shard's samples tell, by key."""
        path, found = self.folder / name, {}
        try:
            with open_inside(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and member.name.endswith(".json") and member.size <= _MAX_META:
                        metadata = parse_json(tar.extractfile(member).read())
                        found[member.name.removesuffix(".json")] = metadata_before(metadata)
        except (tarfile.TarError, ValueError, OSError) as error:
            raise ShardError(f"{path} does not tell of its samples: {error}") from error
        return found

    def names(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's tensors by name; ShardError where the sample is damaged."""
        return {name: tuple(entry["shape"]) for name, entry in self._header(number)[1].items()}

    def read(self, number: int, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of a sample, or the rows of it from `rows.start` to `rows.stop`; only these are read from disk.

        Raises:
            ShardError: if the sample has no such tensor or rows.
        """
        sample = self._sample(number)
        base, header = self._header(number)
        if not isinstance(name, str):
            raise ShardError(f"a tensor's name is a text, received {shown(name)}")
        if name not in header:
            raise ShardError(f"{sample.key} in {sample.shard} has no {name}, only {', '.join(header)}")
        entry = header[name]
        shape, (first, end) = list(entry["shape"]), entry["data_offsets"]
        if rows is not None:
            count = shape[0] if shape else 0
            start, stop = (
                whole(side, 0, count) for side in ((rows.start, rows.stop) if isinstance(rows, slice) else "no")
            )
            if start is None or stop is None or start >= stop:
                which = f"{rows.start} to {rows.stop}" if isinstance(rows, slice) else shown(rows)
                raise ShardError(f"{sample.key}: rows {which} of {name}, which has {count}")
            row = (end - first) // count
            first, end, shape[0] = first + start * row, first + stop * row, stop - start
        if first == end:
            return torch.empty(shape, dtype=_DTYPES[entry["dtype"]])
        data = pread(self.folder / sample.shard, base + first, end - first)
        return torch.frombuffer(bytearray(data), dtype=_DTYPES[entry["dtype"]]).view(shape)

    def meta(self, number: int) -> dict[str, Any]:
        """What the sample's .json says.

        Raises:
            ShardError: there is none, or the shard is damaged.
        """
        sample = self._sample(number)
        path = self.folder / sample.shard
        try:
            with open_inside(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.getmember(f"{sample.key}.json")
                if not member.isreg() or member.size > _MAX_META:
                    raise ValueError(f"{member.name} is no file of at most {_MAX_META} bytes")
                return parse_json(tar.extractfile(member).read())
        except ShardError:
            raise
        except Exception as error:  # tarfile says of damage whatever comes of it
            raise ShardError(f"{path} does not tell about {sample.key}: {type(error).__name__}: {error}") from error

    def _sample(self, number: int) -> Sample:
        place = whole(number, 0, len(self.samples) - 1)
        if place is None:
            raise ShardError(f"{self.folder} has samples 0 to {len(self.samples) - 1}, received {shown(number)}")
        return self.samples[place]

    @lru_cache(maxsize=4096)  # noqa: B019 -- one reader lives as long as its process
    def _header(self, number: int) -> tuple[int, dict[str, Any]]:
        """Where a sample's data begin, and its tensors' dtypes, shapes and places there, all of which make sense."""
        sample = self._sample(number)
        path = self.folder / sample.shard
        length = int.from_bytes(pread(path, sample.offset, 8), "little")
        if length > min(sample.size - 8, _MAX_HEADER):
            raise ShardError(f"{path} holds no safetensors at {sample.offset}, where {sample.key} should lie")
        try:
            header = parse_json(pread(path, sample.offset + 8, length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if not _is_tensor(entry, sample.size - 8 - length):
                    raise ValueError(f"{name} is {shown(entry)}")
        except ValueError as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{path}: the header of {sample.key} does not make sense: {error}") from error
        return sample.offset + 8 + length, header


def _is_tensor(entry: Any, size: int) -> bool:
    """Whether a header's entry describes a tensor within `size` bytes of data."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES:
        return False
    shape, places = entry.get("shape"), entry.get("data_offsets")
    if not fits(shape, list[int]) or not fits(places, tuple[int, int]) or len(shape) > 16:
        return False
    if any(whole(side, 0, MOST) is None for side in shape):
        return False
    first, end = places
    return 0 <= first <= end <= size and end - first == math.prod(shape) * _DTYPES[entry["dtype"]].itemsize


class ShardWriter:
    """Adds samples to a folder of shards. Use as a context manager.

    A shard comes into being whole, under its final name, when it is full or when writing ends; then the index names
    it. After a crash at any point the index is right, and samples of the unfinished shard are simply not in `keys`.

    Args:
        folder: with or without shards.
        encoders: digests of what made the tensors, by name; a folder keeps to one set.
        samples_per_shard: a shard is closed after so many.

    Raises:
        ShardError: if the folder's samples come from other encoders.
    """

    def __init__(self, folder: Path | str, encoders: dict[str, str] | None = None, samples_per_shard: int = 256):
        self.folder, self.samples_per_shard = folder_of(folder), samples_per_shard
        encoders = encoders or {}
        if not fits(encoders, dict[str, str]) or whole(samples_per_shard, 1) is None:
            raise ShardError(
                f"encoders are digests by name and samples_per_shard a number from 1, received {shown(encoders)} and "
                f"{shown(samples_per_shard)}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = read_index(self.folder)
        if self._index["shards"] and self._index["encoders"] != encoders:
            raise ShardError(
                f"{self.folder} was made with {self._index['encoders']}, now it is {encoders}: "
                "delete the folder, or write into another"
            )
        self._index["encoders"] = encoders
        # Not their count: some may have been removed. One that no index names, after a crash, is written over.
        numbers = [number_of(shard["name"]) for shard in self._index["shards"]]
        self._next = 1 + max(numbers, default=-1)
        self.keys = {sample[0] for shard in self._index["shards"] for sample in shard["samples"]}
        self._open: list[tuple[Any, ...]] = []  # key, frames, and what the index tells besides
        self._tar: tarfile.TarFile | None = None
        self._file: Unfinished | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._file.discard()

    def _begin(self) -> tarfile.TarFile:
        """The next shard, to be written."""
        self._file = Unfinished(self.folder / f"clips-{self._next:06d}.tar")
        return tarfile.open(self._file.temporary, "w")

    def add(self, key: str, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
        """Appends a sample.

        Args:
            key: new, and without dots or slashes (WebDataset splits names at dots).
            tensors: by name.
            meta: becomes the sample's .json; the index repeats its `video`, `crop_scale` and `encoded_fps` (see
                `Sample`).
        """
        from safetensors import SafetensorError
        from safetensors.torch import save

        if not isinstance(key, str) or not is_key(key) or key in self.keys:
            raise ShardError(f"{shown(key)} cannot be a sample's key: it is empty, taken, or has a dot or slash in it")
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ShardError(f"a sample's tensors are tensors by name, received {shown(tensors)}")
        if "latents" not in tensors or not tensors["latents"].ndim or not len(tensors["latents"]):
            raise ShardError(f"{key} has no latents, only {', '.join(map(str, tensors)) or 'nothing'}")
        described = {name: meta[name] for name in METADATA if isinstance(meta, dict) and meta.get(name) is not None}
        if not is_metadata(described):
            said = "video is a text, crop_scale and encoded_fps are numbers above 0"
            raise ShardError(f"{key}: {said}, received {shown(described)}")
        try:
            data, about = save({name: t.contiguous() for name, t in tensors.items()}), json.dumps(meta or {}).encode()
        except (TypeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ShardError(f"{key} cannot be kept: {error}") from error
        if self._tar is None:
            self._tar = self._begin()
        _add(self._tar, f"{key}.safetensors", data)
        _add(self._tar, f"{key}.json", about)
        self.keys.add(key)
        self._open.append((key, len(tensors["latents"]), *([described] if described else [])))
        if len(self._open) >= self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is being written."""
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        try:
            self._index["shards"].append(self._finish(self._open))
        except BaseException:
            self._file.discard()
            raise
        self._open = []
        self._write_index()

    def remove(self, keys: set[str]) -> None:
        """Takes samples out. Shards that hold none of them stay as they are; the others are written anew, under a name
        that is not in use, and deleted when the index names the new ones.
        """
        self.close()
        shards = []
        for shard in self._index["shards"]:
            kept = [(key, frames, *metadata) for key, _, _, frames, *metadata in shard["samples"] if key not in keys]
            if 0 < len(kept) < len(shard["samples"]):
                names = {key for key, *_ in kept}
                shard = self._without(self.folder / shard["name"], names, kept)
            if kept:
                shards.append(shard)
        self._index["shards"] = shards
        self.keys -= keys
        self._write_index()
        named = {shard["name"] for shard in shards}
        for path in self.folder.glob("clips-*.tar"):
            if path.name not in named:  # also what an earlier run, killed before this line, left
                path.unlink()

    def _without(self, path: Path, names: set[str], kept: list[tuple[Any, ...]]) -> dict[str, Any]:
        """Writes the samples of these names of a shard into a new one; its entry for the index."""
        try:
            with open_inside(path) as file, tarfile.open(fileobj=file, mode="r:") as old, self._begin() as new:
                for member in old:
                    if member.isreg() and member.name.partition(".")[0] in names:
                        new.addfile(member, old.extractfile(member))
            return self._finish(kept)
        except BaseException as error:
            if self._file is not None:
                self._file.discard()
            if not isinstance(error, (tarfile.TarError, ValueError, OSError)):
                raise
            raise ShardError(f"{path} cannot be written anew: {error}") from error

    def _finish(self, samples: list[tuple[Any, ...]]) -> dict[str, Any]:
        """Names the unfinished file, which holds these samples (see `_open`); its entry for the index."""
        path = self._file.path
        with tarfile.open(self._file.temporary, "r:") as tar:
            places = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
        if lost := [key for key, *_ in samples if f"{key}.safetensors" not in places]:
            raise ShardError(f"{', '.join(lost[:10])} should be in it, and is not")
        self._file.finish()
        self._next += 1
        listed = [[key, *places[f"{key}.safetensors"], *rest] for key, *rest in samples]
        return {"name": path.name, "bytes": path.stat().st_size, "samples": listed}

    def _write_index(self) -> None:
        with replace_whole(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(self._index), encoding="utf-8")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
