"""What memo_core costs on the CPU, against the released schedule: `python -m benchmarks`, under ten minutes.

Two checkpoints: the trained one that ships with the program, and random networks of the released layout at a fifth of
its width. Figures go to cpu.json as they are measured, then a chart to cpu.png. `python -m benchmarks.gpu` is the same
for a GPU and full-size networks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from memo_core import MemoPipeline

from . import chart, measures, networks
from .measures import EXACT, RELEASED
from .results import Results, rounded

COUNTS, FEW_COUNTS = [1, 10, 100, 1000], [1, 5]
SIZES, FEW_SIZES = [256, 512, 768, 1024], [64, 128]


def parts(quick: bool) -> dict[str, Any]:
    """What is measured, by name, in this order: memory first, before anything else has left its traces."""
    tiny = networks.tiny()
    names = measures.presets()

    def against(nets: Any, size: int, windows: int, steps: int, repeats: int, hows: list[str]) -> Any:
        job = networks.clip(MemoPipeline(nets), size, windows, steps=steps)
        return measures.compare(nets, job, hows, repeats)

    if quick:
        return {
            "growth with windows": lambda: measures.over_windows(tiny, 64, FEW_COUNTS, steps=1),
            "tiny": lambda: against(tiny, 64, 1, 2, 2, [RELEASED, EXACT]),
            "tiny, presets": lambda: against(tiny, 64, 1, 12, 1, names),
            "kernels": lambda: measures.kernels({16: 16, 32: 16}, "cpu", torch.float32, least=0.02),
            "growth with pixels": lambda: measures.over_pixels(tiny, FEW_SIZES, False, steps=1),
            "growth with portraits": lambda: measures.over_portraits(tiny, 64, [1, 2], 1, steps=1),
        }
    return {
        "growth with windows": lambda: measures.over_windows(tiny, 64, COUNTS, steps=1, guidance_scale=1),
        "toon": lambda: against(networks.toon(), 128, 2, 10, 3, [RELEASED, EXACT]),
        "mid-size": lambda: against(networks.mid_size(), 128, 1, 4, 2, [RELEASED, EXACT]),
        "toon, presets": lambda: against(networks.toon(), 128, 1, 20, 2, names),
        # The widths and locations of the released levels at 256 x 256 pixels.
        "kernels": lambda: measures.kernels({40: 1024, 80: 256, 160: 64}, "cpu", torch.float32),
        "growth with pixels": lambda: measures.over_pixels(tiny, SIZES, False, steps=1),
        "growth with portraits": lambda: measures.over_portraits(tiny, 256, [1, 2, 3, 4], 2, steps=2),
    }


def table(measured: dict[str, Any]) -> str:
    """The figures in a few lines of text."""
    lines = []
    for name, found in measured.items():
        if "error" in found:
            lines.append(f"{name}: failed: {found['error']}")
        elif "median" in found:
            lines += [f"{name}: {how} failed: {error}" for how, error in found.get("failed", {}).items()]
            first, *others = found["median"]
            for how in others:
                ratios = found["times faster than " + first][how]
                error = found["relative error of latents against " + first][how]
                by_part = ", ".join(f"{part} {ratio:.2f}x" for part, ratio in ratios.items() if part != "end to end")
                processor = found["times less processor time than " + first][how]
                seconds = [found["median"][h]["end to end"] for h in (first, how)]
                lines.append(
                    f"{name}: {how} {ratios['end to end']:.2f}x {first} ({seconds[1]:.3g} s for {seconds[0]:.3g} s, "
                    f"{processor:.2f}x by processor time, "
                    f"error {error:.1e}); {by_part}"
                )
        elif name == "kernels":
            for kernel, row in found.items():
                gains = ", ".join(f"{key} {value:.2f}" for key, value in row.items() if "times faster" in key)
                lines.append(f"{kernel}: {gains}")
        else:
            lines.append(f"{name}: {rounded(found, 3)}")
    return "\n".join(lines)


def picture(results: Results, path: Path) -> None:
    measured = {name: found for name, found in results.measured.items() if "error" not in found}
    panels: list[chart.Bars | chart.Curves] = []
    faster = "times faster than " + RELEASED
    against = {name: found[faster][EXACT] for name, found in measured.items() if EXACT in found.get(faster, {})}
    panels.append(chart.Bars("times faster than the released schedule, exact, by part", against, "x", line=1))
    shares = {
        f"{name}, {how}": dict(measured[name]["median"][how].items())
        for name in list(against)[:1]
        for how in (RELEASED, EXACT)
    }
    panels.append(chart.Bars(f"seconds by part, {next(iter(against), '')}", shares))
    for name, found in measured.items():
        gains = found.get("times faster than " + EXACT)
        if gains:
            errors = found["relative error of latents against " + EXACT]
            bars = {f"{how}\n(error {errors[how]:.2g})": by["end to end"] for how, by in gains.items()}
            panels.append(chart.Bars(f"times faster than exact: {name}", {name: bars}, "x", line=1))
    kernels = measured.get("kernels", {})
    faster = "fused, times faster than naive"
    gains = {name: row[faster] for name, row in kernels.items() if faster in row}
    panels.append(chart.Bars("kernels: fused, times faster than naive", {"fused": gains}, "x", line=1))
    windows = {int(n): row for n, row in measured.get("growth with windows", {}).get("windows", {}).items()}
    panels.append(
        chart.Curves(
            "cost of a longer clip",
            {
                name: {n: max(row[name], 1e-3) for n, row in windows.items()}
                for name in ("seconds a window", "host memory, MB")
            },
            "windows",
        )
    )
    pixels = {int(n): row["seconds"] for n, row in measured.get("growth with pixels", {}).items()}
    panels.append(chart.Curves("seconds a window by its side", {"seconds": pixels}, "pixels"))
    portraits = {int(n): row["seconds a portrait"] for n, row in measured.get("growth with portraits", {}).items()}
    panels.append(chart.Curves("seconds a portrait by portraits in a batch", {"seconds": portraits}, "portraits"))
    h = results.hardware
    heading = f"{h['cpu']}, {h['threads']} threads, torch {h['torch']}, {h['date']}"
    chart.draw(path, heading, panels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks and few repeats: a first look in a minute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone; the others keep their figures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    name = "cpu-quick" if args.quick else "cpu"  # a first look replaces no figures
    results = Results(args.out / f"{name}.json")
    todo = parts(args.quick)
    unknown = [name for name in args.only or () if name not in todo]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(map(repr, todo))}")
    for part in args.only or todo:
        start = time.perf_counter()
        print(f"{part} ...", flush=True)
        found = results.add(part, todo[part])
        print(table({part: found}) + f"\n  ({time.perf_counter() - start:.0f} s)", flush=True)
    picture(results, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
