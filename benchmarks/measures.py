"""The measurements both benchmarks make: windows against the released schedule, presets, kernels, growing cost."""

from __future__ import annotations

import gc
import math
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memo_core import MemoPipeline
from memo_core.checkpoint.networks import Networks
from memo_core.kernels import fused, naive
from memo_core.memory.cache import MemoryCache
from memo_core.nets.conditions import Conditions
from memo_core.nets.past import Memory
from memo_core.release import DECAY, WINDOW
from memo_core.running import precision
from memo_core.sampling.conditions import Conditioner
from memo_core.sampling.job import Job
from memo_core.sampling.renderer import Window
from memo_core.sampling.settings import PRESETS
from memo_core.sampling.window import sample_window

from . import networks, released
from .results import described
from .timing import Parts, per_call, seconds_of, unmeasured

RELEASED, EXACT = "released schedule", "exact"
END_TO_END = "end to end"
CONDITIONS = "window conditions"  # memo_core's alone: what it computes once per window

# Which of memo_core's modules do what, by the names the checkpoint gives them.
MODULES = {
    released.RESIDUAL: r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+",
    released.SPATIAL: r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+",
    released.AUDIO: r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.audio_modules\.\d+",
    released.MEMORY: r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.motion_modules\.\d+",
}


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


def module_bytes(nets: Networks) -> int:
    """Bytes of the weights that sampling reads."""
    modules = (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae)
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


# --- Windows ----------------------------------------------------------------------------------------------------------


def step_modules(net: nn.Module) -> dict[str, list[nn.Module]]:
    """The Diffusion Net's modules by part."""
    named = dict(net.named_modules())
    return {part: [m for name, m in named.items() if re.fullmatch(how, name)] for part, how in MODULES.items()}


@contextmanager
def watched(nets: Networks, parts: Parts) -> Iterator[None]:
    """Measures memo_core's own parts under the released schedule's names."""
    net = nets.diffusion_net
    modules = {
        **step_modules(net),
        released.REFERENCE_NET: [nets.reference_net],
        released.DIFFUSION_STEP: [net],
        released.VAE_ENCODE: [nets.vae.encoder],
        released.VAE_DECODE: [nets.vae.decoder],
    }
    with ExitStack() as stack:
        stack.enter_context(parts.watching(modules))
        stack.enter_context(_calls(net, "past", released.MEMORY_INPUTS, parts, generator=True))
        for method in ("prepare", "time_shifts"):
            stack.enter_context(_calls(net, method, CONDITIONS, parts))
        yield


@contextmanager
def _calls(module: nn.Module, method: str, name: str, parts: Parts, generator: bool = False) -> Iterator[None]:
    """Measures the calls of a module's method, where it has one."""
    original = getattr(module, method, None)

    def called(*args: Any, **kwargs: Any) -> Any:
        with parts(name):
            return original(*args, **kwargs)

    def generated(*args: Any, **kwargs: Any) -> Iterator[Any]:
        made = original(*args, **kwargs)
        while True:
            with parts(name):
                value = next(made, None)
            if value is None:
                return
            yield value

    if original is not None:
        object.__setattr__(module, method, generated if generator else called)
    try:
        yield
    finally:
        if original is not None:
            object.__delattr__(module, method)


def windows_of(nets: Networks, job: Job, how: str, parts: Parts | None = None) -> Iterator[Tensor]:
    """Latents [4, F, h, w] of a job's windows, by the released schedule or by memo_core with nothing kept from before;
    the latter with the preset that `how` names.
    """
    if how == RELEASED:
        for window in released.sample_released(nets, job, unmeasured if parts is None else parts):
            yield window.latents
        return
    job = replace(job, settings=replace(job.settings, speed=how))
    with ExitStack() as stack:
        if parts is not None:
            stack.enter_context(watched(nets, parts))
        for window in MemoPipeline(nets).sample_windows(job):
            yield window.latents


def compare(
    nets: Networks, job: Job, hows: list[str], repeats: int, only_last: bool = False
) -> Iterator[dict[str, Any]]:
    """Samples a job in several ways in turn, A B A B; after each what is known so far.

    Args:
        hows: the released schedule and names of presets; the first that runs is what the others are compared with.
        only_last: measures only the last window, without parts, which only a video's first one differs from.

    Yields:
        Seconds of every run and medians, end to end and by part, and their ratio to the first; on the CPU the
        processor's seconds, too; the latents' relative error against the first and against `exact`; how the job was;
        and what failed: raised only if nothing else is left.
    """
    device = nets.device
    runs: dict[str, _Runs] = {}
    failed: dict[str, str] = {}
    # Of all windows where the last is measured: a second one has other shapes than the first.
    warm_up = replace(job, settings=replace(job.settings, steps=2), noise=None)
    if not only_last:
        warm_up = replace(warm_up, num_frames=WINDOW)
    for repeat in range(repeats):
        for how in hows:
            if how in failed:
                continue
            try:
                if repeat == 0:
                    list(windows_of(nets, warm_up, how))
                runs.setdefault(how, _Runs()).measure(nets, job, how, only_last)
            except Exception as error:  # the others are worth measuring all the same
                runs.pop(how, None)
                failed[how] = described(error)
                if len(failed) == len(hows):
                    raise
                traceback.print_exc()
            forget_peak(device)
            if runs:
                yield _compared(runs, job, only_last, device, failed)


