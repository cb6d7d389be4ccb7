"""On a GPU: the training loop under autocast, with activations computed again, 8-bit moments, and NCCL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    CALM,
    LEARNING,
    assert_learns_alike,
    in_half_precision,
    launch,
    log_of,
    small_nets,
    write_clips,
)

from training import engine

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data"), CALM)


@pytest.fixture(scope="module")
def exact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What a CPU logs in float32."""
    out = tmp_path_factory.mktemp("exact")
    launch(LEARNING, data, out, 1)
    return log_of(out)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_autocast_learns_what_the_cpu_learns_in_float32(
    data: Path, exact: list[dict[str, float]], tmp_path: Path, again: bool
) -> None:
    torch.cuda.reset_peak_memory_stats()
    last = engine.train(in_half_precision(again), data, tmp_path, small_nets(), None)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB, {log_of(tmp_path)[-1]['seconds']} s")
    assert_learns_alike(log_of(tmp_path), exact, rel=0.03)
    assert all(torch.isfinite(value).all() for value in load_file(last / "state" / "model.safetensors").values())


def test_what_is_computed_again_takes_less_memory(data: Path, tmp_path: Path) -> None:
    peaks = []
    for again in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        engine.train(replace(in_half_precision(again), steps=2), data, tmp_path / str(again), small_nets(), None)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_eight_bit_moments_learn_what_others_learn(data: Path, exact: list[dict[str, float]], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    stage = in_half_precision()
    engine.train(replace(stage, optimizer=replace(stage.optimizer, bits=8)), data, tmp_path / "out", small_nets(), None)
    assert_learns_alike(log_of(tmp_path / "out"), exact, rel=0.1)
    # And they go on from what was saved.
    more = replace(stage, steps=stage.steps + 2, optimizer=replace(stage.optimizer, bits=8))
    engine.train(more, data, tmp_path / "out", small_nets(), None)
    assert len(log_of(tmp_path / "out")) == stage.steps + 2


@pytest.mark.parametrize("cards", [1, 2])
def test_cards_joined_by_nccl_learn_what_one_process_learns(
    data: Path, exact: list[dict[str, float]], tmp_path: Path, cards: int
) -> None:
    if torch.cuda.device_count() < cards:
        pytest.skip(f"needs {cards} CUDA devices")
    stage = in_half_precision(again=True)
    batch = stage.optimizer.batch // cards
    launch(replace(stage, optimizer=replace(stage.optimizer, batch=batch)), data, tmp_path, cards, cpu=False)
    assert_learns_alike(log_of(tmp_path), exact, rel=0.03)
