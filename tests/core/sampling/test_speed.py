"""Speed presets: what each name means, what each approximation leaves out, and that `exact` leaves out nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from common import relative_l2, thinned
from torch import Tensor, nn

from memo_core import AudioTrack, MemoPipeline, Reference
from memo_core.errors import SamplingError
from memo_core.sampling.schedule import sigmas
from memo_core.sampling.settings import PRESETS, Settings, Speed
from memo_core.sampling.solvers import SOLVERS, ab2, euler
from memo_core.sampling.store import WindowStore

# What the names mean to whoever shared a workflow or keeps windows.
FROZEN = {
    "exact": dict(max_steps=None, solver="euler", guidance=(0.0, 1.0), fp8_sums=False),
    "balanced": dict(max_steps=10, solver="ab2", guidance=(0.0, 0.9), fp8_sums=True),
    "draft": dict(max_steps=6, solver="euler", guidance=(0.1, 0.85), fp8_sums=True),
}
ONE = dict(num_frames=16)  # a window
FOUR = [1.0, 0.667, 0.334, 0.001]  # sigmas of four steps

Sample = Callable[..., Tensor]


@pytest.fixture
def sample(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> Sample:
    """Latents of the 64 x 64 portrait; one window unless it is told otherwise."""
    return lambda **settings: pipe.sample_clip(small, track, **(ONE | settings))[0].latents


def rows(module: nn.Module, run: Callable[[], object]) -> list[int]:
    """First dimension of everything that the module answers while `run` runs."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    try:
        run()
    finally:
        hook.remove()
    return seen


# --- The names --------------------------------------------------------------------------------------------------------


def test_presets_are_what_they_were() -> None:
    assert {name: asdict(speed) for name, speed in PRESETS.items()} == FROZEN, (
        "shared workflows name presets, and stored windows are found by what they mean: changing one changes every "
        "video made with it; say so in the release notes, and here"
    )


def test_nothing_is_approximated_unless_asked_for(sample: Sample) -> None:
    assert Settings() == Settings(speed="exact") == Settings(speed=Speed())
    short = dict(num_frames=32, steps=1)
    plain = sample(**short)
    assert torch.equal(sample(**short, speed="exact"), plain)
    assert not torch.equal(sample(**short, speed="draft"), plain)
    assert torch.equal(sample(**short), plain), "a draft leaves nothing behind, such as sums in 8 bits"


def test_a_name_is_short_for_its_bundle(sample: Sample) -> None:
    assert torch.equal(sample(steps=2, speed="balanced"), sample(steps=2, speed=PRESETS["balanced"]))


@pytest.mark.parametrize("name", PRESETS)
def test_the_store_does_not_mix_presets(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, tmp_path: Path, name: str
) -> None:
    store = WindowStore(tmp_path)
    jobs = {speed: pipe.job(small, track, steps=1, speed=speed, **ONE) for speed in PRESETS}
    list(pipe.sample_windows(jobs[name], store=store))
    assert [other for other, job in jobs.items() if pipe.count_stored(job, store)] == [name]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Settings(speed="fast"), ["'fast'", *PRESETS]),
        (lambda: Speed(solver="heun"), ["'heun'", *SOLVERS]),
        (lambda: Speed(guidance=(0.5, 0.2)), ["(0.5, 0.2)", "lowest, highest"]),
        (lambda: Speed(guidance=(-0.1, 1.0)), ["(-0.1, 1.0)", "0 to 1"]),
        (lambda: Speed(guidance=(0.0, math.nan)), ["nan", "0 to 1"]),
        (lambda: Speed(max_steps=0), ["0", "from 1"]),
    ],
    ids=["name", "solver", "order", "range", "nan", "no steps"],
)
def test_errors_name_the_value_and_what_is_allowed(make: Callable[[], object], said: list[str]) -> None:
    with pytest.raises(SamplingError) as error:
        make()
    assert [words for words in said if words not in str(error.value)] == []


# --- Fewer steps ------------------------------------------------------------------------------------------------------


def test_steps_are_capped_and_progress_counts_what_is_done(pipe: MemoPipeline, sample: Sample) -> None:
    assert {name: Settings(steps=30, speed=name).steps for name in PRESETS} == {
        name: FROZEN[name]["max_steps"] or 30 for name in PRESETS
    }
    assert Settings(steps=5, speed="draft").steps == 5
    told: list[tuple[int, int]] = []
    few = dict(steps=9, speed=Speed(max_steps=2), on_progress=lambda done, total: told.append((done, total)))
    assert rows(pipe.nets.diffusion_net, lambda: sample(num_frames=32, **few)) == [2] * 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- Solvers ----------------------------------------------------------------------------------------------------------


def solved(solver: Callable, velocity: Callable[[Tensor, float], Tensor], points: list[float]) -> list[float]:
    """x at every point from 1 at the first; asserts one evaluation a step, in order."""
    seen: list[float] = []

    def asked(x: Tensor, step: int) -> Tensor:
        assert step == len(seen)
        seen.append(float(x))
        return velocity(x, points[step])

    end = float(solver(asked, torch.ones((), dtype=torch.float64), points))
    assert len(seen) == len(points) - 1
    return [*seen, end]


