"""The host's folders: checkpoints, adapters, what this pack keeps, temporary videos."""

from __future__ import annotations

import os
import re
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import InputImpl

from ...memo_core.checkpoint.layout import EMBEDDED, assets
from ...memo_core.checks import shown
from ...memo_core.errors import CheckpointError, MemoError
from ...memo_core.sampling.store import WindowStore

MODELS = "memo"  # the folder under models/, and its name in extra_model_paths.yaml
LORAS = "loras"  # the host's own folder
RELEASED = "memo"  # the checkpoint offered there whether it has been downloaded or not
# What Windows takes for devices, in any folder and whatever suffix follows.
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)\s*(\..*)?", re.I | re.S)


# --- Folders ----------------------------------------------------------------------------------------------------------


def register_models_folder() -> None:
    """models/memo, besides what extra_model_paths.yaml names for `memo`."""
    folders, extensions = folder_paths.folder_names_and_paths.get(MODELS, ([], set()))
    default = os.path.join(folder_paths.models_dir, MODELS)
    if default not in folders:
        folders = [*folders, default]
    folder_paths.folder_names_and_paths[MODELS] = (folders, extensions)


def checkpoints() -> dict[str, Path]:
    """Checkpoints by name: the embedded ones, the released one, and every other folder in models/memo."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(MODELS)]
    found = {name: assets() / name for name in EMBEDDED}
    for root in roots:
        try:
            folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        except OSError:  # absent, or nobody may look into it
            continue
        for folder in folders:
            if not folder.name.startswith("."):
                found.setdefault(folder.name, folder)
    return found | {RELEASED: found.get(RELEASED, roots[0] / RELEASED)}


def loras() -> list[str]:
    """Names of the .safetensors files in the host's models/loras, of MEMO or not."""
    try:
        names = folder_paths.get_filename_list(LORAS)
    except KeyError:  # a host without that folder
        return []
    return [name for name in names if name.endswith(".safetensors")]


def lora_file(name: str) -> Path:
    """The file of one of `loras`; CheckpointError where it is gone."""
    path = folder_paths.get_full_path(LORAS, name) if name in loras() else None
    if path is None:
        raise CheckpointError(f"the adapter {shown(name)} is not in models/loras; press R and choose another, or none")
    return Path(path)


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The file `name` under `root`, which need not exist.

    Raises:
        MemoError: an absolute path, one that leads out of the root (also by a link) or in a circle, a name that stands
            for a device, or one that the system cannot hold.
    """
    parts = re.split(r"[\\/]", name) if isinstance(name, str) else []
    bad = (
        not any(parts)
        or "\0" in name
        or ":" in name
        or name.startswith(("/", "\\", "~"))
        or ".." in parts
        or any(_DEVICE_NAMES.fullmatch(part.strip(" .")) for part in parts)
    )
    why = ""
    if not bad:
        try:
            name.encode()  # a lone surrogate is no character: such a file could be named by nobody
            base = Path(root).resolve()
            path = base / name
            bad = not path.resolve().is_relative_to(base)
            with suppress(FileNotFoundError, NotADirectoryError):  # a new one
                path.stat()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, letters that do not exist
            bad, why = True, f" ({getattr(error, 'strerror', None) or error})"
    if bad:
        raise MemoError(
            f"{shown(name)} is not a file inside {Path(root).name}/{why}: give a plain name, with "
            "subfolders if you like"
        )
    return path


def user_folder() -> Path:
    """Where this pack keeps what outlives a run, inside the host's user directory."""
    return Path(folder_paths.get_user_directory()) / MODELS


@lru_cache(maxsize=1)
def window_store() -> WindowStore | None:
    """Finished windows, kept in the host's user directory. One for all runs: it remembers that a disk is full."""
    return WindowStore.default(user_folder() / "windows")


def temporary_folder() -> Path:
    """The host's, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def temporary_video() -> Path:
    """A new file name in the host's temporary folder."""
    return temporary_folder() / f"memo_{uuid.uuid4().hex}.mp4"


_written: list[Path] = []


def video_of(path: Path) -> InputImpl.VideoFromFile:
    """The host's VIDEO of a temporary file."""
    _written.append(path)
    return InputImpl.VideoFromFile(str(path))


def lost_videos() -> int:
    """How many temporary videos are gone: a number that changes when the host's cache names files that vanished."""
    return sum(not path.exists() for path in _written)
