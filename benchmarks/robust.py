"""How well the robust filter finds bad samples at each noise level, in the paper's form and relative to what is usual.

`python -m benchmarks.robust`: from assets/toon a short training on drawn clips, 5% of them spoilt, without a filter;
then held-out windows, good and spoilt, are judged at all noise levels by every form. What is usual the filter learns
from windows of the clips that were trained with, at the noise levels that the memo presets draw. About a quarter of an
hour of one core for each seed; stopped at any point, it goes on. Errors that are there already are judged anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from memo_core.checkpoint.layout import find
from training import engine, losses, presets, robust, run
from training.config import Loss, Optimizer, Stage
from training.nets import Nets
from training.objectives.flow import FlowModel

from .results import rounded
from .spoilt import CLIPS, HELD_OUT, KINDS, draw, windows, write

FILTER = replace(presets.memo_stage2().loss, robust_from=0)
BINS = 16  # of sigma, equally wide, by which figures are given
SHARE = 0.05  # of clips that are spoilt
SEEN = 24  # windows of each noise level, of the clips that were trained with, from which it is known what is usual
GOOD, SPOILT = 20, 8  # held-out windows of each noise level, good ones and of each kind of spoilt ones
RESULT = Path(__file__).parent / "robust.json"

Row = tuple[str, float, float]  # "good" or a kind, sigma, mean squared error of the velocity
Form = Callable[[float, float], bool]  # of sigma and error: whether the sample is dropped


def stage(seed: int, steps: int) -> Stage:
    """Toon stage 2 without warm-up and filter, at all noise levels alike."""
    toon = presets.toon_stage2()
    return replace(
        toon,
        steps=steps,
        join=(),
        join_step=0,
        seed=seed,
        loss=Loss(weighting="uniform", robust_threshold=math.inf, focus_weight=toon.loss.focus_weight),
        optimizer=Optimizer(learning_rate=1e-4, betas=(0.9, 0.99), warmup_steps=20, batch=4),
        engine=replace(toon.engine, ema=0.0, save_every=20, keep=1),
    )


def noise_levels(count: int, seed: int | list[int]) -> list[list[float]]:
    """So many in each bin."""
    rng = np.random.default_rng(seed)
    return [((number + rng.random(count)) / BINS).tolist() for number in range(BINS)]


def errors(checkpoint: Path, folder: Path, kind: str, levels: list[list[float]]) -> list[Row]:
    """Errors of a window at each of the noise levels, as a run's last weights make them."""
    model, rows = FlowModel(Nets.from_pretrained(checkpoint), Loss(robust_measure="loss")).eval(), []
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        for batch in tqdm(windows(folder, levels), total=sum(map(len, levels)) // 4, desc=kind):
            for sigma, error in zip(batch.sigma[:, 0].tolist(), model(batch)[1].tolist()):
                rows.append((kind, sigma, error))
    return rows


def shown(rows: list[Row]) -> robust.RobustFilter:
    """The filter when it is full of these samples: for each noise level that is drawn, the sample that came nearest."""
    judge, count = robust.RobustFilter(FILTER), robust.BINS * robust.WINDOW
    drawn = losses.draw_sigma(count, FILTER, torch.Generator().manual_seed(0))
    sigma, error = torch.tensor([row[1:] for row in rows]).unbind(1)
    nearest = (drawn[:, None] - sigma).abs().argmin(dim=1)
    clean, no = (error * sigma.square())[nearest], torch.zeros(count, dtype=torch.bool)
    judge.note(robust.judged(judge.bin_of(drawn[:, None]), clean, ~no, no, clean))
    return judge


def measured(seed: int, args: argparse.Namespace) -> tuple[list[Row], robust.RobustFilter]:
    """Errors of one seed's held-out windows, and the filter; made where they are not there yet."""
    folder, config = args.folder / f"seed-{seed}", stage(seed, args.steps)
    path = folder / f"errors-{args.steps}.json"
    if not path.is_file():
        chosen = np.random.default_rng(seed).permutation(CLIPS)[: round(SHARE * CLIPS)].tolist()
        spoilt = {number: KINDS[i % len(KINDS)] for i, number in enumerate(chosen)}
        clips = draw(args.clips)
        shards = write(folder / "clips", clips, range(CLIPS), spoilt, seed)
        last = engine.train(config, shards, folder / "run", Nets.from_pretrained(find("toon")), None)
        seen = errors(last, shards, "seen", noise_levels(SEEN, [seed, SEEN]))
        rows, levels, there = [], noise_levels(GOOD, seed), range(CLIPS, CLIPS + HELD_OUT)
        for kind in ("good", *KINDS):
            held_out = write(folder / kind, clips, there, {} if kind == "good" else dict.fromkeys(there, kind), seed)
            rows += errors(last, held_out, kind, levels if kind == "good" else [row[:SPOILT] for row in levels])
        path.with_suffix(".tmp").write_text(json.dumps({"seen": seen, "rows": rows}), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["rows"], shown(found["seen"])


# --- Figures ----------------------------------------------------------------------------------------------------------


def bin_shares() -> list[float]:
    """How often a sample of memo_stage2 falls into each bin."""
    drawn = losses.draw_sigma(robust.DRAWS, FILTER, torch.Generator().manual_seed(0))
    return (torch.histc(drawn, BINS, 0, 1) / robust.DRAWS).tolist()


def precision(recall: float, false: float) -> float:
    """Share of bad ones among those that are dropped, if `SHARE` of all are bad; 0 where none is dropped."""
    hit = SHARE * recall
    return hit / (hit + (1 - SHARE) * false) if hit else 0.0


def rates(rows: list[Row], dropped: Form) -> dict[str, Any]:
    """Recall, share of good ones that are dropped, and precision if `SHARE` of all are spoilt: of each bin, and of all
    samples at the noise levels of the memo presets.
    """
    counts = np.zeros((1 + len(KINDS), BINS, 2))  # kinds, good first; dropped, seen
    for kind, sigma, error in rows:
        place = (0 if kind == "good" else 1 + KINDS.index(kind), min(int(sigma * BINS), BINS - 1))
        counts[place] += (dropped(sigma, error), 1)
    each = counts[..., 0] / counts[..., 1]
    overall = each @ np.array(bin_shares())

    bins = [{"recall": float(each[1:, i].mean()), "false": float(each[0, i])} for i in range(BINS)]
    total = {"recall": float(overall[1:].mean()), "false": float(overall[0])}
    for figures in (*bins, total):
        figures["precision"] = precision(**figures)
    by_kind = dict(zip(KINDS, overall[1:].tolist(), strict=True))
    good_kept = 1 - each[0]
    return {**total, "recall_of": by_kind, "bins": bins, "least_good_kept": float(good_kept.min())}


def f1(figures: dict[str, Any]) -> float:
    """Harmonic mean of recall and precision."""
    both = figures["recall"] + figures["precision"]
    return 2 * figures["recall"] * figures["precision"] / both if both else 0.0


def forms(rows: list[Row], judge: robust.RobustFilter) -> dict[str, dict[str, Any]]:
    """Figures of every form; `judge` knows what is usual. "best" ones are told the answers: of all limits that with the
    highest F1.
    """

    def literal(limit: float) -> Form:
        return lambda sigma, error: error > limit

    def clean(limit: float) -> Form:
        return lambda sigma, error: error * sigma**2 > limit

    def relative(times: float) -> Form:
        return lambda sigma, error: error * sigma**2 > times * usual[bisect_right(borders, sigma)]

    def best(form: Callable[[float], Form], tried: np.ndarray) -> dict[str, Any]:
        found = [(limit, rates(rows, form(limit))) for limit in tried.tolist()]
        limit, figures = max(found, key=lambda pair: f1(pair[1]))
        return {"limit": limit, **figures}

    factor, borders = judge.config.robust_factor, judge.borders[1:-1].tolist()
    usual = (judge.limits(0) / factor).tolist()
    grid = np.geomspace(0.003, 30, 61)
    return {
        "loss, 0.1": {"limit": 0.1, **rates(rows, literal(0.1))},
        "loss, best": best(literal, grid),
        "clean, best": best(clean, grid),
        "quantile": {"limit": factor, **rates(rows, relative(factor))},
        "quantile, best": best(relative, np.geomspace(1, 20, 61)),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each form, mean over seeds; recall / precision in quarters of the noise levels and in all,
    recall of each kind, and the share of good ones kept at the noise level where it is least.
    """
    seeds = list(result["seeds"].values())
    quarter = BINS // 4
    heads = [f"{i / 4:.2f}-{(i + 1) / 4:.2f}" for i in range(4)]
    lines = [f"| form | limit | {' | '.join(heads)} | all | {' | '.join(KINDS)} | good kept |", "|" + " --- |" * 11]
    for form in seeds[0]["forms"]:
        figures = [seed["forms"][form] for seed in seeds]

        def mean(of: Callable[[dict[str, Any]], float], figures: list[dict[str, Any]] = figures) -> float:
            return statistics.fmean(of(each) for each in figures)

        cells = []
        for i in range(4):
            some = slice(i * quarter, (i + 1) * quarter)
            recall, false = (
                mean(lambda f, k=k, some=some: statistics.fmean(b[k] for b in f["bins"][some]))
                for k in ("recall", "false")
            )
            cells.append(f"{recall:.2f} / {precision(recall, false):.2f}")
        cells.append(f"{mean(lambda f: f['recall']):.2f} / {mean(lambda f: f['precision']):.2f}")
        cells += [f"{mean(lambda f, kind=kind: f['recall_of'][kind]):.2f}" for kind in KINDS]
        cells.append(f"{mean(lambda f: f['least_good_kept']):.2f}")
        limits = ", ".join(dict.fromkeys(f"{f['limit']:.2g}" for f in figures))
        lines.append(f"| {form} | {limits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/robust"), help="for the runs (%(default)s)")
    parser.add_argument("--clips", type=Path, default=Path("runs/bench-clips"), help="drawn clips (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the runs (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of training, 4 samples each (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="where figures go (%(default)s)")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "steps": args.steps,
        "samples": 4 * args.steps,
        "spoilt": SHARE,
        "clips": CLIPS,
        "held out": HELD_OUT,
        "windows of a noise level": {"seen": SEEN, "good": GOOD, "spoilt": SPOILT * len(KINDS)},
        "factor": FILTER.robust_factor,
        "quantile": FILTER.robust_quantile,
        "hardware": run.hardware(),
        "torch": torch.__version__,
        "seeds": {},
    }
    for seed in args.seeds:
        rows, judge = measured(seed, args)
        known = {"borders": judge.borders.tolist(), "limits": judge.limits(0).tolist()}
        result["seeds"][str(seed)] = known | {"forms": forms(rows, judge)}
    args.result.write_text(json.dumps(rounded(result, 4)) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
