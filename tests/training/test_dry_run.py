"""A dry run says what a run takes and sees, shows it, and begins none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_training as runs
import torch
from PIL import Image
from small_training import SIZE, TINY, small_nets, write_clips

from training import __main__ as command
from training import batches, budget, disk, dry_run, export, presets
from training.nets import Nets, link_encoders

data, encoders = runs.data, runs.encoders


@pytest.fixture(scope="module")
def start(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    small_nets().save(folder)
    link_encoders(encoders, folder)
    return folder


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, str]:
    """What is printed, line by line, by its first word."""
    command.main(["train", *arguments, "--dry-run"])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_it_says_what_a_run_takes_before_any_weights_are_read(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Nets, "from_pretrained", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "run"
    arguments = ["toon_stage2", "--data", str(data), "--out", str(out), "--start", str(start)]
    said = told(capsys, [*arguments, "--processes", "3", "--set", "optimizer.accumulate=2"])
    stage = presets.toon_stage2()
    stage = replace(stage, optimizer=replace(stage.optimizer, accumulate=2))
    cost = budget.count(stage, export.read_sizes(start), 8 * SIZE)
    assert (
        f"{cost.total_of_many / budget.GIB:.1f} GiB of each device; there is no CUDA card here; it fits H100"
        in said["memory"]
    )
    assert disk.gigabytes(disk.most(cost.checkpoint, stage)) in said["disk"] and said["disk"].endswith(
        f"are free for {out}"
    )
    hours = said["hours of each device"]
    assert f"H200 {cost.hours(989e12):,.1f}" in hours and "30% of its speed, which is assumed" in hours
    assert said["data"] == f"8 clips, {8 * 64 / 30 / 3600:.3g} h, 512 frames"
    assert said["batch"].startswith(
        "3 x 4 x 2 (processes, batch, accumulate) = 24 samples a step, 57,600 in all, 7,200.0"
    )
    assert [path.name for path in out.iterdir()] == ["dry-run.png"], "and nothing of a run"


def test_hours_are_counted_at_the_rate_of_the_clips(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is what the run's checkpoints will have."""
    write_clips(tmp_path / "shards", encoded_fps=25.0)
    paths = ["--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), "--start", str(start)]
    said = told(capsys, ["toon_stage2", *paths])
    assert said["data"].startswith(f"8 clips, {8 * 64 / 25 / 3600:.3g} h")
    assert f"they show {2400 * 4 * 16 / 25 / 3600:,.1f} h" in said["batch"]


def test_the_picture_shows_the_first_batch(
    data: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["toon_stage2", "--data", str(data), "--out", str(tmp_path), "--start", str(start)]
    said = told(capsys, [*arguments, "--set", "optimizer.batch=3"])
    assert str(tmp_path / "dry-run.png") in said["picture"]
    with Image.open(tmp_path / "dry-run.png") as picture:
        assert picture.size == ((1 + 1 + dry_run.FRAMES) * 8 * SIZE, 3 * 8 * SIZE)
        corner = picture.crop((0, 0, 8 * SIZE, 8 * SIZE)).copy()
    stage = presets.toon_stage2()
    first = batches.TrainingSet(data, replace(stage, optimizer=replace(stage.optimizer, batch=3)), 3)[0]
    dry_run.draw(replace(first, latents=first.portrait[:, :, None], past=None), start, tmp_path / "portrait.png")
    with Image.open(tmp_path / "portrait.png") as portrait:
        assert portrait.crop((0, 0, 8 * SIZE, 8 * SIZE)).tobytes() == corner.tobytes()


def test_a_run_too_short_for_its_data_is_told_how_many_samples_it_would_take(data: Path) -> None:
    samples = batches.TrainingSet(data, replace(TINY, steps=2))
    advice = re.search(r"optimizer.accumulate=(\d+), or more", dry_run._batch(replace(TINY, steps=2), samples, 1, 30))
    assert advice is not None
    enough = int(advice[1])
    for accumulate, shown in ((enough - 1, False), (enough, True)):
        stage = replace(TINY, steps=2, optimizer=replace(TINY.optimizer, accumulate=accumulate))
        assert ("would show all of it" not in dry_run._batch(stage, samples, 1, 30)) == shown


def test_the_card_at_hand_is_measured_against(monkeypatch: pytest.MonkeyPatch) -> None:
    cost: Any = SimpleNamespace(total=10**10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for memory, fits in ((cost.total, "which fits"), (cost.total - 1, "which does not fit")):
        card = SimpleNamespace(name="Some card", total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert f"Some card has {memory / budget.GIB:.1f} GiB, {fits}" in dry_run._memory(cost, 1)


def test_without_a_vae_there_is_no_picture(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_nets().save(tmp_path / "start")
    arguments = ["toon_stage1", "--data", str(data), "--out", str(tmp_path / "run"), "--start", str(tmp_path / "start")]
    assert told(capsys, arguments)["picture"] == "none without a VAE; give --encoders"
    assert not (tmp_path / "run").exists()
