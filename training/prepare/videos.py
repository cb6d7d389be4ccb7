"""The videos below RAW_DIR, each known by its content."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .rows import Row

VIDEOS = frozenset(
    ".3gp .asf .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)


def find_videos(raw: Path, out: Path, known: Iterable[Row] = ()) -> Iterator[Row]:
    """A row for every video below `raw`, with its identity; links are followed, each folder once, each content once.

    Args:
        known: rows of an earlier run; a file that has not changed since keeps its identity unread.
    """
    identities = {(row.source, tuple(row.changed)): row.identity for row in known if row.changed}
    folders, contents = set(), {}
    for folder, names, members in os.walk(raw, followlinks=True, onerror=_say):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in folders or Path(folder).resolve() == out:
            names.clear()
            continue
        folders.add((place.st_dev, place.st_ino))
        names.sort()
        for name in sorted(members):
            if os.path.splitext(name)[1].lower() not in VIDEOS:
                continue
            path = os.path.join(folder, name)
            source = os.path.relpath(path, raw)
            try:
                found = os.stat(path)
                if not stat.S_ISREG(found.st_mode):
                    yield _unusable(source, "cannot be read", "it is not a regular file")
                    continue
                changed = [found.st_size, found.st_mtime_ns]
                identity = identities.get((source, tuple(changed))) or _identify(path, found.st_size)
            except OSError as error:
                yield _unusable(source, "cannot be read", error.strerror or str(error))
                continue
            other = contents.setdefault(identity, source)
            if other == source:
                yield Row(id=identity, source=source, identity=identity, changed=changed)
            else:
                yield _unusable(source, "same file", f"as {other}")


def _identify(path: str, size: int) -> str:
    """Of the content: of its size and the first and last MiB, where containers keep what differs between videos."""
    digest = hashlib.sha256(b"%d\0" % size)
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:12]


def _unusable(source: str, cause: str, detail: str) -> Row:
    identity = hashlib.sha256(b"path\0" + os.fsencode(source)).hexdigest()[:12]
    return Row(id=identity, source=source, identity=identity).fail("scenes", cause, detail)


def _say(error: OSError) -> None:
    print(f"cannot look into {error.filename}: {error.strerror}", file=sys.stderr)
