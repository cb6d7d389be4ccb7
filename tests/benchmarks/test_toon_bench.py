"""The toon bench: variants differ in what they say they differ in, and the bench trains, measures and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from common import relative_l2

from benchmarks import toon as bench
from benchmarks.toon_variants import VARIANTS, cross_attend, remember
from memo_core.checkpoint.layout import find
from memo_core.nets.memory_module import MemoryAttention
from training.shards import ShardWriter
from training.toon import heads, sizes

BY_NAME = {variant.name: variant for variant in VARIANTS}


def attention(change=None) -> MemoryAttention:
    torch.manual_seed(0)
    module = MemoryAttention(8, 2)
    if change is not None:
        change(torch.nn.ModuleList([module]))
    return module.requires_grad_(False)


def test_last_frames_are_all_that_is_remembered() -> None:
    past, window = torch.randn(16, 3, 8), torch.randn(16, 3, 8)
    two, whole = attention(remember(2)), attention()
    changed = past.clone()
    changed[:14] = torch.randn(14, 3, 8)
    answers = [module(window, module.sums(p, 16), 16) for module in (two, whole) for p in (past, changed)]
    torch.testing.assert_close(answers[0], answers[1])
    assert relative_l2(answers[3], answers[2]) > 1e-3
    torch.testing.assert_close(whole.sums(past[14:], 2)[0], two.sums(past, 16)[0])


def test_self_attention_sees_the_past_where_there_is_one() -> None:
    module = attention(BY_NAME["self-16"].change)
    past, window = torch.randn(16, 3, 8), torch.randn(16, 3, 8)
    keys, there = module.sums(past, 16)
    alone, seen, dropped = (module(window, memory, 16) for memory in (None, (keys, there), (keys * 0, there * 0)))
    assert relative_l2(seen, alone) > 1e-3
    torch.testing.assert_close(dropped, alone)


def test_cross_attention_leaves_the_sound_as_it_is() -> None:
    from memo_core.nets.multimodal import AudioModule

    torch.manual_seed(0)
    module = AudioModule(16, 16, 8, 2, 4)
    cross_attend(module)
    frames, audio = torch.randn(2, 16, 3, 3), torch.randn(2, 4, 8)
    with torch.no_grad():
        feeling = module.feel(torch.tensor([1]), frames.dtype)
        x, out = module(frames, audio, feeling)
        other, _ = module(frames, audio + 1.5 * torch.randn(2, 4, 8), feeling)
    torch.testing.assert_close(out, audio)
    assert relative_l2(other, x) > 1e-4


def test_each_variant_names_what_it_is_compared_with() -> None:
    for variant in VARIANTS[1:]:
        assert variant.against in BY_NAME
        other = BY_NAME[variant.against]
        differing = [
            name
            for name, mine, theirs in (
                ("layers", variant.change, other.change),
                ("past", variant.past_windows, other.past_windows),
                ("emotion", variant.emotion, other.emotion),
            )
            if mine is not theirs and mine != theirs and not (variant.weights and name == "past")
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
