"""Files: opened only where they are files, and written whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that someone has open cannot be removed in the first place
    fcntl = None

logger = logging.getLogger(__name__)

_LONGEST = 200  # bytes of a file's name that its temporary name repeats; systems allow 255 in all


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading, in binary.

    Anything else (a pipe, which would make the program wait for ever, a device, a folder, a name that the system cannot
    hold, a value that is no path) raises OSError, with a message that says so.
    """
    try:
        name = os.fspath(path)
        file = open(name, "rb", opener=_open_without_waiting)
    except (TypeError, ValueError) as error:  # no path; a NUL or a lone surrogate in it
        raise OSError(errno.EINVAL, f"this is no file name ({error})", repr(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", name)
    return file


def _open_without_waiting(name: str | bytes, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


class Unfinished:
    """A file that is being written under a temporary name beside its own: `.NAME.xxxxxxxx.part`.

    It is locked for as long as this process lives, so that whoever writes a file of that name next can tell it from one
    that a killed run left, and remove that; a log line says so.

    Args:
        path: the final name, in a folder that exists.

    Attributes:
        temporary: write here, by this name, until `finish` or `discard`.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        remove_abandoned(self.path)
        self.temporary = self.path.with_name(f".{_known_as(self.path)}.{uuid.uuid4().hex[:8]}.part")
        self._lock: int | None = os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        _try_lock(self._lock)

    def finish(self, path: str | os.PathLike[str] | None = None) -> None:
        """Gives the file its final name, or another one, and the access rights of any new file."""
        # Some libraries put a file of their own, which nobody else may read, in the place of ours.
        os.chmod(self.temporary, stat.S_IMODE(os.fstat(self._lock).st_mode))
        if os.name == "nt":
            self._unlock()
        os.replace(self.temporary, self.path if path is None else path)
        self._unlock()

    def discard(self) -> None:
        """Removes the temporary file; nothing appears under the final name."""
        self._unlock()
        try:
            self.temporary.unlink(missing_ok=True)
        except OSError:  # someone else has it open
            pass

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def replace_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well; an error leaves `path` as it was.

    Raises OSError where the folder cannot be written.
    """
    file = Unfinished(path)
    try:
        yield file.temporary
        file.finish()
    except BaseException:
        file.discard()
        raise


def remove_abandoned(path: str | os.PathLike[str]) -> list[Path]:
    """Removes the temporary files of `path` whose process is gone, and returns and logs their names."""
    path = Path(path)
    # Up to version 0.1 videos were written without the suffix in the temporary name.
    names = "|".join(re.escape(name) for name in {_known_as(path), path.stem})
    ours = re.compile(rf"\.({names})\.[0-9a-f]{{8}}\.part")
    removed = []
    try:
        entries = [entry for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]
    except OSError:
        return []
    for entry in entries:
        if remove_if_abandoned(entry.path):
            removed.append(path.parent / entry.name)
            logger.warning("removed %s, which a run that was killed had left", removed[-1])
    return removed


def remove_if_abandoned(temporary: str | os.PathLike[str]) -> bool:
    """Removes a temporary file unless a process that lives is writing it; whether it did."""
    try:
        number = os.open(temporary, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode) or not _try_lock(number):
            return False
        if fcntl is not None:
            os.unlink(temporary)
            return True
    except OSError:
        return False
    finally:
        os.close(number)
    try:
        os.unlink(temporary)  # Windows refuses while anyone has it open
    except OSError:
        return False
    return True


def _known_as(path: Path) -> str:
    """The part of a file's name that its temporary name repeats."""
    name = path.name
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name


def _try_lock(number: int) -> bool:
    """Locks an open file until it is closed; False where another holds it, or the file system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
