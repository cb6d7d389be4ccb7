"""`python -m training`: makes the toon checkpoint from nothing, and measures it."""

from __future__ import annotations

import argparse
from pathlib import Path

from memo_core import checkpoint

from . import data, judge, presets, speech, stages, vae

JOBS = ("vae", "speech", "emotion", "data", *(stage.name for stage in presets.TOON_STAGES), "assemble")


def run_job(name: str, folder: Path, out: Path) -> None:
    """One job of the toon checkpoint; each needs those before it, and goes on where it was stopped."""
    if name == "judge":
        judge.train_judge()
    elif name == "vae":
        vae.train(folder)
    elif name == "speech":
        speech.train_speech(folder)
    elif name == "emotion":
        speech.train_emotion(folder)
    elif name == "data":
        data.make(folder)
    elif name == "assemble":
        stages.assemble(folder, out)
    else:
        names = [stage.name for stage in presets.TOON_STAGES]
        index = names.index(name)
        stages.train(presets.TOON_STAGES[index], folder, folder / f"{names[index - 1]}.pt" if index else None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    toon = commands.add_parser("toon", help="train the toon checkpoint", description="Train the toon checkpoint.")
    what = toon.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help=f"every job in order: {', '.join(JOBS)}")
    what.add_argument(
        "--stage", choices=(*JOBS, "judge"), help="one job; judge trains the regressor that grades, apart from the rest"
    )
    toon.add_argument(
        "--folder", type=Path, default=Path("runs/toon"), help="where jobs keep their state and samples (%(default)s)"
    )
    toon.add_argument(
        "--out",
        type=Path,
        default=checkpoint.assets() / "toon",
        help="where assemble writes the checkpoint (%(default)s)",
    )
    toon.set_defaults(
        run=lambda args: [run_job(name, args.folder, args.out) for name in (JOBS if args.all else [args.stage])]
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a toon checkpoint",
        description="Measure a toon checkpoint on faces and voices it has not seen.",
    )
    evaluate.add_argument("checkpoint", nargs="?", default="toon", help="folder, or toon (the default)")
    evaluate.add_argument("--clips", type=int, default=20, help="clips of 4 s (%(default)s)")
    evaluate.add_argument("--steps", type=int, default=20, help="sampling steps (%(default)s)")
    evaluate.add_argument("--guidance", type=float, default=3.5, help="guidance scale (%(default)s)")
    evaluate.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), help="figures.json and sheet.png (%(default)s)"
    )
    evaluate.set_defaults(run=run_evaluate)

    args = parser.parse_args(arguments)
    args.run(args)


def run_evaluate(args: argparse.Namespace) -> None:
    from .evaluate import evaluate, table

    print(table(evaluate(args.checkpoint, args.out, clips=args.clips, steps=args.steps, guidance_scale=args.guidance)))


if __name__ == "__main__":
    main()
