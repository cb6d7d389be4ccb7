"""`memo download`: fetches the released weights."""

from __future__ import annotations

import argparse

from .output import INTERRUPTED, OK, say


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    sub.add_argument("folder", metavar="FOLDER", nargs="?", default="memo-weights", help="(default: %(default)s, here)")
    sub.add_argument("--only", metavar="PART", nargs="+", help="fetch these parts, named as in the licences")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..checkpoint import download as weights

    print(weights.licences(args.only), flush=True)
    if not args.only or "face" in args.only:
        print("The face models are not for commercial use: leave them out with --only and the other names.", flush=True)
    try:
        fetched = weights.download(args.folder, args.only)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return INTERRUPTED
    print(f"{args.folder}: {len(fetched)} files fetched" if fetched else f"{args.folder}: nothing was missing")
    return OK
