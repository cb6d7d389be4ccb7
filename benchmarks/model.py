"""How long a window would take on a GPU by assumed rates: `python -m benchmarks.model COSTS.json ...`.

Not a measurement: what `benchmarks.costs` counts, divided by `RATES`. Each operator takes the longer of its operations
and its bytes; no two overlap, launches cost nothing. Good for comparing two revisions, and to see what is worth doing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memo_core.release import WINDOW

from .costs import TIMED

TRANSPOSED = 0.35  # share of the bandwidth where the order of the axes changes
LOOKS = "windows looked at for each new one"
# Passes of one row through the Diffusion Net in a window.
PASSES = {"exact": 40, "balanced": 19, "draft": 10}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of bf16: TFLOP/s of matrix products, convolutions and attention, TB/s; float32 has half of the first three."""

    products: float
    convolutions: float
    attention: float
    bandwidth: float


RATES = {
    "H100 SXM": Rates(products=620, convolutions=480, attention=380, bandwidth=2.85),
    "H200": Rates(products=640, convolutions=490, attention=380, bandwidth=4.1),
    "RTX 4090": Rates(products=150, convolutions=125, attention=140, bandwidth=0.92),
}


def seconds(row: dict[str, Any], rates: Rates) -> dict[str, float]:
    """Seconds of one part by kind of operator.

    Args:
        row: of the `window` of a report by `benchmarks.costs`.
    """
    work = {
        "matrix products": rates.products,
        "convolutions": rates.convolutions,
        "attention": rates.attention,
    }
    found = {}
    for kind, moved in row.items():
        if kind not in ("TFLOP", "GB", TIMED):
            found[kind] = max(moved / 1e3 / rates.bandwidth, row[TIMED].get(kind, 0.0) / work.get(kind, float("inf")))
    found["read in another order"] = row[TIMED]["transposed, GB"] / 1e3 / rates.bandwidth * (1 / TRANSPOSED - 1)
    return found


def frame(report: dict[str, Any], rates: Rates, preset: str, looks: float) -> float:
    """Seconds a frame in the middle of a long video; `looks`: windows that the Reference Net reads for each new one."""
    rows = report["window"]
    step, read, sums, decode, encode = (
        sum(seconds(rows[name], rates).values())
        for name in (
            "step",
            "Reference Net on a past window",
            "memory sums of it",
            "VAE decode, 16 frames",
            "VAE encode, 16 frames",
        )
    )
    return (PASSES[preset] / 2 * step + looks * (read + sums) + decode + encode) / WINDOW


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Cards and presets down, reports across."""
    lines = ["| | " + " | ".join(reports) + " |", "| --- |" + " --- |" * len(reports)]

    def line(name: str, values: Iterable[float], digits: int) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |")

    for card, rates in RATES.items():
        steps = [report["window"]["step"] for report in reports.values()]
        took = [seconds(step, rates) for step in steps]
        for kind in dict.fromkeys(kind for kinds in took for kind in kinds):
            line(f"{card}: {kind}, ms a step", (1e3 * kinds.get(kind, 0) for kinds in took), 1)
        line(f"{card}: a step, ms", (1e3 * sum(kinds.values()) for kinds in took), 0)
        line(f"{card}: TFLOP/s", (step["TFLOP"] / sum(kinds.values()) for step, kinds in zip(steps, took)), 0)
        for preset in PASSES:
            frames = (frame(r, rates, preset, r[LOOKS]["bfloat16"]) for r in reports.values())
            line(f"{card}: {preset}, seconds a frame", frames, 3)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, help="reports of benchmarks.costs --json, or several by name in one"
    )
    args = parser.parse_args(arguments)
    reports: dict[str, Any] = {}
    for path in args.files:
        found = json.loads(path.read_text(encoding="utf-8"))
        reports |= {path.stem: found} if "window" in found else found
    print(table(reports))


if __name__ == "__main__":
    main()
