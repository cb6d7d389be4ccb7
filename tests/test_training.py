"""Training: the flow and its filter, memory as inference builds it, windows in order, stages that stop and go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_l2
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from memo_core import MemoryState, Reference, checkpoint
from memo_core.memory import SumsCache
from memo_core.sampling import Sampler, Settings
from training import __main__ as command
from training import data, evaluate, losses, presets, run, stages, vae

SIZE = 8  # latents: 64 x 64 pixels
CHANNELS = presets.SPEECH_LAYERS, presets.SPEECH_DIM


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toon networks, a quarter as wide."""
    for config in (presets.REFERENCE_NET, presets.DIFFUSION_NET):
        monkeypatch.setitem(config, "block_out_channels", [16, 16, 32])
    monkeypatch.setitem(presets.VAE, "block_out_channels", [8, 8, 8, 8])


@pytest.fixture
def folder(tmp_path: Path, narrow: None) -> Path:
    """A training folder with random data, a random VAE and speech encoder."""
    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    save_file(
        {
            "latents": torch.randn(6, 64, 4, SIZE, SIZE).half(),
            "portrait": torch.randn(6, 4, SIZE, SIZE).half(),
            "speech": torch.randn(6, 64, *CHANNELS).half(),
            "emotion": torch.arange(6),
            "focus": torch.rand(6, SIZE, SIZE).half(),
        },
        tmp_path / "data" / "clips_000.safetensors",
    )
    save_file(
        {"latents": torch.randn(6, 8, 4, SIZE, SIZE).half(), "portrait": torch.randn(6, 4, SIZE, SIZE).half()},
        tmp_path / "data" / "faces_000.safetensors",
    )
    checkpoint.save_module(tmp_path / "checkpoint" / "vae", AutoencoderKL.from_config(presets.VAE), presets.VAE)
    data.SpeechEncoder.from_config(presets.SPEECH).save_pretrained(tmp_path / "checkpoint" / "wav2vec2")
    return tmp_path


def test_path_from_face_to_noise_is_straight() -> None:
    clean, noise = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    at = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1, 1)
    noisy, velocity = losses.noised(clean, noise, at)
    torch.testing.assert_close(noisy - at * velocity, clean)
    torch.testing.assert_close(noisy + (1 - at) * velocity, noise)


def test_a_sample_that_is_far_off_does_not_teach() -> None:
    velocity, sigma = torch.zeros(3, 4, 2, 4, 4), torch.full((3, 1, 1, 1, 1), 0.5)
    predicted = torch.full_like(velocity, 0.1)
    predicted[1] = 5.0
    weight = torch.ones(())
    loss, kept = losses.robust_flow_loss(predicted, velocity, sigma, weight, threshold=0.3)
    assert float(kept) == pytest.approx(2 / 3) and float(loss) == pytest.approx(0.01)
    loss, kept = losses.robust_flow_loss(predicted, velocity, sigma, weight, threshold=float("inf"))
    assert float(kept) == 1 and float(loss) > 8


def test_past_windows_end_where_the_present_begins() -> None:
    frames = torch.arange(64.0).view(1, 64, 1, 1, 1).expand(1, 64, 4, 2, 2)
    clips = {
        "latents": frames,
        "portrait": torch.zeros(1, 4, 2, 2),
        "speech": torch.arange(64.0).view(1, 64, 1, 1),
        "emotion": torch.tensor([3]),
        "focus": torch.zeros(1, 2, 2),
    }
    batch = data.draw_windows(clips, 5, 16, 2, torch.Generator().manual_seed(0))
    now, past = batch.latents[:, 0, :, 0, 0], batch.past[:, :, 0, 0, 0]
    assert now.shape == (5, 16) and past.shape == (5, 32)
    assert (past[:, -1] == now[:, 0] - 1).all() and (past.diff() == 1).all() and (now.diff() == 1).all()
    assert (batch.audio[:, :, data.CONTEXT, 0, 0] == now).all(), "the middle of the audio context is the frame's own"
    assert len(set(now[:, 0].tolist())) > 1


