"""On a GPU, with random weights at the released size, sampling takes what its plan says and stays within it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import networks
from memo_core import MemoPipeline
from memo_core.budget.counting import GIB
from memo_core.budget.plan import choose_plan
from memo_core.checkpoint.networks import Networks
from memo_core.sampling.plan import Plan

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
SIZE = 512


@pytest.fixture(scope="module")
def full() -> Iterator[Networks]:
    yield networks.full_size()
    gc.collect()
    torch.cuda.empty_cache()


def sample(
    nets: Networks, room: float | None, vae_frames: int | None = None, **settings: object
) -> tuple[Tensor, Plan, int]:
    """Latents of two windows, so that sums are made and carried on; the plan; the peak of allocated bytes."""
    pipe = MemoPipeline(nets)
    job = networks.clip(pipe, SIZE, 2, steps=3, **settings)
    plan = choose_plan(nets, SIZE, SIZE, job.settings, None if room is None else int(room * GIB))
    if vae_frames is not None:
        plan = replace(plan, vae_frames=vae_frames)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    windows = list(pipe.sample_windows(job, plan=plan))
    peak = torch.cuda.max_memory_allocated()
    return torch.stack([window.latents for window in windows]), plan, peak


@pytest.mark.parametrize(
    ("speed", "guidance", "room"),
    [("exact", 3.5, 11.5), ("balanced", 3.5, 7.5), ("exact", 1.0, 7.5), ("exact", 3.5, 6.5), ("exact", 3.5, None)],
    ids=["exact-12", "balanced-8", "alone-8", "exact-7", "exact-all"],
)
def test_the_peak_is_the_plans_and_below_the_budget(
    full: Networks, speed: str, guidance: float, room: float | None
) -> None:
    _, plan, peak = sample(full, room, speed=speed, guidance_scale=guidance)
    reserved = torch.cuda.max_memory_reserved()  # more by what lies in pieces: nobody has counted that yet
    figures = f"counted {plan.peak / GIB:.2f}, allocated {peak / GIB:.2f}, reserved {reserved / GIB:.2f} GiB"
    print(f"{speed}: {plan.describe()}; {figures}")
    if room is not None:
        assert peak < room * GIB
    assert peak == pytest.approx(plan.peak, rel=0.15)


def test_what_waits_in_host_memory_changes_no_bits(full: Networks) -> None:
    everything, plan, _ = sample(full, None, vae_frames=1)
    little, less, _ = sample(full, 9.0, vae_frames=1)
    assert plan.on_host == 0 and not less.row_by_row and less.sums_on_host and not less.reference_net_stays
    assert torch.equal(everything, little)
    assert all(p.is_cuda for p in full.diffusion_net.parameters())
    assert not any(p.is_cuda for p in full.reference_net.parameters())
    again, _, _ = sample(full, None, vae_frames=1)
    assert torch.equal(everything, again) and all(p.is_cuda for p in full.reference_net.parameters())


def test_what_a_pipeline_plans_by_itself_fits(full: Networks) -> None:
    pipe = MemoPipeline(full)
    plan = pipe.plan(networks.clip(pipe, SIZE, 1))
    assert plan is not None and plan.peak <= torch.cuda.get_device_properties(0).total_memory


def test_host_memory_does_not_grow_with_the_clip(full: Networks) -> None:
    import psutil

    pipe = MemoPipeline(full)
    job = networks.clip(pipe, 256, 12, steps=1)
    plan = choose_plan(full, 256, 256, job.settings, 5 * GIB)
    held = []
    for _ in pipe.sample_windows(job, plan=plan):
        gc.collect()
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[7] < 64 * 2**20  # the state's seventh window is there by then
