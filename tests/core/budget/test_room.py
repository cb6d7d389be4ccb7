"""A size that cannot fit into memory is refused before anything is computed at it, and what fits is named."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import thinned

from memo_core import MemoPipeline
from memo_core.budget import counting
from memo_core.budget import plan as budget
from memo_core.budget.counting import GIB, _count, needs
from memo_core.budget.plan import check_room, choose_plan, plan_of
from memo_core.budget.report import released
from memo_core.checkpoint.load import load
from memo_core.checkpoint.networks import Networks
from memo_core.errors import SamplingError
from memo_core.sampling.settings import Settings

EXACT, ALONE = Settings(), Settings(guidance_scale=1.0)


@pytest.fixture(scope="module")
def on_cpu() -> Networks:
    """The released sizes, as if they were on the CPU in float32."""
    return replace(released(torch.float32), device=torch.device("cpu"))


def test_an_enormous_video_is_refused_before_the_portrait_is_encoded(
    pipe: MemoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: 16 * GIB)
    pipe.check_room()
    pipe.check_room((512, 768), steps=3, speed="balanced")
    started = time.process_time()
    with pytest.raises(SamplingError, match=r"65536x65536 pixels need at least \d+\.\d GB and 16\.0 GB .* fits: size"):
        pipe.check_room((65536, 65536))
    assert time.process_time() - started < 1  # what was counted is known


def test_counting_takes_little(memo_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: 16 * GIB)
    sizes, count = [], _count
    monkeypatch.setattr(counting, "_count", lambda nets, *size: sizes.append(size) or count(nets, *size))
    nets = load(memo_tiny)
    for size in ((4096, 4096), (65536, 64), (2048, 4096)):
        with pytest.raises(SamplingError):
            check_room(nets, *size, EXACT, room=GIB)
    side = 8 * nets.sample_size
    assert sizes == [(side, side, 2, (True, False))], "once, and never at the size that was asked for"


@pytest.mark.parametrize("settings", thinned([EXACT, ALONE], fast=[ALONE]), ids=["guided", "alone"])
@pytest.mark.parametrize("size", thinned([(256, 512), (768, 768)], fast=[(256, 512)]), ids=str)
def test_what_is_scaled_is_what_would_be_counted(on_cpu: Networks, size: tuple[int, int], settings: Settings) -> None:
    factor = size[0] * size[1] / 512**2
    scaled = plan_of(needs(on_cpu, 512, 512, settings).times(factor), streamed=True, reserve=0)
    counted = plan_of(needs(on_cpu, *size, settings), streamed=True, reserve=0)
    assert 0.9 < scaled.peak / counted.peak < 1.1
    if settings.guided:  # what a message says of guidance 1 without counting it
        alone = plan_of(needs(on_cpu, *size, ALONE), streamed=True, reserve=0).peak
        told = plan_of(needs(on_cpu, 512, 512, EXACT).unguided().times(factor), streamed=True, reserve=0).peak
        assert 0.95 < told / alone < 1.3


def test_the_size_that_is_named_fits_and_the_next_does_not(on_cpu: Networks) -> None:
    room = 24 * GIB
    with pytest.raises(SamplingError) as refused:
        check_room(on_cpu, 2048, 2048, EXACT, room)
    side, without = map(int, re.search(r"size (\d+) or size (\d+) with guidance 1", str(refused.value)).groups())
    assert without > side >= 512
    check_room(on_cpu, side, side, EXACT, room)
    check_room(on_cpu, without, without, ALONE, room)
    with pytest.raises(SamplingError):
        check_room(on_cpu, side + 128, side + 128, EXACT, room)


def test_a_card_is_asked_for_the_plan_that_takes_least(released_nets: Networks) -> None:
    nets = released_nets  # not on the CPU: as on a card
    room = 8 * GIB
    check_room(nets, 512, 512, EXACT, room)
    assert choose_plan(nets, 512, 512, EXACT, room).peak <= room
    with pytest.raises(SamplingError, match="1024x1024"):
        check_room(nets, 1024, 1024, EXACT, room)
    check_room(nets, 768, 768, EXACT, room, host_moves_weights=True)


def test_where_nobody_says_what_is_free_nothing_is_refused(pipe: MemoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: None)
    pipe.check_room((65536, 65536))
