"""`memo info`: what a checkpoint, an adapter or a memory state holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MemoError
from .arguments import gigabytes, size
from .output import OK


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    text = "a folder or an embedded checkpoint's name; a file; with --budget also `released`, which needs no weights"
    sub.add_argument("target", metavar="CHECKPOINT|LORA|STATE", help=text)
    text = (
        "print what sampling takes on a GPU in bfloat16, and how it gets by on a card of so many GB (default: cards of "
        "12 and 8 GB, and the one in this machine)"
    )
    sub.add_argument("--budget", type=gigabytes, nargs="?", const=0.0, metavar="GB", help=text)
    text = "pixels, multiples of 64, for --budget (default: as trained)"
    sub.add_argument("--size", type=size, metavar="N|WxH", help=text)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..checkpoint import lora
    from ..checkpoint.layout import EMBEDDED
    from ..memory import file as memory

    if args.budget is not None:
        print(_budget(args))
        return OK
    if args.size is not None:
        raise MemoError("--size is for --budget")
    if args.target in EMBEDDED or not Path(args.target).is_file():
        print(_checkpoint(args.target))
    elif lora.is_adapter(args.target):
        print(lora.describe(args.target))
    else:
        print(memory.describe(args.target))
    return OK


def _checkpoint(target: str) -> str:
    from ..checkpoint.layout import VOCAL_SEPARATOR
    from ..checkpoint.summary import summarise
    from ..encoders.face import DETECTOR, EMBEDDER, FOLDER
    from ..release import VAE_SCALE

    found = summarise(target)
    side = VAE_SCALE * found.sample_size
    lines = [
        f"checkpoint   {found.folder}",
        f"digest       {found.digest}",
        f"trained at   {side}x{side} pixels",
        "",
        f"{'network':<32} {'parameters':>14} {'on disk':>10}",
    ]
    for name, parameters in found.parameters.items():
        stored = sum(file.stat().st_size for file in (found.folder / name).iterdir() if file.is_file())
        lines.append(f"{name:<32} {parameters:>14,} {stored / 1e6:>7.1f} MB")
    lines.append("")
    for name in (f"{FOLDER}/{DETECTOR}", f"{FOLDER}/{EMBEDDER}", VOCAL_SEPARATOR):
        lines.append(f"{'there  ' if (found.folder / name).is_file() else 'missing'}      {name} (optional)")
    return "\n".join(lines)


def _budget(args: argparse.Namespace) -> str:
    import torch

    from ..budget.counting import GIB
    from ..budget.report import DRIVER, released, table
    from ..checkpoint.load import load
    from ..devices import free_bytes
    from ..inputs.portrait import check_size

    nets = released() if args.target == "released" else load(args.target, "meta", torch.bfloat16)
    height, width = args.size or (8 * nets.sample_size,) * 2
    check_size((height, width))
    if max(height, width) > 4096:
        raise MemoError(f"--size is {width}x{height}; up to 4096 pixels a side are counted")
    budgets = [(f"{card:g} GB card", int(card * GIB) - DRIVER) for card in (args.budget or 12, 8)]
    if args.budget:
        budgets = budgets[:1]
    elif torch.cuda.is_available() and (free := free_bytes(torch.device("cuda"))) is not None:
        budgets.append((torch.cuda.get_device_name(), free))
    return table(nets, height, width, budgets)
