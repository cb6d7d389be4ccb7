"""Files: opened only where they are files, and written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

fcntl: ModuleType | None
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
        file = open(name, "rb", opener=_open_without_waiting)  # noqa: SIM115  # the caller closes it
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
        try:
            self.path = Path(path)
            with suppress(FileNotFoundError):
                os.lstat(self.path)  # a name that is too long is refused now, not when all is written
            remove_abandoned(self.path)
            self.temporary = self.path.with_name(f".{_known_as(self.path)}.{uuid.uuid4().hex[:8]}.part")
        except (TypeError, ValueError) as error:  # no path; a NUL or a lone surrogate in it
            raise OSError(errno.EINVAL, f"this is no file name ({error})", repr(path)) from error
        # Locked before it has the name that others look for: without a lock it would look abandoned.
        unlocked = self.temporary.with_suffix(".new")
        try:
            number = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except OSError as error:
            raise self._named(error) from error
        self._mode, self._lock = stat.S_IMODE(os.fstat(number).st_mode), None
        if fcntl is None:
            os.close(number)  # what has it open to write keeps it there
        else:
            self._lock = number
            with suppress(OSError):  # a file system without locks: there nobody can lock it to remove it, either
                fcntl.flock(number, fcntl.LOCK_EX)
        os.rename(unlocked, self.temporary)

    def finish(self, path: str | os.PathLike[str] | None = None) -> None:
        """Gives the file its final name, or another one, and the access rights of any new file."""
        # Some libraries put a file of their own, which nobody else may read, in the place of ours.
        if fcntl is not None:
            os.chmod(self.temporary, self._mode)
        try:
            os.replace(self.temporary, self.path if path is None else path)
        except OSError as error:
            raise self._named(error) from error
        self._unlock()

    def _named(self, error: OSError) -> OSError:
        """The error, about the file that was asked for."""
        return error if error.errno is None else OSError(error.errno, error.strerror, str(self.path))

    def discard(self) -> None:
        """Removes the temporary file; nothing appears under the final name."""
        self._unlock()
        with suppress(OSError):  # someone else has it open
            self.temporary.unlink(missing_ok=True)

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
    ours = re.compile(rf"\.{re.escape(_known_as(path))}\.[0-9a-f]{{8}}\.part")
    removed = []
    for name in _unfinished_in(str(path.parent.absolute())):
        if ours.fullmatch(name) and remove_if_abandoned(path.parent / name):
            removed.append(path.parent / name)
            logger.warning("removed %s, which a run that was killed had left", removed[-1])
    return removed


@lru_cache(maxsize=1024)
def _unfinished_in(folder: str) -> tuple[str, ...]:
    """Names of the temporary files that lay in a folder when this process first looked.

    Later ones are not left by earlier runs, and a folder of thousands of files is not listed for each.
    """
    try:
        return tuple(entry.name for entry in os.scandir(folder) if entry.name.endswith(".part"))
    except OSError:
        return ()


def remove_if_abandoned(temporary: str | os.PathLike[str]) -> bool:
    """Removes a temporary file unless a process that lives is writing it; whether it did."""
    try:
        if fcntl is None:  # Windows refuses while anyone has it open
            os.unlink(temporary)
            return True
        number = os.open(temporary, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return False
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(temporary)
    except OSError:  # its writer lives; or this file system has no locks
        return False
    finally:
        os.close(number)
    return True


def _known_as(path: Path) -> str:
    """The part of a file's name that its temporary name repeats."""
    name = path.name
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name


def short_hash(text: str) -> str:
    """16 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
