"""The `memo` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import MemoError
from . import download, emotion, generate, info, sheet
from .output import INTERRUPTED, fail, say

_COMMANDS = {
    "generate": (
        generate,
        "Make a video of PORTRAIT speaking VOICE. Ctrl-C keeps what is finished and says how to go on.",
    ),
    "emotion": (emotion, "Print the emotions heard in VOICE and draw them."),
    "info": (info, "Describe a checkpoint folder, an adapter file or a memory state file."),
    "sheet": (sheet, "Draw evenly spaced frames of VIDEO, with their times, as one picture."),
    "download": (
        download,
        "Print the licences of the released weights and fetch them (13 GB) into FOLDER. Called again it goes on.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the given arguments (None: the process's) and returns the exit code.

    0 when all is done, 1 after an error (one line on stderr says which), 2 for wrong usage, 130 after Ctrl-C or a
    SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what no text can
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="memo: %(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _prepare_allocator()
    parser = build_parser()
    if threading.current_thread() is threading.main_thread():
        # A stopped job keeps what it has, as with Ctrl-C; so does one whose terminal was closed, unless it runs on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, to their programmers
            return args.run(args)
    except KeyboardInterrupt:
        say("interrupted; no file was written")
        return INTERRUPTED
    except MemoryError:
        return fail("out of memory: try a smaller --size or a shorter --duration")
    except MemoError as error:
        return fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail("out of memory: try a smaller --size, or --dtype bfloat16")


def _prepare_allocator() -> None:
    """Has torch grow its pieces of GPU memory instead of making new ones, before it starts: less is lost between them.

    Not on Windows, which cannot; not where someone has chosen.
    """
    from importlib.metadata import PackageNotFoundError, version

    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before
    if sys.platform == "win32" or any(name in os.environ for name in names):
        return
    try:
        major, minor = (int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return
    os.environ[names[(major, minor) < (2, 9)]] = "expandable_segments:True"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without all that would be right."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it parses is the command's function."""
    about = "A portrait and a voice in, a talking video out."
    parser = _Parser("memo", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"memo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for name, (command, text) in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
