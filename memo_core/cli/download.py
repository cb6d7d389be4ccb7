"""`memo download`: fetches the released weights."""

from __future__ import annotations

import argparse

from .output import INTERRUPTED, OK, _say


def download(args: argparse.Namespace) -> int:
    from ..checkpoint import download as weights

    print(weights.licences(args.only), flush=True)
    if not args.only or "face" in args.only:
        print("The face models are not for commercial use: leave them out with --only and the other names.", flush=True)
    try:
        fetched = weights.download(args.folder, args.only)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        return INTERRUPTED
    print(f"{args.folder}: {len(fetched)} files fetched" if fetched else f"{args.folder}: nothing was missing")
    return OK
