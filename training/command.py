"""`python -m training train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from memo_core.checkpoint.digest import base_digest

from . import dry_run, engine, export, initialise
from .budget import UTILISATION
from .config import ConfigError, Stage, flatten
from .nets import RELEASED, Nets
from .presets import PRESETS, settings


def add_command(commands: argparse._SubParsersAction) -> None:
    """`train`."""
    train = commands.add_parser(
        "train",
        help="train or resume a stage",
        description="Train or resume a stage; `accelerate launch -m training train ...` does so with many processes.",
    )
    train.add_argument("preset", choices=PRESETS, help="the stage")
    train.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="changes: optimizer.batch=2 steps=500",
    )
    train.add_argument("--data", type=Path, help="folder of shards")
    train.add_argument("--out", type=Path, help="folder of the run; one that was stopped goes on")
    train.add_argument(
        "--start", type=Path, help="checkpoint in the released layout, toon, or the folder of a run: its last one"
    )
    train.add_argument("--sd15", type=Path, help="start from Stable Diffusion 1.5: its folder, or its unet folder")
    train.add_argument(
        "--animatediff",
        type=Path,
        help="temporal modules from this motion module (with --sd15): mm_sd_v15_v2.ckpt has all that there are, "
        "v3_sd15_mm.ckpt lacks the middle block's",
    )
    train.add_argument(
        "--encoders",
        type=Path,
        help="checkpoint whose VAE and encoders complete the new ones, and make the pictures (default: --start)",
    )
    train.add_argument(
        "--new-data", action="store_true", help="go on with other data than the run was begun with, such as more"
    )
    train.add_argument("--show", action="store_true", help="print the settings and stop")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print memory, disk, hours, data and batch, draw the first batch in OUT/dry-run.png, and stop",
    )
    train.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="of --dry-run: share of the device's speed (%(default)s)"
    )
    train.add_argument(
        "--processes",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        help="of --dry-run: as many as will train (those that were launched)",
    )
    train.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    config = settings(args.preset, args.set, args.out)
    if args.show:
        print("\n".join(f"{name}={value}" for name, value in flatten(config).items()))
        return
    if args.data is None or args.out is None:
        raise ConfigError("give --data, the folder of shards, and --out, the folder of the run")
    if (args.start is None) == (args.sd15 is None):
        raise ConfigError("give either --start (a checkpoint, or a run) or --sd15 (Stable Diffusion 1.5)")
    start = None if args.start is None else export.weights_of(args.start)
    encoders = args.encoders or (None if start is None else export.encoders_of(start))
    if args.dry_run:
        if int(os.environ.get("RANK", "0")):
            return  # the first of those that were launched says it all
        sizes = RELEASED if start is None else export.read_sizes(start)
        dry_run.report(config, args.data, args.out, sizes, encoders, args.processes, args.utilisation)
        return
    nets = _nets(start, args)
    last = engine.train(config, args.data, args.out, nets, encoders, _base(config, start), args.new_data)
    print(f"the last checkpoint is {last}")


def _nets(start: Path | None, args: argparse.Namespace) -> Nets:
    if start is not None:
        return export.read_nets(start)
    nets = Nets()
    print(initialise.from_stable_diffusion(nets, args.sd15))
    if args.animatediff is not None:
        print(initialise.from_animatediff(nets, args.animatediff))
    return nets


def _base(config: Stage, start: Path | None) -> str:
    """Digest of the checkpoint that adapters belong to."""
    if not config.lora.rank or start is None:
        return ""
    if not export.is_exported(start):
        raise ConfigError(f"adapters belong to a checkpoint that others can load: python -m training export {start}")
    return base_digest(start)
