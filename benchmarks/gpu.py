"""What memo_core costs on a GPU at the released size: `python -m benchmarks.gpu --first` in the first fifteen minutes.

Random weights in bf16 at 512 x 512. Parts come in the order of their weight; each writes to gpu.json while it is
measured, what fails is noted there and does not stop the rest, and another call goes on with what is missing. With
`--first` every part runs in a process of its own, which is killed when its time is up. A chart goes to gpu.png, and at
the end the goals are told, one a line.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from memo_core import MemoPipeline, kernels
from memo_core.budget.counting import GIB
from memo_core.budget.plan import choose_plan
from memo_core.budget.report import DRIVER
from memo_core.checkpoint.networks import Networks
from memo_core.kernels import fused, naive
from memo_core.release import WINDOW
from memo_core.sampling.job import Job
from memo_core.sampling.plan import Plan

from . import chart, measures, networks, released
from .measures import END_TO_END, EXACT, RELEASED
from .results import Results, rounded
from .timing import Parts, per_call, seconds_of

LIMIT = 840  # seconds that all parts may take together
CUDNN_LAST = "window, cuDNN attention last"
# What has to be in the environment before a part's process first attends.
ENVIRONMENT = {CUDNN_LAST: {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}}
# Seconds that a part may take at most with --first, twice what is expected and more. These first, and if time is short
# each gets its share of what is left.
ESSENTIAL = {
    "card": 60,
    "kernels": 150,
    "budget": 120,
    "window": 150,
    CUDNN_LAST: 60,
    "by part": 60,
    "roofline": 60,
}
# By name: what is on, the rest is off; and seconds.
OPTIONS = {
    "channels-last": (("channels_last",), 60),
    "fused QKV": (("fuse_qkv",), 60),
    "CUDA graphs": (("cuda_graphs",), 60),
    "fp8 weights": (("fp8_weights",), 60),
    "compiled": (("compile",), 300),
    "these four": (("channels_last", "fuse_qkv", "cuda_graphs", "compile"), 300),
}
OPTION = "option: "  # before their names as parts
GROWTH = {"growth with pixels": 90, "growth with portraits": 60}
SECONDS = ESSENTIAL | GROWTH | {OPTION + name: seconds for name, (_, seconds) in OPTIONS.items()}
ON_CPU = ("channels-last", "fused QKV", "fp8 weights")  # options that ask for no GPU and no compiler
# Presets, and GiB of memory of the cards they are tried on; None: all that there is.
CARDS = (("exact", 12), ("balanced", 8), ("exact", 8), ("exact", None))
GB = 1e9


class Bench:
    """The parts, each a method that returns its figures, or gives what is known of them so far again and again.

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

    @property
    def parts(self) -> dict[str, Callable[[], dict[str, Any] | Iterator[dict[str, Any]]]]:
        """By name, the most important first."""
        found = {
            "card": self.card,
            "kernels": self.kernels,
            "budget": self.budget,
            "window": self.window,
            CUDNN_LAST: partial(self.window, [EXACT]),
            "by part": self.by_part,
            "roofline": self.roofline,
            "growth with pixels": self.growth_with_pixels,
            "growth with portraits": self.growth_with_portraits,
        }
        return found | {OPTION + name: partial(self.option, name) for name in (ON_CPU if self.tiny else OPTIONS)}

    def card(self) -> dict[str, Any]:
        """Whose kernels run, and the card's rates."""
        return {"kernels": "triton" if kernels.runs_on(self.device) else "torch", **self._rates}

    @cached_property
    def _rates(self) -> dict[str, float]:
        """Bytes a second of a large copy, operations a second of a large bf16 product."""
        source = torch.empty(2**22 if self.tiny else 2**32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return {
            "copy, bytes a second": 2 * source.nbytes / per_call(lambda: target.copy_(source), self.device),
            "bf16 product, operations a second": 2 * side**3 / per_call(lambda: a @ b, self.device),
        }

    def kernels(self) -> Iterator[dict[str, Any]]:
        """Every kernel at the released widths: whether it is right, and how near to the bandwidth of a copy."""
        versions = {"naive": naive, "fused": fused}
        if self.device.type == "cuda":
            from memo_core.kernels import triton  # absent: the part says so

            versions["triton"] = triton
        levels = {8: 16} if self.tiny else {40: 4096, 80: 1024, 160: 256}
        bandwidth = self._rates["copy, bytes a second"]
        return measures.kernels(levels, self.device, torch.bfloat16, versions, bandwidth, 0.05, gradients=True)

    def budget(self) -> Iterator[dict[str, Any]]:
        """A video's second window on cards of several sizes: what was allowed, planned and taken."""
        found = {}
        for speed, card in CARDS[:2] if self.tiny else CARDS:
            allowed = None if card is None else card * GIB - DRIVER
            row = self._within(speed, None if self.tiny else allowed)
            found[f"{speed}, {'all there is' if card is None else f'{card} GiB'}"] = row
            yield found

    def _within(self, speed: str, allowed: int | None) -> dict[str, Any]:
        # By itself: what it holds must be gone before the next one is measured.
        pipe = MemoPipeline(self.nets)
        job = networks.clip(pipe, self.size, 2, steps=self.steps, speed=speed)
        plan = choose_plan(self.nets, self.size, self.size, job.settings, allowed)
        fits, took = True, None
        try:
            took = self._planned(job, plan, allowed)
        except torch.cuda.OutOfMemoryError:
            fits = False
        seconds, allocated, reserved = took or self._planned(job, plan, None)
        return {
            "plan": plan.describe(),
            "allowed, bytes": allowed,
            "runs within": fits,
            "planned, bytes": plan.peak,
            "peak allocated, bytes": allocated,
            "peak reserved, bytes": reserved,
            "seconds a frame": seconds / WINDOW,
        }

    def _planned(self, job: Job, plan: Plan, allowed: int | None) -> tuple[float, int, int]:
        """Seconds of the second window, and peaks; torch may take no more than what is allowed, as on such a card."""
        measures.forget_peak(self.device)
        windows = MemoPipeline(self.nets).sample_windows(job, plan=plan)
        try:
            self._allow(allowed)
            next(windows)
            return seconds_of(lambda: next(windows), self.device), *measures.peaks(self.device)
        finally:
            windows.close()
            self._allow(None)
            for net in (self.nets.reference_net, self.nets.diffusion_net):  # one may wait in host memory
                net.to(self.device)

    def _allow(self, most: int | None) -> None:
        if self.device.type == "cuda":
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if most is None else min(1.0, most / whole))

    def window(self, hows: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """A video's second window by preset and by the released schedule, with the peaks of memory."""
        job = networks.clip(MemoPipeline(self.nets), self.size, 2, steps=self.steps)
        hows = hows or [*measures.presets(), RELEASED]
        for found in measures.compare(self.nets, job, hows, self.repeats, only_last=True):
            found["seconds a frame"] = {how: parts[END_TO_END] / WINDOW for how, parts in found["median"].items()}
            found["frames a second"] = {how: 1 / seconds for how, seconds in found["seconds a frame"].items()}
            yield found

    def by_part(self) -> Iterator[dict[str, Any]]:
        """Where the time goes, by memo_core and by the released schedule: two windows of few steps."""
        job = networks.clip(MemoPipeline(self.nets), self.size, 2, steps=2 if self.tiny else 4)
        return measures.compare(self.nets, job, [EXACT, RELEASED], 1)

    def roofline(self) -> dict[str, Any]:
        """Operations and seconds of one step of the Diffusion Net, by part, against the card's peak.

        What Triton kernels do is not among the counted operations; it is little.
        """
        from torch.utils.flop_counter import FlopCounterMode

        pipe, peak = MemoPipeline(self.nets), self._rates["bf16 product, operations a second"]
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
        second, against networks without options.
        """
        from memo_core.running.options import Options, optimise

        nets, plain = self._build(), self._plain
        optimise(nets, Options(**{"channels_last": False, "fuse_qkv": False, **dict.fromkeys(OPTIONS[name][0], True)}))
        measures.forget_peak(self.device)
        latents, first, second = self._two_windows(nets)
        return {
            "seconds of the first window": first,
            "seconds of the second window": second,
            "seconds of the second window without": plain[2],
            "times faster than without": plain[2] / second,
            "relative error of latents against without": measures.relative_error(latents, plain[0]),
            "peak allocated, bytes": max(0, measures.peaks(self.device)[0] - measures.module_bytes(self.nets)),
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

    def growth_with_pixels(self) -> Iterator[dict[str, Any]]:
        sizes = [64, 128] if self.tiny else [256, 512, 768, 1024]
        return measures.over_pixels(self.nets, sizes, True, steps=2)

    def growth_with_portraits(self) -> Iterator[dict[str, Any]]:
        counts = [1, 2] if self.tiny else [1, 2, 3, 4]
        return measures.over_portraits(self.nets, self.size, counts, 1, steps=2)


def table(part: str, found: dict[str, Any]) -> str:
    """A part's figures in a few lines."""
    rows = {name: row for name, row in found.items() if name != "error"}
    lines = [f"{part}: failed: {found['error']}"] if "error" in found else []
    if "seconds a frame" in rows:  # a window
        peak, errors = rows.get("peak allocated, bytes", {}), rows.get("relative error of latents against " + EXACT, {})
        for how, seconds in rows["seconds a frame"].items():
            told = f"{how}: {seconds:.4f} s a frame"
            if RELEASED in rows["seconds a frame"]:
                told += f", {rows['seconds a frame'][RELEASED] / seconds:.2f}x {RELEASED}"
            if how in errors:
                told += f", error against exact {errors[how]:.1e}"
            lines.append(told + (f", peak {peak[how] / GB:.2f} GB" if how in peak else ""))
        lines += [f"{how}: failed: {error}" for how, error in rows.get("failed", {}).items()]
    else:
        lines += [f"{name}: {rounded(row, 3)}" for name, row in rows.get("median", rows).items()]
    return "\n".join(lines)


SHARE = ", share of copy bandwidth"
ERROR = ", relative error"
FASTER = ", times faster than naive"


def goals(measured: dict[str, dict[str, Any]], gpu: str) -> list[str]:
    """What was to be reached on an H200, a line each: passed, failed, or not measured.

    Args:
        gpu: what it was measured on.
    """
    lines = []

    def goal(what: str, value: float | None, passes: Callable[[float], bool], text: str = "") -> None:
        told = "not measured" if value is None else f"{'pass' if passes(value) else 'FAIL'}: {value:.3g} {text}"
        lines.append(f"{what}: {told}".rstrip())

    window = measured.get("window", {})
    asked = window.get("size") == 512
    seconds = window.get("seconds a frame", {}).get(EXACT) if asked else None
    goal("exact, at most 0.18 s a frame at 512x512 on an H200", seconds, lambda s: s <= 0.18, f"on {gpu}")
    live = "live, at least 30 frames a second at 512x512 on an H200"
    if "live" in measures.presets():
        frames = window.get("frames a second", {}).get("live") if asked else None
        goal(live, frames, lambda n: n >= 30, f"on {gpu}")
    else:
        lines.append(f"{live}: no such preset")
    peaks = {name: row for name, row in measured.get("budget", {}).items() if name != "error"}
    for name, row in peaks.items():
        allocated = row["peak allocated, bytes"] / row["planned, bytes"] if row["peak allocated, bytes"] else None
        told = f"of {row['planned, bytes'] / GB:.1f} GB; reserved {row['peak reserved, bytes'] / GB:.1f} GB"
        told += "" if row["runs within"] else "; OUT OF MEMORY on such a card"
        runs = row["runs within"]
        goal(f"peak within the plan by 10%: {name}", allocated, lambda x, runs=runs: runs and abs(x - 1) <= 0.1, told)
    if not peaks:
        goal("peak within the plan by 10%", None, bool)
    rows = {name: row for name, row in measured.get("kernels", {}).items() if name != "error"}
    ours = ("fused" + ERROR, "triton" + ERROR)
    worst = {name: max((row[key] for key in ours if key in row), default=0.0) for name, row in rows.items()}
    name = max(worst, key=worst.get, default="")  # type: ignore[arg-type]
    goal("kernels right, within 2%", worst.get(name), lambda x: x <= 0.02, f"at most, {name}")
    shares = {name: row["triton" + SHARE] for name, row in rows.items() if "triton" + SHARE in row}
    for name, share in shares.items():
        goal(f"kernel at 60% of copy bandwidth: {name}", share, lambda x: x >= 0.6)
    if not shares:
        goal("kernels at 60% of copy bandwidth", None, bool)
    for name, row in rows.items():
        if name.startswith("geglu_linear") and "triton" + FASTER in row:
            lines.append(f"for information: {name}: {row['triton' + FASTER]:.2f} times as fast as torch's")
    step = measured.get("roofline", {}).get(released.DIFFUSION_STEP)
    if step is not None:
        rate = measured.get("card", {}).get("copy, bytes a second")
        lines.append(
            f"for information: a step takes {step['seconds a step'] * 1e3:.0f} ms, {step['TFLOP/s']:.0f} TFLOP/s, "
            f"{step['share of peak']:.0%} of a product's rate; "
            + ("" if rate is None else f"a copy moves {rate * step['seconds a step'] / GB:.0f} GB in this time")
        )
    return lines


def picture(results: Results, path: Path) -> None:
    # What failed may have some figures all the same.
    measured = {name: {k: v for k, v in found.items() if k != "error"} for name, found in results.measured.items()}
    panels: list[chart.Bars | chart.Curves] = []
    window = measured.get("window", {})
    if "median" in window:
        errors = window.get("relative error of latents against " + EXACT, {})
        labels = {how: f"{how}\nerror {errors[how]:.1e}" if how in errors else how for how in window["median"]}
        first = window["median"].get(RELEASED, {}).get(END_TO_END)
        ratios = {labels[how]: first / by[END_TO_END] for how, by in window["median"].items() if first}
        panels.append(chart.Bars("times faster than the released schedule", {"": ratios}, "x", line=1))
        speed = {"": {labels[how]: fps for how, fps in window["frames a second"].items()}}
        panels.append(chart.Bars("frames a second (line: real time at 25)", speed, line=25))
        peak = {how: count / GB for how, count in window.get("peak allocated, bytes", {}).items()}
        panels.append(chart.Bars("peak allocated, GB", {"": peak}))
    by_part = measured.get("by part", {}).get("median", {})
    panels.append(chart.Bars("seconds by part, two windows of few steps", by_part))
    taken = measured.get("budget", {})
    keys = {"planned": "planned, bytes", "taken": "peak allocated, bytes", "reserved": "peak reserved, bytes"}
    bytes_of = {name: {label: row[key] / GIB for label, row in taken.items()} for name, key in keys.items()}
    panels.append(chart.Bars("memory within a card's budget, GiB", bytes_of))
    versions = {key.removesuffix(SHARE) for row in measured.get("kernels", {}).values() for key in row if SHARE in key}
    bandwidth = {
        version: {name: row[version + SHARE] for name, row in measured["kernels"].items() if version + SHARE in row}
        for version in sorted(versions, key=["naive", "fused", "triton"].index)
    }
    panels.append(chart.Bars("kernels: share of the bandwidth of a copy (line: goal)", bandwidth, line=0.6))
    roofline = {part: row["share of peak"] for part, row in measured.get("roofline", {}).items()}
    panels.append(chart.Bars("share of the bf16 peak by part (line: goal)", {"exact": roofline}, line=0.35))
    options = {name.removeprefix(OPTION): row for name, row in measured.items() if name.startswith(OPTION)}
    gains = {"": {name: row["times faster than without"] for name, row in options.items() if row}}
    panels.append(chart.Bars("options: times faster than without", gains, "x", line=1))
    pixels = {int(n): row["seconds"] for n, row in measured.get("growth with pixels", {}).items()}
    panels.append(chart.Curves("seconds of a window of 2 steps by its side", {"seconds": pixels}, "pixels"))
    portraits = {int(n): row["seconds a portrait"] for n, row in measured.get("growth with portraits", {}).items()}
    panels.append(chart.Curves("seconds a portrait by portraits in a batch", {"seconds": portraits}, "portraits"))
    chart.draw(path, machine(results.hardware), panels)


def machine(hardware: dict[str, Any]) -> str:
    """What was measured on, in a line."""
    versions = ("torch", "triton", "cudnn", "driver", "date")
    return ", ".join(
        [hardware.get("gpu", hardware["cpu"]), *(f"{name} {hardware[name]}" for name in versions if name in hardware)]
    )


# --- Parts one after the other, here or in processes of their own -----------------------------------------------------


def command(part: str, args: argparse.Namespace) -> list[str]:
    """What measures a part in another process."""
    given = ["--only", part, "--again", "--here", "--out", str(args.out.resolve()), "--device", args.device]
    return [sys.executable, "-m", "benchmarks.gpu", *given, *["--tiny"] * args.tiny]


def apart(part: str, args: argparse.Namespace, seconds: float, path: Path) -> None:
    """Measures a part in another process, which is ended after so many seconds, and writes down if it did not end well;
    what it has written by then stays.
    """
    process = subprocess.Popen(
        command(part, args),
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **ENVIRONMENT.get(part, {})},
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
        problem = f"the process ended with {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s"
    finally:
        _end(process)
    if problem is not None:
        results = Results(path, None)
        results.put(part, {**results.measured.get(part, {}), "error": problem})
        print(table(part, results.measured[part]), flush=True)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and what it has started: compilers work in processes of their own."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(10)
    except (OSError, subprocess.TimeoutExpired):  # gone already; or stuck in the driver, and then so be it
        pass


def share(part: str, left: list[str], seconds: float) -> float:
    """Seconds for a part of those that are left: its own, or as many less as all that are essential have to do with.

    Args:
        left: parts from this one on.
    """
    wanted = sum(ESSENTIAL.get(name, 0) for name in left) if part in ESSENTIAL else SECONDS[part]
    return SECONDS[part] * min(1.0, seconds / wanted)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = list(Bench().parts)
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(map(repr, names))}")
    parser.add_argument("--first", action="store_true", help="each part in a process of its own, ended at its time")
    parser.add_argument("--here", action="store_true", help="all in this process, and nothing but the figures")
    parser.add_argument("--again", action="store_true", help="measure what is in gpu.json already, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this program out (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for the same")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here: run this where there is one (--device cpu --tiny tries it out)")
    end = time.monotonic() + args.limit
    path = args.out / f"gpu{'-tiny' * args.tiny}.json"  # a trial replaces no figures
    bench, device = Bench(args.device, args.tiny), None if args.first else args.device
    results, todo = Results(path, device), args.only or list(bench.parts)
    for place, part in enumerate(todo):
        left = end - time.monotonic()
        # Only the first process tells whether the figures of before are this machine's.
        if results.has(part) and not args.again and not (args.first and place == 0):
            print(f"{part}: measured already")
        elif left <= 0:
            print(f"{part}: not begun, time is up; call again to go on")
        elif not args.here and (args.first or part in ENVIRONMENT):
            seconds = share(part, todo[place:] if args.first else [part], left)
            print(f"{part}, at most {seconds:.0f} of {left:.0f} s ...", flush=True)
            apart(part, args, seconds, path)
            results = Results(path, device)
        else:
            print(f"{part} ...", flush=True)
            took = seconds_of(lambda: results.add(part, bench.parts[part]), args.device)
            print(f"{table(part, results.measured[part])}\n  ({took:.0f} s)", flush=True)
            measures.forget_peak(bench.device)
    if not args.here:
        print(machine(results.hardware))
        print("\n".join(goals(results.measured, results.hardware.get("gpu", "the CPU"))), flush=True)
        picture(results, path.with_suffix(".png"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process of a part stays behind
    main()
