"""The toon bench: variants differ in what they say they differ in, and the bench trains, measures and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import toon as bench
from benchmarks.toon_variants import VARIANTS
from memo_core.checkpoint.layout import find
from training.shards import ShardWriter
from training.toon import heads, sizes

BY_NAME = {variant.name: variant for variant in VARIANTS}


def test_each_variant_names_what_it_is_compared_with() -> None:
    for variant in VARIANTS[1:]:
        assert variant.against in BY_NAME
        other = BY_NAME[variant.against]
        differing = [
            name
            for name, mine, theirs in (
                ("layers", variant.layers, other.layers),
                ("past", variant.past_windows, other.past_windows),
                ("emotion", variant.emotion, other.emotion),
            )
            if mine != theirs and not (variant.weights and name == "past")
        ]
        assert len(differing) == 1, variant.name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "clips") as writer:
        for number in range(4):
            tensors = {
                "latents": torch.randn(32, 4, 16, 16).half(),
                "speech": torch.randn(32, sizes.SPEECH_LAYERS, sizes.SPEECH_DIM).half(),
                "emotion": torch.full((32,), number, dtype=torch.uint8),
            }
            writer.add(f"clip{number}", tensors)
    return tmp_path / "clips"


def test_the_bench_trains_measures_and_reports(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RESULT", tmp_path / "toon.json")
    monkeypatch.setattr(bench, "VARIANTS", (BY_NAME["memo"], BY_NAME["none"]))
    arguments = ["--start", str(find("toon")), "--data", str(data), "--folder", str(tmp_path / "bench")]
    arguments += ["--steps", "1", "--last-steps", "1", "--seconds", "2", "--seeds", "1"]
    arguments += ["--sampling-steps", "1", "--guidance", "1"]
    bench.main(arguments)
    printed = capsys.readouterr().out
    assert "| MEMO: memory of all past" in printed and "| none less memo |" in printed
    rows = json.loads((tmp_path / "toon.json").read_text())["measured"]
    assert set(rows["memo"][0]) >= set(bench.MEASURES) and rows["none"][0]["heard"] == 0
    assert rows["memo"][0]["made with"]["guidance"] == 1 and (tmp_path / "toon.png").is_file()
    before = (tmp_path / "bench" / "measured" / "memo-0.json").stat().st_mtime_ns
    bench.main(arguments)
    assert (tmp_path / "bench" / "measured" / "memo-0.json").stat().st_mtime_ns == before, "what is done stays"
    bench.main([*arguments[:-1], "1.5", "--measure", "--only", "memo"])
    assert json.loads((tmp_path / "bench" / "measured" / "memo-0.json").read_text())["made with"]["guidance"] == 1.5


def test_the_truth_measures_well() -> None:
    """True renders, read by the judge, show what the measures allow at best."""
    from training.toon.judge import Judge

    case = bench.draw_case(0, 8.0)
    frames = heads.render(case.identity, case.motion)
    figures = bench.measure(frames, case.emotions, case, Judge.load())
    assert figures["mouth"] > 0.95 and figures["lag"] == 0 and figures["heard"] == 1
    assert figures["emotion"] >= 0.75 and figures["seam"] < 1.3