@dataclass
class _Runs:
    """What one way of sampling took, run by run."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: list[float] = field(default_factory=list)
    latents: Tensor | None = None
    allocated: int = 0
    reserved: int = 0

    def measure(self, nets: Networks, job: Job, how: str, only_last: bool) -> None:
        device = nets.device
        parts = None if only_last else Parts(device)
        windows, found = windows_of(nets, job, how, parts), []
        forget_peak(device)
        if only_last:
            found += [next(windows) for _ in range(job.windows - 1)]
        before = time.process_time()
        took = {END_TO_END: seconds_of(lambda: found.extend(windows), device)}
        self.processor.append(time.process_time() - before)
        for part, value in {**took, **({} if parts is None else parts.seconds())}.items():
            self.seconds.setdefault(part, []).append(value)
        self.latents = torch.cat(found, dim=1)
        allocated, reserved = peaks(device)
        self.allocated, self.reserved = max(self.allocated, allocated), max(self.reserved, reserved)


def _compared(
    runs: dict[str, _Runs], job: Job, only_last: bool, device: torch.device, failed: dict[str, str]
) -> dict[str, Any]:
    medians = {
        how: {part: statistics.median(run.seconds[part]) for part in _ordered(run.seconds)} for how, run in runs.items()
    }
    first, *others = runs
    result = {
        "size": 8 * job.reference.latents.shape[-1],
        "windows": 1 if only_last else job.windows,
        "steps": job.settings.steps,
        "seconds": {how: run.seconds for how, run in runs.items()},
        "median": medians,
        "times faster than " + first: {
            how: {part: medians[first][part] / value for part, value in medians[how].items() if part in medians[first]}
            for how in others
        },
    }
    if device.type == "cpu":  # what other programs on the machine do to the clock they hardly do to this
        least = {how: min(run.processor) for how, run in runs.items()}
        result["processor seconds"] = {how: run.processor for how, run in runs.items()}
        result["times less processor time than " + first] = {how: least[first] / least[how] for how in others}
    else:
        result["peak allocated, bytes"] = {how: run.allocated for how, run in runs.items()}
        result["peak reserved, bytes"] = {how: run.reserved for how, run in runs.items()}
    for reference in dict.fromkeys((first, EXACT)):
        if reference in runs:
            result["relative error of latents against " + reference] = {
                how: relative_error(run.latents, runs[reference].latents)
                for how, run in runs.items()
                if how != reference
            }
    return result | ({"failed": dict(failed)} if failed else {})


def peaks(device: torch.device) -> tuple[int, int]:
    """Most bytes allocated and reserved since `forget_peak`; 0 on the CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def forget_peak(device: torch.device) -> None:
    """Starts the count of `peaks` anew, with what is garbage gone; nothing on the CPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _ordered(parts: Iterable[str]) -> list[str]:
    order = (END_TO_END, released.DIFFUSION_STEP, released.RESIDUAL, released.SPATIAL, released.AUDIO, released.MEMORY)
    order += (released.MEMORY_INPUTS, CONDITIONS, released.REFERENCE_NET, released.VAE_ENCODE, released.VAE_DECODE)
    return sorted(parts, key=order.index)


def presets() -> list[str]:
    """Names of the speed presets, `exact` first."""
    return list(PRESETS)


# --- Kernels ----------------------------------------------------------------------------------------------------------


def kernel_inputs(
    dim: int, locations: int, device: torch.device | str, dtype: torch.dtype, heads: int = 8
) -> dict[str, tuple]:
    """Random arguments of every kernel at one level of the net: guidance's two rows of one window."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key, value = (draw(2, WINDOW, locations, heads, dim) for _ in range(3))
    kv, z = draw(2, locations, heads, dim, dim), draw(2, locations, heads, dim).abs() + 1
    channels, side = heads * dim, math.isqrt(locations)
    x, shift, scale = draw(2 * WINDOW, locations, channels), draw(2, channels), draw(2, channels)
    weight, bias, carried = draw(channels), draw(channels), precision.carried(dtype)
    hidden = draw(2 * WINDOW, locations, channels).to(carried)
    maps = hidden.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # channels-last
    groups = math.gcd(channels, 32)
    return {
        "memory_attention": (query, key, value, (kv, z)),
        "memory_sums": (key, value),
        "update_memory": ((kv.clone(), z.clone()), DECAY**WINDOW, key, value),
        "modulated_norm": (x, shift, scale),
        "geglu": (draw(2 * WINDOW, locations, 8 * channels),),
        "geglu_linear": (x, draw(8 * channels, channels), draw(8 * channels)),
        "group_norm": (maps, groups, weight, bias, 1e-5, shift, True),
        "layer_norm": (hidden, weight, bias),
        "add_norm": (hidden, x, shift, scale, 1e-5, carried, True),
        "add": (hidden, x, carried),
    }


