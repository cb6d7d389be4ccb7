"""The toon bench: what memory, multi-modal attention and emotion are worth, on heads whose truth is known exactly.

`python -m benchmarks.toon --start STAGE1` trains small variants of MEMO that differ in one thing (or finds those that
are trained already), makes a video of 60 s with each, and has the judge measure it. Stopped at any point, it goes on.
`--report` only prints the table and draws the plots of what has been measured.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from training import engine, presets
from training.nets import Nets

from .toon_variants import VARIANTS, Variant


def train(variant: Variant, args: argparse.Namespace, seed: int) -> Path:
    """Trains a variant from the first stage on, or finds it trained; returns its checkpoint.

    Variants that differ in the last stage alone share the one before it.
    """
    shared = "memo" if variant.name == "fixed-past" else variant.name
    second = replace(presets.toon_stage2(), steps=args.steps, seed=seed)
    folder = args.folder / f"seed{seed}"
    start = engine.latest(args.start) or args.start
    before = _stage(variant, second, folder / f"{shared}-stage2", start, args)
    third = presets.toon_stage3()
    third = replace(
        third, steps=args.last_steps, seed=seed, data=replace(third.data, past_windows=variant.past_windows)
    )
    return _stage(variant, third, folder / variant.name, before, args)


def _stage(variant: Variant, config, out: Path, start: Path, args: argparse.Namespace) -> Path:
    # Drawn data has no bad samples, and a filter would drop other ones for each variant.
    config = replace(config, loss=replace(config.loss, robust_threshold=math.inf))
    config = replace(config, engine=replace(config.engine, save_every=100, keep=1, sample_every=10**6))
    found = engine.latest(out)
    if found is not None and found.name == f"checkpoint-{config.steps:07d}":
        return found
    nets = Nets.from_pretrained(start)
    variant.change(nets.diffusion_net)
    return engine.train(config, args.data, out, nets, args.start, f"{start.parent.name}/{start.name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toon", description=__doc__)
    parser.add_argument("--start", type=Path, default=Path("runs/toon/stage1"), help="first stage (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("runs/toon/data/clips"), help="shards (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where all of it goes (%(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of the second stage (%(default)s)")
    parser.add_argument("--last-steps", type=int, default=300, help="of the last stage (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], help="these variants alone")
    args = parser.parse_args(arguments)
    for variant in VARIANTS:
        if not variant.weights and (not args.only or variant.name in args.only):
            train(variant, args, 0)


if __name__ == "__main__":
    main()
