"""What memo_core costs on a GPU at the released size: `python -m benchmarks.gpu`, under ten minutes on an H200.

Random weights in bf16 at 512 x 512. Parts come in the order of their weight; each is written to gpu.json as soon as it
is measured, what fails is noted there and does not stop the rest, and another call goes on with what is missing. A
chart goes to gpu.png.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from memo_core import MemoPipeline, budget
from memo_core.checkpoint import Networks
from memo_core.clips import WINDOW
from memo_core.kernels import fused, naive

from . import chart, measures, networks, released
from .measures import END_TO_END, EXACT, RELEASED
from .results import Results, rounded
from .timing import Parts, per_call, seconds_of

LIMIT = 540  # seconds after which no further part is begun
CARDS = {"exact": 12, "balanced": 8, "draft": 8}  # GiB of memory of the cards that presets are for
# By name: what is on; the rest is off.
OPTIONS = {
    "channels-last": ("channels_last",),
    "fused QKV": ("fuse_qkv",),
    "CUDA graphs": ("cuda_graphs",),
    "compiled": ("compile",),
    "these four": ("channels_last", "fuse_qkv", "cuda_graphs", "compile"),
    "fp8 weights": ("fp8_weights",),
}
OPTION = "option: "  # before their names as parts
ON_CPU = ("channels-last", "fused QKV", "fp8 weights")  # those that ask for no GPU and no compiler
GB = 1e9


class Bench:
    """The parts, each a method that returns its figures.

    Args:
        device: "cuda"; "cpu" is for trying the program.
        tiny: small networks at 64 x 64, for the same.
    """

    def __init__(self, device: str = "cuda", tiny: bool = False):
        self.device, self.tiny = torch.device(device), tiny
        self.size, self.steps, self.repeats = (64, 2, 1) if tiny else (512, 20, 2)

    def _build(self) -> Networks:
        return (networks.tiny if self.tiny else networks.full_size)(self.device, torch.bfloat16)

    @cached_property
    def nets(self) -> Networks:
        return self._build()

    @cached_property
    def card(self) -> dict[str, float]:
        """Bytes a second of a large copy, operations a second of a large bf16 product."""
        source = torch.empty(2**22 if self.tiny else 2**32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return {
            "copy, bytes a second": 2 * source.nbytes / per_call(lambda: target.copy_(source), self.device),
            "bf16 product, operations a second": 2 * side**3 / per_call(lambda: a @ b, self.device),
        }

    @property
    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """By name, the most important first."""
        return {
            "card": lambda: self.card,
            "window": self.window,
            "budget": self.budget,
            "kernels": self.kernels,
            "by part": self.by_part,
            "roofline": self.roofline,
            "growth with pixels": self.growth_with_pixels,
            "growth with portraits": self.growth_with_portraits,
            **{OPTION + name: partial(self.option, name) for name in (ON_CPU if self.tiny else OPTIONS)},
        }

    def window(self) -> dict[str, Any]:
        """A video's second window by the released schedule and by preset, with the peak of allocated memory."""
        job = networks.clip(MemoPipeline(self.nets), self.size, 2, steps=self.steps)
        found = measures.compare(self.nets, job, [RELEASED, *measures.presets()], self.repeats, only_last=True)
        found["seconds a frame"] = {how: parts[END_TO_END] / WINDOW for how, parts in found["median"].items()}
        found["frames a second"] = {how: 1 / seconds for how, seconds in found["seconds a frame"].items()}
        return found

    def budget(self) -> dict[str, Any]:
        """A video's second window by preset on the card it is meant for: what was allowed, planned and taken."""
        return {speed: self._within(card, speed) for speed, card in CARDS.items()}

    def _within(self, card: int, speed: str) -> dict[str, Any]:
        # By itself: what it holds must be gone before the next one is measured.
        pipe = MemoPipeline(self.nets)
        job = networks.clip(pipe, self.size, 2, steps=self.steps, speed=speed)
        allowed = None if self.tiny else card * budget.GIB - budget.DRIVER
        plan = budget.plan(self.nets, self.size, self.size, job.settings, allowed)
        measures.forget_peak(self.device)
        windows = pipe.sample_windows(job, plan=plan)
        try:
            next(windows)
            seconds = seconds_of(lambda: next(windows), self.device)
        finally:  # a network may wait in host memory
            windows.close()
            for net in (self.nets.reference_net, self.nets.diffusion_net):
                net.to(self.device)
        return {
            "card, GiB": card,
            "allowed, bytes": allowed,
            "planned, bytes": plan.peak,
            "peak allocated, bytes": self._peak(),
            "seconds a frame": seconds / WINDOW,
        }

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def kernels(self) -> dict[str, Any]:
        """Every kernel at the released widths, and how near it comes to the bandwidth of a copy."""
        versions = {"naive": naive, "fused": fused}
        if self.device.type == "cuda":
            from memo_core.kernels import triton  # absent: the part says so

            versions["triton"] = triton
        levels = {8: 16} if self.tiny else {40: 4096, 80: 1024, 160: 256}
        bandwidth = self.card["copy, bytes a second"]
        return measures.kernels(levels, self.device, torch.bfloat16, versions, bandwidth, 0.05, gradients=True)

    def by_part(self) -> dict[str, Any]:
        """Where the time goes, by the released schedule and by memo_core: two windows of few steps."""
        job = networks.clip(MemoPipeline(self.nets), self.size, 2, steps=2 if self.tiny else 4)
        return measures.compare(self.nets, job, [RELEASED, EXACT], 1)

    def roofline(self) -> dict[str, Any]:
        """Operations and seconds of one step of the Diffusion Net, by part, against the card's peak.

        What Triton kernels do is not among the counted operations; it is little.
        """
        from torch.utils.flop_counter import FlopCounterMode

        pipe, peak = MemoPipeline(self.nets), self.card["bf16 product, operations a second"]
        steps = 2 if self.tiny else 5
        job = networks.clip(pipe, self.size, 1, steps=steps)
        list(pipe.sample_windows(job))  # plans, and tunes: neither is to be counted
        counter = FlopCounterMode(display=False)
        with counter:
            list(pipe.sample_windows(networks.clip(pipe, self.size, 1, steps=1)))
        # By the modules' names, as the counter has them: DiffusionNet.down_blocks.0.resnets.0
        count = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
        net = type(self.nets.diffusion_net).__name__
        operations = {released.DIFFUSION_STEP: count[net]}
        for part, how in measures.MODULES.items():
            operations[part] = sum(n for name, n in count.items() if re.fullmatch(rf"{net}\.{how}", name))
        parts = Parts(self.device)
        with measures.watched(self.nets, parts):
            list(MemoPipeline(self.nets).sample_windows(job))
        seconds = {part: value / steps for part, value in parts.seconds().items()}
        found = {}
        for part, number in operations.items():
            if part in seconds:
                rate = number / seconds[part]
                found[part] = {
                    "operations a step": number,
                    "seconds a step": seconds[part],
                    "TFLOP/s": rate / 1e12,
                    "share of peak": rate / peak,
                }
        return found

    def option(self, name: str) -> dict[str, Any]:
        """The same windows by networks that compute in another way: the first, which may have to compile, and the
        second, against networks without options."""
        from memo_core.optimise import Options, optimise

        nets, plain = self._build(), self._plain
        optimise(nets, Options(**{"channels_last": False, "fuse_qkv": False, **dict.fromkeys(OPTIONS[name], True)}))
        measures.forget_peak(self.device)
        latents, first, second = self._two_windows(nets)
        return {
            "seconds of the first window": first,
            "seconds of the second window": second,
            "seconds of the second window without": plain[2],
            "times faster than without": plain[2] / second,
            "relative error of latents against without": measures.relative_error(latents, plain[0]),
            "peak allocated, bytes": max(0, self._peak() - measures.module_bytes(self.nets)),
        }

    @cached_property
    def _plain(self) -> tuple[torch.Tensor, float, float]:
        self._two_windows(self.nets)  # to warm up
        return self._two_windows(self.nets)

    def _two_windows(self, nets: Networks) -> tuple[torch.Tensor, float, float]:
        """Latents, and seconds of either."""
        found: list[torch.Tensor] = []
        job = networks.clip(MemoPipeline(nets), self.size, 2, steps=self.steps)
        windows = measures.windows_of(nets, job, EXACT)
        first, second = (seconds_of(lambda: found.append(next(windows)), self.device) for _ in range(2))
        return torch.cat(found, dim=1), first, second

    def growth_with_pixels(self) -> dict[str, Any]:
        sizes = [64, 128] if self.tiny else [256, 512, 768, 1024]
        return measures.over_pixels(self.nets, sizes, True, steps=2)

    def growth_with_portraits(self) -> dict[str, Any]:
        counts = [1, 2] if self.tiny else [1, 2, 3, 4]
        return measures.over_portraits(self.nets, self.size, counts, 1, steps=2)


