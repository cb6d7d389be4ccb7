"""`python -m training`: prepares data, trains the stages of MEMO, adapters and the emotion detector, and measures."""

from __future__ import annotations

import argparse
import sys

from memo_core.errors import MemoError

from . import budget, evaluation, export
from . import command as train
from .config import ConfigError
from .disk import DiskError
from .emotion import command as emotion
from .prepare import command as prepare
from .shards import ShardError
from .toon import jobs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare.add_command(commands)
    train.add_command(commands)
    export.add_command(commands)
    emotion.add_command(commands)
    evaluation.add_commands(commands)
    budget.add_command(commands)
    jobs.add_command(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (MemoError, ConfigError, ShardError, DiskError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what was saved last", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
