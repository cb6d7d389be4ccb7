"""The detector's report: accuracy per data set as text, JSON and bars (MEMO figure 12), and the confusion matrix."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from memo_core.errors import EmotionError
from memo_core.inputs.emotion import COLOURS
from memo_core.release import EMOTIONS

from .labels import CLASSES, published
from .readers import text_table
from .train import write_json

PAPER_TOTAL = (68.78, 78.26)  # over all clips of its 25 sets: emotion2vec with a linear layer, and MEMO's detector


def table(result: dict[str, Any]) -> str:
    """What `train.evaluate` returned, as text: a row per data set, then all clips and the mean of the sets.

    Beside it stand the linear baseline's accuracy, where `result` has that under "baseline", and what the paper's
    figure 12 gives for its own detector and its own linear baseline, where one of the sets is there.
    """
    columns: dict[str, dict[str, str]] = {}
    if "baseline" in result:
        columns["linear %"] = {name: _percent(part["accuracy"]) for name, part in _parts(result["baseline"])}
    paper = {key: own.accuracy for key, own in published().items() if own.accuracy}
    if paper.keys() & result["sets"].keys():
        paper["all clips"] = PAPER_TOTAL
        columns["paper %"] = {name: f"{theirs:.1f}" for name, (_, theirs) in paper.items()}
        columns["paper's linear %"] = {name: f"{linear:.1f}" for name, (linear, _) in paper.items()}
    rows: list[list[object]] = [
        [
            name,
            part.get("train", ""),
            part.get("test", ""),
            _percent(part["accuracy"]),
            _percent(part["recall"]) if "recall" in part else "",
            *(column.get(name, "-") for column in columns.values()),
        ]
        for name, part in _parts(result)
    ]
    return text_table(["data set", "train", "test", "accuracy %", "recall %", *columns], rows)


def _parts(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [*result["sets"].items(), ("all clips", result["all"]), ("mean of sets", {"accuracy": result["mean"]})]


def check_packages() -> None:
    """EmotionError where the package that draws the report is absent; to be asked before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EmotionError('the report\'s pictures need matplotlib: pip install "comfyui-memo[training]"')


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Writes report.txt, report.json, accuracy.png and confusion.png into `folder`. EmotionError without matplotlib."""
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(table(result) + "\n", encoding="utf-8")
    write_json(folder / "report.json", result)
    _draw_accuracy(folder / "accuracy.png", result)
    _draw_confusion(folder / "confusion.png", result["confusion"])


def _draw_accuracy(path: Path, result: dict[str, Any]) -> None:
    scored = [(name, part["accuracy"]) for name, part in result["sets"].items() if part["accuracy"] is not None]
    scored = sorted(scored, key=lambda item: item[1], reverse=True)
    figure, axes = _figure((max(5.0, 1.5 + 0.45 * len(scored)), 4.0))
    bars = axes.bar([name for name, _ in scored], [100 * value for _, value in scored], color=COLOURS[6])
    axes.bar_label(bars, fmt="%.0f", fontsize=8)
    if result["mean"] is not None:
        axes.axhline(100 * result["mean"], color=COLOURS[0], linewidth=1, label=f"mean {100 * result['mean']:.1f}")
        if "baseline" in result:
            linear = [100 * result["baseline"]["sets"][name]["accuracy"] for name, _ in scored]
            axes.plot(range(len(scored)), linear, "D", color=COLOURS[3], label="linear layer")
        axes.legend(loc="lower right")
    axes.set_ylim(0, 105)
    axes.set_ylabel("test accuracy, %")
    axes.tick_params(axis="x", rotation=60)
    figure.savefig(path, dpi=150)


def _draw_confusion(path: Path, confusion: list[list[int]]) -> None:
    figure, axes = _figure((6.5, 5.5))
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for y, row in enumerate(confusion):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, count, ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")
    axes.set_xticks(range(len(EMOTIONS)), EMOTIONS, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set_xlabel("detected")
    axes.set_ylabel("labelled")
    figure.colorbar(image, label="share of the row")
    figure.savefig(path, dpi=150)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
