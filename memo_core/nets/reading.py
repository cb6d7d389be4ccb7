"""What the files of a network say, read without torch: settings, and weights by name."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import whole
from ..errors import CheckpointError
from ..files import open_regular
from ..tensorfile import open_arrays

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names it
MAX_SETTINGS_BYTES = 2**20  # released ones have two thousand
MAX_DEPTH = 50  # of settings in settings
_MAX_PICKLE_BYTES = 2**24  # what a torch file says of its tensors; the released emotion2vec takes 200 thousand
_MOST_SIDES, _LONGEST_SIDE = 8, 2**40  # of a tensor


def read_text(path: Path) -> str:
    """The text of a file of settings; CheckpointError where there is none, or far too much."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_SETTINGS_BYTES + 1)
        if len(content) > MAX_SETTINGS_BYTES:
            raise ValueError(f"it has more than {MAX_SETTINGS_BYTES} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        content = json.loads(read_text(path))
        _check_depth(content)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path} cannot be read: it is nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not settings by name")
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
    if level:
        raise RecursionError


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What libraries raise inside, reading a file of weights, as CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors, which are never run; "
            "re-save it with tensors only"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever the two libraries make of bytes that nobody checked
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


class Listed(NamedTuple):
    """What a torch file says of a tensor."""

    shape: tuple[int, ...]


def list_weights(path: Path) -> dict[str, Any] | None:
    """The weights of a file by name, each with its `shape`; those of a safetensors file are arrays on the file (see
    `tensorfile.float32`), those of a torch file `Listed`, or in further dictionaries.

    None where only torch can tell: for numbers of 8 bits, torch files of an older format, or anything unusual in one.

    Raises:
        CheckpointError: a safetensors file is absent or damaged.
    """
    if path.suffix != ".safetensors":
        return _listed(path)
    with reading(path), open_arrays(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names} if file.all_known else None


def _listed(path: Path) -> dict[str, Any] | None:
    """The tensors of a torch file, without their numbers; None where that takes torch."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as parts:
            (name,) = (name for name in parts.namelist() if name.endswith("/data.pkl"))
            if parts.getinfo(name).file_size > _MAX_PICKLE_BYTES:
                return None
            with parts.open(name) as stored:
                content = _Lister(stored).load()
    except Exception:  # whatever it is, torch will say so
        return None
    plain = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    return dict(content) if plain else None


class _Lister(pickle._Unpickler):
    """Reads what `torch.save` says of tensors. It knows the few names below and calls nothing else.

    Python's own, whose memo is a dictionary: in that of the C code an index of four bytes is room for so many entries.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def _rebuilt(storage: None, offset: int, shape: tuple[int, ...], *_: Any) -> Listed:
    if len(shape) > _MOST_SIDES or any(whole(side, 0, _LONGEST_SIDE) is None for side in shape):
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} sides")
    return Listed(tuple(shape))
