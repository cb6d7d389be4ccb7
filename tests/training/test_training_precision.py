"""The loop under autocast on a CPU; tests/gpu/test_training.py is what takes a card."""

from __future__ import annotations

from pathlib import Path

from small_training import CALM, LEARNING, assert_learns_alike, in_half_precision, log_of, small_nets, write_clips

from training import engine


def test_in_bfloat16_it_learns_what_it_learns_in_float32(tmp_path: Path) -> None:
    """Also where activations are computed again."""
    data = write_clips(tmp_path / "data", CALM)
    engine.train(LEARNING, data, tmp_path / "float32", small_nets(), None)
    for again in (False, True):
        out = tmp_path / f"again-{again}"
        engine.train(in_half_precision(again), data, out, small_nets(), None)
        assert log_of(out) != log_of(tmp_path / "float32"), "it is another precision"
        assert_learns_alike(log_of(out), log_of(tmp_path / "float32"))
