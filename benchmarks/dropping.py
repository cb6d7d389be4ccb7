"""What guidance's unconditional row learns with and without samples that lose all conditions together (`drop.all`).

`python -m benchmarks.dropping`: from assets/toon with audio and memory modules begun anew, as stage 2 begins, a short
stage 2 with the dropout of the memo presets; runs differ in `drop.all` alone. Then the loss of the row that guidance
reads (no portrait, no sound, no emotion) and that of the conditional one on held-out clips. About a quarter of an hour
of one core for each seed; stopped at any point, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memo_core.checkpoint.layout import find
from memo_core.release import NULL_EMOTION
from training import engine, presets, run
from training.batches import Batch
from training.config import Loss, Optimizer, Stage
from training.nets import Nets, silence_new_modules
from training.objectives.flow import FlowModel

from .results import rounded
from .spoilt import CLIPS, HELD_OUT, draw, windows, write

RATES = (0.0, 0.05)
WINDOWS = 16  # held-out ones at each noise level
SIGMAS = (0.2, 0.5, 0.8, 0.95)
RESULT = Path(__file__).parent / "dropping.json"


def stage(seed: int, steps: int, together: float) -> Stage:
    """Toon stage 2 with the dropout of memo_stage2, but for `drop.all`; all clips are good, so none is dropped."""
    toon = presets.toon_stage2()
    return replace(
        toon,
        steps=steps,
        seed=seed,
        join=(),
        join_step=0,
        drop=replace(presets.memo_stage2().drop, all=together),
        loss=replace(toon.loss, robust_threshold=math.inf),
        optimizer=Optimizer(learning_rate=4e-4, betas=(0.9, 0.99), warmup_steps=20, batch=4),
        engine=replace(toon.engine, ema=0.0, save_every=20, keep=1),
    )


def start(seed: int) -> Nets:
    """assets/toon, but for audio and memory modules, which are new."""
    nets = Nets.from_pretrained(find("toon"))
    torch.manual_seed(seed)
    fresh = Nets(nets.sizes)
    silence_new_modules(fresh)
    parts, new = nets.parts(), fresh.parts()
    for name in ("audio", "memory"):
        for parameter, value in zip(parts[name], new[name], strict=True):
            parameter.data.copy_(value.data)
    return nets


def unconditional(batch: Batch) -> Batch:
    """The batch as guidance's unconditional row sees it."""
    gone = torch.ones_like(batch.no_reference)
    return replace(batch, no_reference=gone, no_audio=gone, emotion=torch.full_like(batch.emotion, NULL_EMOTION))


def held_out(nets: Nets, folder: Path) -> dict[str, list[float]]:
    """Mean squared error of the velocity at each of `SIGMAS`, of both rows."""
    model = FlowModel(nets, Loss(robust_measure="loss")).eval()
    found: dict[str, list[list[float]]] = {"unconditional": [], "conditional": []}
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        for sigma in SIGMAS:
            given = list(windows(folder, [[sigma] * WINDOWS]))
            found["conditional"].append([e for batch in given for e in model(batch)[1].tolist()])
            found["unconditional"].append([e for batch in given for e in model(unconditional(batch))[1].tolist()])
    return {name: [statistics.fmean(errors) for errors in rows] for name, rows in found.items()}


def measured(seed: int, together: float | None, args: argparse.Namespace, shards: dict[str, Path]) -> dict[str, Any]:
    """Losses of one run, trained where it is not yet; of what runs start from, where `together` is None."""
    folder = args.folder / ("start" if together is None else f"all-{together}-seed-{seed}")
    path = folder / ("losses.json" if together is None else f"losses-{args.steps}.json")
    if not path.is_file():
        if together is None:
            nets = start(seed)
        else:
            last = engine.train(stage(seed, args.steps, together), shards["train"], folder, start(seed), None)
            nets = Nets.from_pretrained(last)
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(held_out(nets, shards["held out"])), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    return {"drop.all": together, "seed": seed, **json.loads(path.read_text(encoding="utf-8"))}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each run, and the mean over noise levels."""
    lines = [f"| drop.all | seed | row | {' | '.join(map(str, SIGMAS))} | mean |", "|" + " --- |" * (4 + len(SIGMAS))]
    for row in ("unconditional", "conditional"):
        for each in result["runs"]:
            values = [*each[row], statistics.fmean(each[row])]
            label = "start" if each["drop.all"] is None else each["drop.all"]
            lines.append(f"| {label} | {each['seed']} | {row} | {' | '.join(f'{v:.3f}' for v in values)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/dropping"), help="for the runs (%(default)s)")
    parser.add_argument("--clips", type=Path, default=Path("runs/bench-clips"), help="drawn clips (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the runs (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="of training, 4 samples each (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="where figures go (%(default)s)")
    args = parser.parse_args(arguments)
    clips = draw(args.clips)
    shards = {
        "train": write(args.folder / "clips", clips, range(CLIPS), {}, 0),
        "held out": write(args.folder / "held-out", clips, range(CLIPS, CLIPS + HELD_OUT), {}, 0),
    }
    runs = [measured(0, None, args, shards)]
    runs += [measured(seed, together, args, shards) for seed in args.seeds for together in RATES]
    result = {
        "steps": args.steps,
        "samples": 4 * args.steps,
        "clips": CLIPS,
        "held-out windows": WINDOWS,
        "sigmas": SIGMAS,
        "hardware": run.hardware(),
        "torch": torch.__version__,
        "runs": runs,
    }
    args.result.write_text(json.dumps(rounded(result, 4)) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