def test_ab2_is_exact_where_the_velocity_is_linear_in_time_and_euler_is_not() -> None:
    points = [1.0, 0.9, 0.5, 0.45, 0.1, 0.0]

    def off(solver: Callable) -> float:
        x = solved(solver, lambda x, t: 2 + 3 * t + 0 * x, points)
        # From its second step on: with one velocity known, the first is Euler's.
        wanted = [x[1] + 2 * (t - points[1]) + 1.5 * (t**2 - points[1] ** 2) for t in points[1:]]
        return max(abs(one - other) for one, other in zip(x[1:], wanted))

    assert off(ab2) < 1e-12 < 0.1 < off(euler)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (ab2, 2)], ids=["euler", "ab2"])
def test_solvers_converge_with_their_order(solver: Callable, order: int) -> None:
    """dx/dsigma = x, so that x is 1 / e at the end; on the released schedule, whose last step is a short one."""
    errors = [abs(solved(solver, lambda x, t: x, sigmas(steps))[-1] - math.exp(-1)) for steps in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_four_steps_lie_where_these_tests_expect_them() -> None:
    assert sigmas(4) == pytest.approx([*FOUR, 0.0], abs=1e-3)


@pytest.mark.parametrize("solver", thinned(SOLVERS, fast=["ab2"]))
def test_every_solver_can_be_stopped(pipe: MemoPipeline, small: Reference, track: AudioTrack, solver: str) -> None:
    asked: list[bool] = []

    def in_the_second_window() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    settings = dict(num_frames=48, steps=2, guidance_scale=1, speed=Speed(solver=solver))
    clip, memory = pipe.sample_clip(small, track, should_stop=in_the_second_window, **settings)
    assert clip.num_frames == 16 and clip.stopped and memory.windows == 1 and len(asked) == 4
    rest, _ = pipe.sample_clip(small, track, None, memory, start=16, **(settings | ONE))
    whole, _ = pipe.sample_clip(small, track, **(settings | dict(num_frames=32)))
    assert torch.equal(torch.cat([clip.latents, rest.latents], dim=1), whole.latents)


# --- Guidance in an interval ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [
        ((0.3, 0.8), [1, 2, 2, 1]),
        pytest.param((0.0, 1.0), [2, 2, 2, 2], marks=pytest.mark.slow),
        pytest.param((0.5, 1.0), [2, 2, 1, 1], marks=pytest.mark.slow),
        pytest.param((0.0, 0.2), [1, 1, 1, 2], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_outside_of_the_interval_one_row_is_computed(
    pipe: MemoPipeline, sample: Sample, interval: tuple[float, float], wanted: list[int]
) -> None:
    speed = Speed(guidance=interval)
    assert [1 + (interval[0] <= sigma <= interval[1]) for sigma in FOUR] == wanted
    assert rows(pipe.nets.diffusion_net, lambda: sample(steps=4, speed=speed)) == wanted
    assert rows(pipe.nets.diffusion_net, lambda: sample(steps=2, speed=speed, guidance_scale=1)) == [1, 1]


def test_an_interval_that_covers_all_is_full_guidance(sample: Sample) -> None:
    full = sample(steps=2)
    assert torch.equal(sample(steps=2, speed=Speed(guidance=(0.0005, 1.0))), full)
    assert not torch.equal(sample(steps=2, speed=Speed(guidance=(0.5, 1.0))), full)


def test_an_interval_that_covers_nothing_is_no_guidance(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack
) -> None:
    """The row that is left is the conditional one."""

    def sample(**settings) -> Tensor:
        return pipe.sample_clip(reference, track, steps=1, face_token_rows="grouped", **ONE, **settings)[0].latents

    alone = sample(guidance_scale=1)
    assert relative_l2(sample(speed=Speed(guidance=(0.5, 0.5))), alone) < 1e-5
    assert relative_l2(sample(), alone) > 1e-3


# --- Sums in 8 bits ---------------------------------------------------------------------------------------------------


def test_sums_in_8_bits_change_the_latents_a_little(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack
) -> None:
    def sample(fp8_sums: bool) -> Tensor:
        settings = dict(steps=1, guidance_scale=1, speed=Speed(fp8_sums=fp8_sums))
        return pipe.sample_clip(reference, track, **ONE, **settings)[0].latents

    assert 1e-6 < relative_l2(sample(True), sample(False)) < 1e-2


# --- Together ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_presets_stay_near_to_exact(pipe: MemoPipeline, reference: Reference, track: AudioTrack) -> None:
    def sample(speed: str) -> Tensor:
        return pipe.sample_clip(reference, track, steps=6, guidance_scale=2, speed=speed, **ONE)[0].latents

    exact = sample("exact")
    assert 1e-5 < relative_l2(sample("balanced"), exact) < 0.1
    assert 1e-5 < relative_l2(sample("draft"), exact) < 0.2


@pytest.mark.parametrize("name", thinned(["balanced", "draft"], fast=["draft"]))
def test_presets_hand_the_memory_on(pipe: MemoPipeline, small: Reference, track: AudioTrack, name: str) -> None:
    settings = dict(steps=2, guidance_scale=1, speed=name)
    whole, _ = pipe.sample_clip(small, track, num_frames=32, **settings)
    first, memory = pipe.sample_clip(small, track, **ONE, **settings)
    second, memory = pipe.sample_clip(small, track, None, memory, start=16, **ONE, **settings)
    assert torch.equal(torch.cat([first.latents, second.latents], dim=1), whole.latents) and memory.windows == 2