def table(part: str, found: dict[str, Any]) -> str:
    """A part's figures in a few lines."""
    if "error" in found:
        return f"{part}: failed: {found['error']}"
    if part == "window":
        peak = found.get("peak allocated, bytes", {})
        lines = [f"{how}: failed: {error}" for how, error in found.get("failed", {}).items()]
        for how, seconds in found["seconds a frame"].items():
            ratio = found["median"][RELEASED][END_TO_END] / found["median"][how][END_TO_END]
            error = found.get("relative error of latents against " + EXACT, {}).get(how, 0.0)
            lines.append(
                f"{how}: {seconds:.4f} s a frame, {ratio:.2f}x, error against exact {error:.1e}, "
                f"peak {peak.get(how, 0) / GB:.2f} GB"
            )
        return "\n".join(lines)
    if part == "by part":
        found = {how: found["median"][how] for how in (RELEASED, EXACT)}
    return "\n".join(f"{name}: {rounded(row, 3)}" for name, row in found.items())


def picture(results: Results, path: Path) -> None:
    measured = {name: found for name, found in results.measured.items() if "error" not in found}
    panels: list[chart.Bars | chart.Curves] = []
    window = measured.get("window")
    if window:
        first = window["median"][RELEASED][END_TO_END]
        errors = window.get("relative error of latents against " + EXACT, {})
        labels = {how: f"{how}\nerror {errors[how]:.1e}" if how in errors else how for how in window["median"]}
        ratios = {labels[how]: first / by[END_TO_END] for how, by in window["median"].items()}
        panels.append(chart.Bars("times faster than the released schedule", {"": ratios}, "x", line=1))
        speed = {"": {labels[how]: fps for how, fps in window["frames a second"].items()}}
        panels.append(chart.Bars("frames a second (line: real time at 25)", speed, line=25))
        peak = {how: count / GB for how, count in window.get("peak allocated, bytes", {}).items()}
        panels.append(chart.Bars("peak allocated, GB", {"": peak}))
    by_part = measured.get("by part", {}).get("median", {})
    panels.append(chart.Bars("seconds by part, two windows of few steps", by_part))
    taken = measured.get("budget", {})
    within = {f"{speed}, {row['card, GiB']} GiB": row for speed, row in taken.items()}
    bytes_of = {
        name: {label: (row[key] or 0) / budget.GIB for label, row in within.items()}
        for name, key in (("planned", "planned, bytes"), ("taken", "peak allocated, bytes"))
    }
    panels.append(chart.Bars("memory within a card's budget, GiB", bytes_of))
    share = ", share of copy bandwidth"
    versions = {key.removesuffix(share) for row in measured.get("kernels", {}).values() for key in row if share in key}
    bandwidth = {
        version: {name: row[version + share] for name, row in measured["kernels"].items() if version + share in row}
        for version in sorted(versions, key=["naive", "fused", "triton"].index)
    }
    panels.append(chart.Bars("kernels: share of the bandwidth of a copy (line: goal)", bandwidth, line=0.6))
    roofline = {part: row["share of peak"] for part, row in measured.get("roofline", {}).items()}
    panels.append(chart.Bars("share of the bf16 peak by part (line: goal)", {"exact": roofline}, line=0.35))
    options = {name.removeprefix(OPTION): row for name, row in measured.items() if name.startswith(OPTION)}
    gains = {"": {name: row["times faster than without"] for name, row in options.items()}}
    panels.append(chart.Bars("options: times faster than without", gains, "x", line=1))
    pixels = {int(n): row["seconds"] for n, row in measured.get("growth with pixels", {}).items()}
    panels.append(chart.Curves("seconds of a window of 2 steps by its side", {"seconds": pixels}, "pixels"))
    portraits = {int(n): row["seconds a portrait"] for n, row in measured.get("growth with portraits", {}).items()}
    panels.append(chart.Curves("seconds a portrait by portraits in a batch", {"seconds": portraits}, "portraits"))
    h = results.hardware
    chart.draw(path, f"{h.get('gpu', h['cpu'])}, torch {h['torch']}, triton {h.get('triton')}, {h['date']}", panels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = list(Bench().parts)
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(map(repr, names))}")
    parser.add_argument("--again", action="store_true", help="measure what is in gpu.json already, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which no part begins (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this program out (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for the same")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here: run this where there is one (--device cpu --tiny tries it out)")
    start = time.perf_counter()
    kind = "gpu-tiny" if args.tiny else "gpu"  # a trial replaces no figures
    bench, results = Bench(args.device, args.tiny), Results(args.out / f"{kind}.json", args.device)
    for name in args.only or bench.parts:
        spent = time.perf_counter() - start
        if results.has(name) and not args.again:
            print(f"{name}: measured already")
            continue
        if spent > args.limit:
            print(f"{name}: not begun after {spent:.0f} s; call again to go on")
            continue
        print(f"{name} ...", flush=True)
        found: dict[str, Any] = {}

        def measure() -> dict[str, Any]:
            return rounded(bench.parts[name]())

        took = seconds_of(lambda: found.update(results.add(name, measure)), args.device)
        print(f"{table(name, found)}\n  ({took:.0f} s)", flush=True)
        measures.forget_peak(bench.device)
    picture(results, args.out / f"{kind}.png")


if __name__ == "__main__":
    main()
