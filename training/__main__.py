"""`python -m training`: prepares data, trains the stages of MEMO, adapters and the emotion detector, and measures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memo_core.checkpoint.digest import base_digest
from memo_core.checkpoint.layout import EMBEDDED, find
from memo_core.errors import MemoError

from . import budget
from .config import ConfigError, override
from .emotion import command as emotion
from .evaluation import command as evaluation
from .prepare import command as prepare
from .shards import ShardError
from .toon import jobs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare.add_command(commands)
    add_train(commands)
    emotion.add_command(commands)
    evaluation.add_command(commands)
    budget.add_command(commands)
    jobs.add_command(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (MemoError, ConfigError, ShardError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what was saved last", file=sys.stderr)
        sys.exit(130)


def add_train(commands) -> None:
    from .presets import PRESETS

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
    train.add_argument("--animatediff", type=Path, help="temporal modules from this motion module (with --sd15)")
    train.add_argument(
        "--encoders",
        type=Path,
        help="checkpoint whose VAE and encoders complete the new ones, and make the pictures (default: --start)",
    )
    train.add_argument("--show", action="store_true", help="print the settings and stop")
    train.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    from . import engine
    from .config import flatten
    from .nets import Nets
    from .presets import PRESETS

    config = override(PRESETS[args.preset](), args.set)
    if args.show:
        print("\n".join(f"{name}={value}" for name, value in flatten(config).items()))
        return
    if args.data is None or args.out is None:
        raise ConfigError("give --data, the folder of shards, and --out, the folder of the run")
    if (args.start is None) == (args.sd15 is None):
        raise ConfigError("give either --start (a checkpoint, or a run) or --sd15 (Stable Diffusion 1.5)")
    if args.start is not None:
        start = engine.latest(args.start) or args.start
        if str(start) in EMBEDDED:
            start = find(start)
        if not (start / "diffusion_net").is_dir():
            raise ConfigError(
                f"no checkpoint at {start}: give a folder in the released layout, a run's folder, or toon"
            )
        nets = Nets.from_pretrained(start)
    else:
        from . import initialise

        nets, start = Nets(), None
        print(initialise.from_stable_diffusion(nets, args.sd15))
        if args.animatediff is not None:
            print(initialise.from_animatediff(nets, args.animatediff))
    encoders = args.encoders or (start if start is not None and (start / "vae").is_dir() else None)
    base = base_digest(start) if config.lora.rank and start is not None else ""
    print(f"the last checkpoint is {engine.train(config, args.data, args.out, nets, encoders, base)}")


if __name__ == "__main__":
    main()
