"""The toon checkpoint: its data, its jobs, and the figures that are said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from memo_core import MemoPipeline
from memo_core.checkpoint.layout import EMOTION_HEAD, find
from memo_core.checkpoint.load import load
from memo_core.checkpoint.save import save_module
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.encoders.speech import SpeechEncoder
from training import __main__ as command
from training.shards import Shards
from training.toon import data, evaluate, jobs, sizes, vae


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toon networks, a quarter as wide."""
    width = {"block_out_channels": [16, 16, 32]}
    nets = replace(sizes.NETS, reference_net=sizes.REFERENCE_NET | width, diffusion_net=sizes.DIFFUSION_NET | width)
    monkeypatch.setattr(sizes, "NETS", nets)
    monkeypatch.setitem(sizes.VAE, "block_out_channels", [8, 8, 8, 8])


@pytest.fixture
def folder(tmp_path: Path, narrow: None) -> Path:
    """What the first jobs would have made: a random VAE, speech and emotion encoder."""
    torch.manual_seed(0)
    made = tmp_path / "checkpoint"
    save_module(made / "vae", AutoencoderKL.from_config(sizes.VAE), sizes.VAE)
    SpeechEncoder.from_config(sizes.SPEECH).save_pretrained(made / "wav2vec2")
    emotions = Emotion2Vec.from_config(sizes.EMOTION)
    emotions.save_pretrained(made / "emotion2vec")
    EmotionHead(emotions.feature_dim, 8).save_pretrained(made / EMOTION_HEAD)
    return tmp_path


def test_jobs_make_a_checkpoint_and_go_on_where_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, preset in list(jobs.STAGES.items()):
        stage = preset()
        short = replace(
            stage,
            steps=1,
            data=replace(stage.data, past_windows=(1,)),
            optimizer=replace(stage.optimizer, batch=1),
            engine=replace(stage.engine, sample_every=9),
        )
        monkeypatch.setitem(jobs.STAGES, name, lambda short=short: short)
    with pytest.raises(FileNotFoundError, match="--stage stage1"):
        jobs.train_stage("stage2", folder)
    data.make(folder, clips=1, faces=2)
    data.make(folder, clips=2, faces=2)  # only the new clip is made
    assert len(Shards(folder / "data" / "clips")) == 2
    for name in jobs.STAGES:
        jobs.run_job(name, folder, folder / "made")
    for _ in range(2):  # the second time it replaces what is there
        jobs.run_job("assemble", folder, folder / "made")
    assert MemoPipeline.from_pretrained(folder / "made").default_size == (128, 128)
    assert json.loads((folder / "made" / "training.json").read_text())["jobs"]["stage2"]["steps"] == 1
    assert {path.name for path in folder.iterdir() if path.name.startswith("made")} == {"made"}


def test_a_clip_is_what_was_spoken_and_seen(folder: Path) -> None:
    vae_net, speech = data.encoders(folder / "checkpoint")
    sample = data.make_clip(vae_net, speech, np.random.default_rng(0))
    assert sample["latents"].shape == (64, 4, 16, 16) and sample["portrait"].shape == (4, 16, 16)
    assert sample["speech"].shape == (64, sizes.SPEECH_LAYERS, sizes.SPEECH_DIM)
    assert len(sample["emotion"].unique()) == 1 and 0 < float(sample["focus"].float().mean()) < 0.5


def test_samples_of_another_vae_do_not_mix(folder: Path) -> None:
    before = data.made_by(folder / "checkpoint")
    torch.manual_seed(1)
    save_module(folder / "checkpoint" / "vae", AutoencoderKL.from_config(sizes.VAE), sizes.VAE)
    after = data.made_by(folder / "checkpoint")
    assert before["vae"] != after["vae"] and before["speech"] == after["speech"]


def test_standard_latents_change_nothing_that_is_seen(narrow: None) -> None:
    torch.manual_seed(0)
    net = AutoencoderKL.from_config(sizes.VAE).eval().requires_grad_(False)
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    before = net.decode(net.encode(pictures).latent_dist.mean).sample
    vae.standardise(net, pictures)
    latents = net.encode(pictures).latent_dist.mean
    torch.testing.assert_close(net.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    scaled = latents * sizes.VAE["scaling_factor"]
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_the_shipped_checkpoint_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toon", "--measure", "toon", "--clips", "1", "--steps", "2", "--guidance", "1", "--out", str(tmp_path)]
    command.main(arguments)
    printed = capsys.readouterr().out
    assert all(text in printed for text in evaluate.MEASURES.values())
    assert (tmp_path / "figures.json").is_file() and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(("file", "clips", "seconds"), [("evaluation", 20, 4), ("evaluation_minute", 2, 60)])
def test_the_shipped_checkpoint_reached_its_goals(file: str, clips: int, seconds: int) -> None:
    """What `python -m training toon --measure toon` wrote; that takes a quarter of an hour, so it is only read."""
    figures = json.loads((find("toon") / f"{file}.json").read_text())
    assert figures["checkpoint"] == load("toon").digest
    assert figures["clips"] >= clips and figures["seconds"] == seconds and not evaluate.missed(figures)


def test_missed_goals_are_named() -> None:
    good = {
        "mouth_correlation": 0.9,
        "likeness": 0.83,
        "emotion_read": 1.0,
        "mouth_lag": 0.0,
        "swapped_correlation": 0.1,
    }
    assert evaluate.missed(good | {"seconds": 60}) == [] and evaluate.missed(good | {"seconds": 4}) == ["likeness"]
    assert evaluate.missed(good | {"seconds": 60, "mouth_lag": 1.0, "emotion_read": 0.5}) == [
        "emotion_read",
        "mouth_lag",
    ]


def test_the_shipped_checkpoint_is_small_enough_to_ship() -> None:
    folder = find("toon")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * 2**20
