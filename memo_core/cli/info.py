"""`memo info`: what a checkpoint, an adapter or a memory state holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..budget.counting import GIB
from ..budget.report import DRIVER, released, table
from ..checkpoint.layout import EMBEDDED, EMOTION_HEAD, VOCAL_SEPARATOR
from ..checkpoint.load import load
from ..devices import free_bytes
from ..encoders.face import DETECTOR, EMBEDDER, FOLDER
from ..errors import MemoError
from .output import OK


def info(args: argparse.Namespace) -> int:
    from ..checkpoint import lora
    from ..memory.state import MemoryState

    if args.budget is not None:
        return _print_budget(args)
    if args.size is not None:
        raise MemoError("--size is for --budget")
    if args.target not in EMBEDDED and Path(args.target).is_file():
        if lora.is_adapter(args.target):
            print(lora.read(args.target).describe())
        else:
            print(MemoryState.load(args.target).inspect())
        return OK
    nets = load(args.target)  # all of it: what is printed is known to fit together
    parts = {
        "reference_net": nets.reference_net,
        "diffusion_net": nets.diffusion_net,
        "image_proj": nets.image_proj,
        "audio_proj": nets.audio_proj,
        "vae": nets.vae,
        "wav2vec2": nets.speech_encoder,
        "emotion2vec": nets.emotion_encoder,
        EMOTION_HEAD: nets.emotion_head,
    }
    face_models = [f"{FOLDER}/{name}" for name in (DETECTOR, EMBEDDER)]
    side = 8 * nets.sample_size
    print(f"checkpoint   {nets.folder}\ndigest       {nets.digest}\ntrained at   {side}x{side} pixels\n")
    print(f"{'network':<32} {'parameters':>14} {'on disk':>10}")
    for name, net in parts.items():
        size = sum(file.stat().st_size for file in (nets.folder / name).iterdir() if file.is_file())
        print(f"{name:<32} {sum(p.numel() for p in net.parameters()):>14,} {size / 1e6:>7.1f} MB")
    print()
    for name in (*face_models, VOCAL_SEPARATOR):
        print(f"{'there  ' if (nets.folder / name).is_file() else 'missing'}      {name} (optional)")
    return OK


def _print_budget(args: argparse.Namespace) -> int:
    import torch

    from ..inputs.portrait import check_size

    if args.target == "released":
        nets = released()
    else:
        nets = load(args.target, "meta", torch.bfloat16)
    height, width = args.size or (8 * nets.sample_size,) * 2
    check_size((height, width))
    if max(height, width) > 4096:
        raise MemoError(f"--size is {width}x{height}; up to 4096 pixels a side are counted")
    budgets = [(f"{size:g} GB card", int(size * GIB) - DRIVER) for size in (args.budget or 12, 8)]
    if args.budget:
        budgets = budgets[:1]
    elif torch.cuda.is_available():
        budgets.append((torch.cuda.get_device_name(), free_bytes(torch.device("cuda"))))
    print(table(nets, height, width, budgets))
    return OK
