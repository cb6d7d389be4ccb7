"""What commands say, and the files they write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MemoError
from ..files import replace_whole

if TYPE_CHECKING:
    from PIL import Image

OK, FAILED, INTERRUPTED = 0, 1, 130  # exit codes; argparse adds 2 for wrong usage


def save_picture(picture: Image.Image, path: Path, kind: str) -> None:
    """Writes a picture and says where; MemoError where it cannot be written."""
    try:
        with replace_whole(path) as temporary:
            picture.save(temporary, kind)
    except OSError as error:
        raise MemoError(f"cannot write {path}: {error.strerror or error}") from error
    print(path)


def named_after(source: str, suffix: str) -> str:
    """Name of a file here for what is made of `source`."""
    if not Path(source).name:
        raise MemoError(f"{source!r} is no file")
    return Path(source).stem + suffix


def check_output(path: str | Path | None, option: str, *others: str | Path | None) -> None:
    """MemoError, before anything is done, where a file cannot be written or would replace one of the others."""
    if path is None:
        return
    if not os.path.isdir(Path(path).absolute().parent):
        raise MemoError(f"cannot write {path}: there is no folder {Path(path).parent}")
    if os.path.isdir(path):
        raise MemoError(f"cannot write {path}: it is a folder")
    for other in others:
        if not other:
            continue
        if os.path.abspath(path) == os.path.abspath(other) or _are_one(path, other):
            raise MemoError(f"{path} would replace {other}; name another with {option}")


def _are_one(a: str | Path, b: str | Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # not there yet
        return False


def check_picture(path: Path, source: str) -> str:
    """What `check_output` checks, and the kind of picture that the name stands for."""
    from PIL import Image

    check_output(path, "-o", source)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise MemoError(f"cannot write {path}: name a .png")
    return kind


def say(text: str) -> None:
    """Prints a line on stderr."""
    print(f"memo: {text}", file=sys.stderr)


def fail(text: str) -> int:
    """Says what went wrong; gives the exit code."""
    say(f"error: {text}")
    return FAILED