def kernel_bytes(name: str, given: tuple) -> int:
    """Bytes that a kernel has to read and to write at least: each tensor once."""
    if name == "memory_attention":
        query, key, value, (kv, z) = given
        return 2 * query.nbytes + key.nbytes + value.nbytes + kv.nbytes + z.nbytes
    if name == "memory_sums":
        key, value = given
        z = key.nbytes // key.shape[1]
        return key.nbytes + value.nbytes + z * (1 + key.shape[-1])
    if name == "update_memory":
        (kv, z), _, key, value = given
        return key.nbytes + value.nbytes + 2 * (kv.nbytes + z.nbytes)
    x = given[0]
    if name == "geglu":
        return x.nbytes * 3 // 2
    if name == "geglu_linear":
        return sum(tensor.nbytes for tensor in given) + 4 * x.nbytes
    if name in ("add_norm", "add"):  # the sum is in the format of x here, its norm in that of y
        return 2 * x.nbytes + (2 if name == "add_norm" else 1) * given[1].nbytes
    if name == "group_norm":  # whose statistics come first
        return 2 * x.nbytes + x.numel() * given[2].itemsize
    return x.nbytes + x.numel() * given[1].itemsize


def kernels(
    levels: dict[int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    versions: dict[str, Any] | None = None,
    bandwidth: float | None = None,
    least: float = 0.2,
    gradients: bool = False,
) -> Iterator[dict[str, Any]]:
    """Seconds of each kernel in each version (`naive` first), by level, and its error against naive in float32.

    Args:
        levels: head width -> locations.
        versions: modules; naive and fused alone if None.
        bandwidth: bytes a second that the device copies at; then each kernel's share of it is given, too.
        least: seconds that a measurement should last.
        gradients: measures each with its gradients, too, as training needs them, after all others.

    Yields:
        What is known so far.
    """
    versions = {"naive": naive, "fused": fused} if versions is None else versions
    found: dict[str, Any] = {}
    for dim, locations in levels.items():
        for name, given in kernel_inputs(dim, locations, device, dtype).items():
            row: dict[str, Any] = {"locations": locations, "bytes": kernel_bytes(name, given)}
            stated = getattr(naive, name)
            here = {version: getattr(module, name) for version, module in versions.items()}
            here = {version: kernel for version, kernel in here.items() if version == "naive" or kernel is not stated}
            right = _computed(stated, given, torch.float32)
            for version, kernel in here.items():  # before any is timed: update_memory writes in place
                made = zip(_computed(kernel, given), right)
                row[f"{version}, relative error"] = max(relative_error(*pair) for pair in made)
            for version, kernel in here.items():
                row[version] = per_call(lambda: kernel(*given), device, least)
                if version != "naive":
                    row[f"{version}, times faster than naive"] = row["naive"] / row[version]
                if bandwidth is not None and name != "geglu_linear":  # which computes more than it moves
                    row[f"{version}, share of copy bandwidth"] = row["bytes"] / row[version] / bandwidth
            found[f"{name}, D {dim}"] = row
            yield found
    for dim, locations in levels.items() if gradients else ():
        for name, given in kernel_inputs(dim, locations, device, dtype).items():
            if name not in ("memory_attention", "memory_sums", "modulated_norm"):
                continue  # training uses no other
            for version, module in versions.items():
                if version in found[f"{name}, D {dim}"]:
                    run = with_gradients(getattr(module, name), given)
                    found[f"{name}, D {dim}"][f"{version}, with gradients"] = per_call(run, device, least)
                    yield found


def _computed(kernel: Callable, given: tuple, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """What a kernel makes of copies of its arguments, in another number format if one is given."""

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(part) for part in value)
        return value.to(dtype, copy=True) if isinstance(value, Tensor) else value

    return _parts(kernel(*copied(given)))


def with_gradients(kernel: Callable, given: tuple) -> Callable[[], None]:
    """A call of a kernel that computes the gradients of all its tensors, too."""
    flat = [part.detach().clone().requires_grad_() for value in given for part in _parts(value)]
    leaves = iter(flat)
    given = tuple(tuple(next(leaves) for _ in value) if isinstance(value, tuple) else next(leaves) for value in given)
    grads = [torch.ones_like(part) for part in _parts(kernel(*given))]

    def run() -> None:
        torch.autograd.grad(_parts(kernel(*given)), flat, grads)

    return run


def _parts(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- How cost grows ---------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """What this process holds of the machine's memory now; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return 0


def over_windows(nets: Networks, size: int, counts: list[int], **settings: Any) -> dict[str, Any]:
    """One clip of max(counts) windows: seconds a window and the most host memory so far, at each count."""
    pipe = MemoPipeline(nets)
    list(pipe.sample_windows(networks.clip(pipe, size, 1, **settings)))
    job = networks.clip(pipe, size, max(counts), **settings)
    found: dict[str, Any] = {"size": size, "steps": job.settings.steps, "windows": {}}
    most, took = 0, []
    windows, threads = pipe.sample_windows(job), torch.get_num_threads()
    torch.set_num_threads(1)  # so small, layers take longer to share than to compute
    for count in range(1, max(counts) + 1):
        last: list[Window] = []
        took.append(seconds_of(lambda: last.append(next(windows)), nets.device))
        most = max(most, resident_bytes())
        if count in counts:
            recent = took[-min(count, 100) :]  # of the last hundred: how long the clip has become
            found["windows"][count] = {
                "seconds a window": statistics.median(recent),
                "host memory, MB": most / 1e6,
                "memory state, bytes": last[0].memory.nbytes,
            }
    torch.set_num_threads(threads)
    return found


def over_pixels(nets: Networks, sizes: list[int], warm_up: bool, **settings: Any) -> Iterator[dict[str, Any]]:
    """Seconds of one window by its side in pixels, so far; with `warm_up` each size is sampled once before, for what a
    device finds out about it the first time.
    """
    found: dict[str, Any] = {}
    for size in sizes:
        pipe = MemoPipeline(nets)
        job = networks.clip(pipe, size, 1, **settings)

        def run() -> None:
            list(MemoPipeline(nets).sample_windows(job))

        if warm_up or not found:
            run()
        row = {"seconds": seconds_of(run, nets.device)}
        row["nanoseconds a pixel of video"] = 1e9 * row["seconds"] / (size * size * WINDOW)
        found[str(size)] = row
        yield found


def over_portraits(
    nets: Networks, size: int, counts: list[int], repeats: int, **settings: Any
) -> Iterator[dict[str, Any]]:
    """Seconds of the denoising of one window for several portraits in one batch, and a portrait, so far."""
    found: dict[str, Any] = {}
    pipe = MemoPipeline(nets)
    audio, emotion = networks.voice(nets, 1)
    jobs = [pipe.job(networks.portrait(nets, size, seed), audio, emotion, **settings) for seed in range(max(counts))]
    with torch.no_grad():
        conditions = [_conditions(nets, job) for job in jobs]
    for count in counts:
        given = _joined(conditions[:count])
        noise = torch.randn(count, 4, WINDOW, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
        noise = noise.to(nets.device)

        @torch.no_grad()
        def run() -> None:
            latents = sample_window(nets, noise, *given, jobs[0].settings)
            if latents.shape != noise.shape:
                raise ValueError(f"{count} portraits gave latents {list(latents.shape)}")

        run()
        seconds = statistics.median(seconds_of(run, nets.device) for _ in range(repeats))
        found[str(count)] = {"seconds": seconds, "seconds a portrait": seconds / count}
        yield found


def _conditions(nets: Networks, job: Job) -> tuple[Conditions, list[Memory]]:
    conditioner = Conditioner(nets, job.reference, job.settings, MemoryCache())
    inputs = job.inputs(0, job.entering(nets))
    return conditioner.conditions(inputs), list(conditioner.memory(inputs.memory))


def _joined(given: list[tuple[Conditions, list[Memory]]]) -> tuple[Conditions, list[Memory]]:
    """Conditions and memory of several portraits in one batch: first all unconditional rows, then all conditional
    ones.
    """

    def rows(tensors: list[Tensor]) -> Tensor:
        halves = [tensor.chunk(2) for tensor in tensors]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])

    conditions = [each for each, _ in given]
    memory = [tuple(rows(list(part)) for part in zip(*pairs)) for pairs in zip(*(memory for _, memory in given))]
    joined = replace(
        conditions[0],
        reference=[torch.cat(features) for features in zip(*(each.reference for each in conditions))],
        face_tokens=rows([each.face_tokens for each in conditions]),
        audio_tokens=rows([each.audio_tokens for each in conditions]),
        emotion=rows([each.emotion for each in conditions]),
    )
    return joined, memory
