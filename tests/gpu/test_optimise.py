"""On a GPU: a replayed step is the eager one, compiled blocks are close, and the step loop never waits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import networks
from memo_core import MemoPipeline
from memo_core.checkpoint.networks import Networks
from memo_core.memory.cache import MemoryCache
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.past import in_turn
from memo_core.running.graphs import GraphedStep
from memo_core.running.options import Options, optimise
from memo_core.sampling.conditions import Conditioner

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
SIZE = 128


@pytest.fixture(scope="module")
def mid() -> Networks:
    return networks.mid_size("cuda", torch.bfloat16)


def step_of(nets: Networks, emotion: int = 3) -> Callable[[Tensor, list[Tensor]], Tensor]:
    """A step under the conditions of a window of its own."""
    job = networks.clip(MemoPipeline(nets), SIZE, 1).checked(nets)
    conditioner = Conditioner(nets, job.reference, job.settings, MemoryCache())
    inputs = job.inputs(0, job.entering(nets))
    conditions, memory = conditioner.conditions(inputs), conditioner.memory(inputs.memory)
    net: DiffusionNet = nets.diffusion_net
    prepared = net.prepare(replace(conditions, emotion=torch.full_like(conditions.emotion, emotion)))
    return lambda latents, shifts: net(latents, shifts, prepared, in_turn(memory)).float()


def inputs(nets: Networks, step: int) -> tuple[Tensor, list[Tensor]]:
    net = nets.diffusion_net
    generator = torch.Generator("cuda").manual_seed(step)
    latents = torch.randn(1, 4, 16, SIZE // 8, SIZE // 8, generator=generator, device="cuda").to(torch.bfloat16)
    return latents, net.time_shifts(torch.tensor([1000.0 - 40 * step], device="cuda"), torch.bfloat16)


@torch.inference_mode()
def test_a_replayed_step_equals_the_eager_one(mid: Networks) -> None:
    for emotion in (3, 6):  # two windows
        step = step_of(mid, emotion)
        graphed = GraphedStep(step)
        answers = [graphed(*inputs(mid, number)) for number in range(5)]
        for number, answer in enumerate(answers):  # all at the end: none was written over
            assert torch.equal(answer, step(*inputs(mid, number)))


@torch.inference_mode()
def test_graphs_of_windows_gone_by_leave_no_memory(mid: Networks) -> None:
    reserved = []
    for _ in range(4):
        graphed = GraphedStep(step_of(mid))
        for number in range(4):
            graphed(*inputs(mid, number))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= 1.1 * reserved[1]


@pytest.mark.parametrize("options", [dict(compile=True), dict(channels_last=True), dict(fuse_qkv=True)], ids=str)
def test_options_change_rounding_alone(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    plain = networks.tiny("cuda", torch.float32)
    fast = copy.deepcopy(plain)
    optimise(fast, Options(**options))
    job = networks.clip(MemoPipeline(plain), SIZE, 1, steps=2)
    wanted, mine = (next(MemoPipeline(nets).sample_windows(job)).latents for nets in (plain, fast))
    assert (mine - wanted).norm() < 1e-4 * wanted.norm()


def test_the_step_loop_never_waits_for_the_device(mid: Networks) -> None:
    """Through `sample_windows`, at guidance, from the end of the first step to the end of the last."""
    pipe = MemoPipeline(mid)
    job = networks.clip(pipe, SIZE, 1, steps=4)
    list(pipe.sample_windows(job))  # kernels are chosen and workspaces made

    def on_progress(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if done == total else "error")

    try:
        list(pipe.sample_windows(job, on_progress=on_progress))
    finally:
        torch.cuda.set_sync_debug_mode("default")
