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
import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


class ShardError(ValueError):
    """A shard, an index or a sample that cannot be used."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample lies: `size` bytes of safetensors at `offset` of the tar file `shard`."""

    key: str
    shard: str
    offset: int
    size: int
    frames: int


class Shards:
    """The samples of a folder, by the order in which they were written.

    Raises:
        ShardError: where there is no index, or a shard of it is missing or shorter than it was.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if not index["shards"]:
            raise ShardError(f"no shards in {self.folder}: there is no {INDEX} there, or it lists none")
        self.encoders: dict[str, str] = index["encoders"]
        self.samples = [
            Sample(key, shard["name"], offset, size, frames)
            for shard in index["shards"]
            for key, offset, size, frames in shard["samples"]
        ]
        for shard in index["shards"]:
            path = self.folder / shard["name"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                raise ShardError(f"{path} should have {shard['bytes']} bytes, found {found}: copy or make it again")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """Tells sets of samples apart: their keys, order, lengths, and the encoders that made them."""
        listed = json.dumps([self.encoders, [(sample.key, sample.frames) for sample in self.samples]], sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def names(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's tensors by name."""
        return {name: tuple(entry["shape"]) for name, entry in self._header(number)[1].items()}

    def read(self, number: int, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of a sample, or the rows of it from `rows.start` to `rows.stop`; only these are read from disk.

        Raises:
            ShardError: if the sample has no such tensor or rows.
        """
        sample = self.samples[number]
        base, header = self._header(number)
        if name not in header:
            raise ShardError(f"{sample.key} in {sample.shard} has no {name}, only {', '.join(header)}")
        entry = header[name]
        shape, (first, end) = list(entry["shape"]), entry["data_offsets"]
        if rows is not None:
            if not 0 <= rows.start < rows.stop <= shape[0]:
                raise ShardError(f"{sample.key}: rows {rows.start} to {rows.stop} of {name}, which has {shape[0]}")
            row = (end - first) // shape[0]
            first, end, shape[0] = first + rows.start * row, first + rows.stop * row, rows.stop - rows.start
        data = _pread(self.folder / sample.shard, base + first, end - first)
        return torch.frombuffer(bytearray(data), dtype=_DTYPES[entry["dtype"]]).view(shape)

    def meta(self, number: int) -> dict[str, Any]:
        """What the sample's .json says."""
        sample = self.samples[number]
        with tarfile.open(self.folder / sample.shard) as tar:
            return json.load(tar.extractfile(f"{sample.key}.json"))

    @lru_cache(maxsize=4096)  # one reader lives as long as its process
    def _header(self, number: int) -> tuple[int, dict[str, Any]]:
        sample = self.samples[number]
        path = self.folder / sample.shard
        length = int.from_bytes(_pread(path, sample.offset, 8), "little")
        if length > sample.size:
            raise ShardError(f"{path} holds no safetensors at {sample.offset}, where {sample.key} should lie")
        header = json.loads(_pread(path, sample.offset + 8, length))
        header.pop("__metadata__", None)
        return sample.offset + 8 + length, header


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
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = _read_index(self.folder)
        encoders = encoders or {}
        if self._index["shards"] and self._index["encoders"] != encoders:
            raise ShardError(
                f"{self.folder} was made with {self._index['encoders']}, now it is {encoders}: "
                "delete the folder, or write into another"
            )
        self._index["encoders"] = encoders
        # Not their count: some may have been removed. One that no index names, after a crash, is written over.
        numbers = [int(shard["name"].removeprefix("clips-").removesuffix(".tar")) for shard in self._index["shards"]]
        self._next = 1 + max(numbers, default=-1)
        self.keys = {sample[0] for shard in self._index["shards"] for sample in shard["samples"]}
        self._open: list[tuple[str, int]] = []
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self.folder / "unfinished.tmp"

    def add(self, key: str, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
        """Appends a sample; `key` must be new and without dots or slashes (WebDataset splits names at dots)."""
        from safetensors.torch import save

        if not key or key in self.keys or set(key) & set("./\\"):
            raise ShardError(f"{key!r} cannot be a sample's key: it is empty, taken, or has a dot or slash in it")
        if self._tar is None:
            self._tar = tarfile.open(self._temporary, "w")
        _add(self._tar, f"{key}.safetensors", save({name: t.contiguous() for name, t in tensors.items()}))
        _add(self._tar, f"{key}.json", json.dumps(meta or {}).encode())
        self.keys.add(key)
        self._open.append((key, len(tensors["latents"])))
        if len(self._open) >= self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is being written."""
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._index["shards"].append(self._finish(self._open))
        self._open = []
        self._write_index()

    def remove(self, keys: set[str]) -> None:
        """Takes samples out. Shards that hold none of them stay as they are; the others are written anew, under a name
        that is not in use, and deleted when the index names the new ones."""
        self.close()
        shards = []
        for shard in self._index["shards"]:
            kept = [(key, frames) for key, _, _, frames in shard["samples"] if key not in keys]
            if 0 < len(kept) < len(shard["samples"]):
                names = {key for key, _ in kept}
                with tarfile.open(self.folder / shard["name"]) as old, tarfile.open(self._temporary, "w") as new:
                    for member in old:
                        if member.name.partition(".")[0] in names:
                            new.addfile(member, old.extractfile(member))
                shard = self._finish(kept)
            if kept:
                shards.append(shard)
        self._index["shards"] = shards
        self.keys -= keys
        self._write_index()
        named = {shard["name"] for shard in shards}
        for path in self.folder.glob("clips-*.tar"):
            if path.name not in named:  # also what an earlier run, killed before this line, left
                path.unlink()

    def _finish(self, samples: list[tuple[str, int]]) -> dict[str, Any]:
        """Names the temporary file, which holds these samples (key, frames); its entry for the index."""
        with tarfile.open(self._temporary) as tar:
            places = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
        name = f"clips-{self._next:06d}.tar"
        self._next += 1
        os.replace(self._temporary, self.folder / name)
        listed = [[key, *places[f"{key}.safetensors"], frames] for key, frames in samples]
        return {"name": name, "bytes": (self.folder / name).stat().st_size, "samples": listed}

    def _write_index(self) -> None:
        temporary = self.folder / f"{INDEX}.tmp"
        temporary.write_text(json.dumps(self._index), encoding="utf-8")
        os.replace(temporary, self.folder / INDEX)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        return {"encoders": {}, "shards": []}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path} is damaged: {error}") from error


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _pread(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ShardError(f"{path} ends before byte {offset + size}: copy or make it again")
    return data
