"""The jobs that make the toon checkpoint from nothing, in order; each needs those before it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from memo_core.checkpoint.layout import assets, find
from memo_core.checkpoint.load import load
from memo_core.cli.arguments import positive_int

from .. import engine, export, presets, run
from ..nets import Nets, begin_from_nothing, link_encoders
from ..shards import Shards
from . import data, judge, sizes, speech, vae, voices

STAGES = {"stage1": presets.toon_stage1, "stage2": presets.toon_stage2, "stage3": presets.toon_stage3}
JOBS = ("vae", "speech", "emotion", "data", *STAGES, "assemble")


def run_job(name: str, folder: Path, out: Path) -> None:
    """One job; goes on where it was stopped. `folder` keeps what jobs make, `out` is the checkpoint's place."""
    if name in STAGES:
        train_stage(name, folder)
        return
    {
        "vae": lambda: vae.train(folder),
        "speech": lambda: speech.train_speech(folder),
        "emotion": lambda: speech.train_emotion(folder),
        "data": lambda: data.make(folder),
        "assemble": lambda: assemble(folder, out),
        "judge": lambda: judge.train_judge(out.with_name("judge.safetensors")),
    }[name]()


def train_stage(name: str, folder: Path) -> Path:
    """Trains one of the stages, from the one before it; returns its last checkpoint."""
    config = STAGES[name]()
    number = list(STAGES).index(name)
    if number == 0:
        torch.manual_seed(config.seed)
        nets = Nets(sizes.NETS)
        begin_from_nothing(nets)
    else:
        before = folder / list(STAGES)[number - 1]
        found = engine.latest(before)
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {before}: run `--stage {before.name}` first")
        nets = export.read_nets(found)
    kind = "faces" if config.data.single_frames else "clips"
    return engine.train(config, folder / "data" / kind, folder / name, nets, folder / "checkpoint")


def assemble(folder: Path, out: Path) -> None:
    """Makes the last stage's checkpoint `out`, with a record of the training (steps, seconds, hardware). `out` is
    replaced whole, once the new one has been loaded.
    """
    last = engine.latest(folder / list(STAGES)[-1])
    if last is None:
        raise FileNotFoundError(f"no checkpoint in {folder / list(STAGES)[-1]}: run the stages first")
    new, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    if old.exists() and not out.exists():  # killed between the two renames below
        os.rename(old, out)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    export.read_nets(last).save(new, torch.float16)
    link_encoders(folder / "checkpoint", new)
    jobs = {}
    for path in sorted(folder.glob("*_job/state.pt")):
        state = run.read_state(path)
        jobs[path.parent.name.removesuffix("_job")] = {"steps": state["step"], "seconds": round(state["seconds"])}
    for name in STAGES:
        if (found := engine.latest(folder / name)) is not None:
            state = engine.begun(found)[1]
            jobs[name] = {"steps": state["step"], "seconds": state["seconds"]}
    record = {
        "jobs": jobs,
        "hardware": run.hardware(),
        "torch": torch.__version__,
        "espeak_ng": voices.espeak_available(),
    }
    (new / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    load(new)
    if out.exists():
        os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def add_command(commands) -> None:
    """`python -m training toon`."""
    toon = commands.add_parser(
        "toon", help="make or measure the toon checkpoint", description="Make or measure the toon checkpoint."
    )
    what = toon.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help=f"every job in order: {', '.join(JOBS)}")
    what.add_argument(
        "--stage", choices=(*JOBS, "judge"), help="one job; judge trains the regressor that grades, apart from the rest"
    )
    what.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="draw --clips performances, encoded by assets/toon, to train with"
    )
    what.add_argument(
        "--measure",
        metavar="CHECKPOINT",
        help="measure a checkpoint (folder, or toon) on faces and voices it has not seen",
    )
    toon.add_argument(
        "--folder", type=Path, default=Path("runs/toon"), help="where jobs keep their state and samples (%(default)s)"
    )
    toon.add_argument(
        "--out", type=Path, help="where assemble writes the checkpoint (assets/toon), or the measures (runs/evaluation)"
    )
    toon.add_argument("--clips", type=positive_int, default=20, help="clips that are drawn or measured (%(default)s)")
    toon.add_argument("--seconds", type=float, default=4.0, help="of each measured clip (%(default)s)")
    toon.add_argument("--steps", type=int, default=20, help="sampling steps (%(default)s)")
    toon.add_argument("--guidance", type=float, default=3.5, help="guidance scale (%(default)s)")
    toon.set_defaults(run=_run)


def _run(args) -> None:
    if args.measure:
        from .evaluate import evaluate, table

        out = args.out or Path("runs/evaluation")
        figures = evaluate(
            args.measure,
            out,
            clips=args.clips,
            steps=args.steps,
            guidance_scale=args.guidance,
            seconds=args.seconds,
        )
        print(table(figures))
        return
    if args.shards:
        data.make_shards(args.shards, find("toon"), "clips", args.clips)
        print(f"{args.shards} holds {len(Shards(args.shards))} clips")
        return
    for name in JOBS if args.all else [args.stage]:
        run_job(name, args.folder, args.out or assets() / "toon")
