"""The benches of the robust filter and of dropout: clips are spoilt as they say, figures are right, and they run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import dropping, robust, spoilt
from benchmarks.robust import BINS
from training import losses, presets
from training.shards import Shards, ShardWriter
from training.toon import sizes


def clip(number: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(number)
    return {
        "latents": torch.randn(32, 4, 16, 16).half(),
        "portrait": torch.randn(4, 16, 16).half(),
        "speech": torch.randn(32, sizes.SPEECH_LAYERS, sizes.SPEECH_DIM).half(),
        "emotion": torch.full((32,), number % 8, dtype=torch.uint8),
        "focus": torch.rand(16, 16).half(),
    }


def test_clips_are_spoilt_in_one_thing() -> None:
    good, other, rng = clip(0), clip(1), np.random.default_rng(0)
    changed = {"sound": {"speech", "emotion"}, "frozen": {"latents"}, "crop": {"latents"}}
    for kind in spoilt.KINDS:
        bad = spoilt.spoil(good, kind, other, rng)
        assert {name for name in good if not torch.equal(good[name], bad[name])} == changed[kind]
        assert all(bad[name].shape == good[name].shape for name in good)
    assert (spoilt.spoil(good, "frozen", other, rng)["latents"].diff(dim=0) == 0).all()
    moved = spoilt.spoil(good, "crop", other, rng)["latents"]
    inside = good["latents"][:, :, 4:-4, 4:-4]
    assert any(torch.equal(moved[:, :, 4 - y : 12 - y, 4 - x : 12 - x], inside) for x in (-4, 4) for y in (-4, 4))


def test_rates_are_counted_as_they_say() -> None:
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    rows = [("good", s, e) for s in middles for e in (1.0, 1.0, 1.0, 3.0)]
    rows += [(kind, s, 2.0 if kind == "crop" else 0.5) for kind in spoilt.KINDS for s in middles]
    figures = robust.rates(rows, lambda sigma, error: error > 1.5)
    assert figures["recall"] == pytest.approx(1 / 3) and figures["false"] == pytest.approx(1 / 4)
    assert figures["precision"] == pytest.approx(0.05 / 3 / (0.05 / 3 + 0.95 / 4))
    assert figures["recall_of"] == pytest.approx({"sound": 0, "frozen": 0, "crop": 1})
    best = robust.forms(rows, robust.shown([row for row in rows if row[2] == 1.0]))["loss, best"]
    assert 1 < best["limit"] < 3 and best["false"] <= 0.25


def test_shares_are_those_of_the_noise_levels_that_the_preset_draws() -> None:
    loss = presets.memo_stage2().loss
    drawn = losses.draw_sigma(4096, loss, torch.Generator().manual_seed(1))
    shares = robust.bin_shares()
    assert sum(shares) == pytest.approx(1)
    for quarter in range(4):
        share = ((drawn >= quarter / 4) & (drawn <= (quarter + 1) / 4)).float().mean()
        assert sum(shares[quarter * BINS // 4 :][: BINS // 4]) == pytest.approx(float(share), abs=0.03)


@pytest.mark.slow
def test_both_train_measure_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, held_out = 20, 2
    with ShardWriter(tmp_path / "clips") as writer:
        for number in range(clips + held_out):
            writer.add(f"clip{number}", clip(number))
    for module in (spoilt, robust, dropping):
        monkeypatch.setattr(module, "CLIPS", clips)
        monkeypatch.setattr(module, "HELD_OUT", held_out)
    monkeypatch.setattr(robust, "GOOD", 2)
    monkeypatch.setattr(robust, "SPOILT", 1)
    monkeypatch.setattr(robust, "SEEN", 2)
    monkeypatch.setattr(dropping, "SIGMAS", (0.5,))
    monkeypatch.setattr(dropping, "WINDOWS", 2)
    monkeypatch.setattr(robust, "draw", lambda folder: Shards(folder))
    monkeypatch.setattr(dropping, "draw", lambda folder: Shards(folder))
    for module in (robust, dropping):
        arguments = ["--clips", str(tmp_path / "clips"), "--folder", str(tmp_path / module.__name__), "--seeds", "0"]
        arguments += ["--steps", "1", "--result", str(tmp_path / "result.json")]
        module.main(arguments)
        first = json.loads((tmp_path / "result.json").read_text())
        with monkeypatch.context() as patch:
            patch.setattr(module.engine, "train", None)  # nothing is trained again
            module.main(arguments)
        assert json.loads((tmp_path / "result.json").read_text()) == first
        assert "| --- |" in capsys.readouterr().out