def test_memory_in_training_is_the_memory_of_sampling(narrow: None) -> None:
    torch.manual_seed(0)
    nets = stages.Nets().eval()
    past = torch.randn(1, 48, 4, SIZE, SIZE)
    tokens = nets.image_proj(torch.zeros(1, presets.FACE_EMBEDDING))
    with torch.no_grad():
        trained = stages.memory_of(nets, past, tokens)
        state = MemoryState.empty()
        for window in past[0].split(16):
            state = state.push(window, torch.zeros(1, presets.FACE_EMBEDDING), "model", "reference")
        ref = Reference(torch.zeros(3, 64, 64), past[:, 0], torch.zeros(1, presets.FACE_EMBEDDING))
        sampler = Sampler(nets, ref, Settings(guidance_scale=1.0), SumsCache())
        sampled = sampler.cache.sums(state, "", sampler.entry_sums)
    assert len(trained) == len(sampled) > 0
    for mine, theirs in zip(trained, sampled):
        assert relative_l2(mine[0], theirs[0]) < 1e-5 and relative_l2(mine[1], theirs[1]) < 1e-5


def test_every_stage_trains_what_it_should_and_becomes_a_checkpoint(folder: Path) -> None:
    previous, before = None, None
    for config in presets.TOON_STAGES:
        config = replace(config, steps=2, batch=2, warmup_steps=1, join_step=0)
        previous = stages.train(config, folder, previous)
        after = torch.load(previous, weights_only=True)
        if before is not None:
            parts = stages.Nets().groups()
            names = {id(p): name for name, p in stages.Nets().named_parameters()}
            assert names and parts
            changed = {key for key in after if not torch.equal(before[key], after[key])}
            assert any(".audio_modules." in key for key in changed) and any(
                ".motion_modules." in key for key in changed
            )
            moved_reference = any(key.startswith("reference_net.") for key in changed)
            assert moved_reference == ("reference" in config.train)
        before = after
    assert list((folder / "samples").glob("stage3_*.png"))
    stages.assemble(folder, folder / "out")
    for name in ("reference_net", "diffusion_net", "image_proj", "audio_proj", "vae", "wav2vec2"):
        assert (folder / "out" / name).is_dir()
    assert '"stage2"' in (folder / "out" / "training.json").read_text()


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(presets.TOON_STAGES[0], steps=4, batch=2, warmup_steps=1)
    whole = torch.load(stages.train(config, folder, None), weights_only=True)

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    halves = replace(config, name="halves")
    with monkeypatch.context() as patch:
        steps = run.Job.steps

        def two_steps(job: run.Job):
            for step in steps(job):
                if step == 2:
                    job.save()
                    stop()
                yield step

        patch.setattr(run.Job, "steps", two_steps)
        with pytest.raises(Stopped):
            stages.train(halves, folder, None)
    resumed = torch.load(stages.train(halves, folder, None), weights_only=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_standard_latents_change_nothing_that_is_seen(narrow: None) -> None:
    torch.manual_seed(0)
    net = AutoencoderKL.from_config(presets.VAE).eval().requires_grad_(False)
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    before = net.decode(net.encode(pictures).latent_dist.mean).sample
    vae.standardise(net, pictures)
    latents = net.encode(pictures).latent_dist.mean
    torch.testing.assert_close(net.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    scaled = latents * presets.VAE["scaling_factor"]
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_missing_data_names_the_job_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--stage data"):
        data.read(tmp_path, "clips")


def test_the_shipped_checkpoint_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["evaluate", "toon", "--clips", "1", "--steps", "2", "--guidance", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(text in printed for text, _ in evaluate.GOALS.values())
    assert (tmp_path / "figures.json").is_file() and (tmp_path / "sheet.png").is_file()


def test_the_shipped_checkpoint_is_small_enough_to_ship() -> None:
    folder = checkpoint.find("toon")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * 2**20
