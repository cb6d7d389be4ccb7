"""`python -m training`: makes the toon checkpoint from nothing, and measures it."""

from __future__ import annotations

import argparse
from pathlib import Path

from memo_core import checkpoint

from . import data, judge, presets, speech, stages, vae
from .evaluate import evaluate, table

STAGES = {stage.name: stage for stage in presets.TOON_STAGES}
JOBS = ("vae", "speech", "emotion", "data", *STAGES, "assemble")


def run_job(name: str, folder: Path, out: Path) -> None:
    """One job of the toon checkpoint; each needs those before it, and goes on where it was stopped."""
    if name in STAGES:
        before = list(STAGES)[: list(STAGES).index(name)]
        stages.train(STAGES[name], folder, folder / f"{before[-1]}.pt" if before else None)
        return
    {
        "vae": lambda: vae.train(folder),
        "speech": lambda: speech.train_speech(folder),
        "emotion": lambda: speech.train_emotion(folder),
        "data": lambda: data.make(folder),
        "assemble": lambda: stages.assemble(folder, out),
        "judge": lambda: judge.train_judge(out.with_name("judge.safetensors")),
    }[name]()


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

    measure = commands.add_parser(
        "evaluate",
        help="measure a toon checkpoint",
        description="Measure a toon checkpoint on faces and voices it has not seen.",
    )
    measure.add_argument("checkpoint", nargs="?", default="toon", help="folder, or toon (the default)")
    measure.add_argument("--clips", type=int, default=20, help="clips of 4 s (%(default)s)")
    measure.add_argument("--steps", type=int, default=20, help="sampling steps (%(default)s)")
    measure.add_argument("--guidance", type=float, default=3.5, help="guidance scale (%(default)s)")
    measure.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), help="figures.json and sheet.png (%(default)s)"
    )
    measure.set_defaults(run=run_evaluate)

    args = parser.parse_args(arguments)
    args.run(args)


def run_evaluate(args: argparse.Namespace) -> None:
    print(table(evaluate(args.checkpoint, args.out, clips=args.clips, steps=args.steps, guidance_scale=args.guidance)))


if __name__ == "__main__":
    main()
