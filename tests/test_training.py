"""Training: the flow and its filter, memory as inference builds it, windows in order, stages that stop and go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import relative_l2
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from memo_core import MemoPipeline, MemoryState, Reference, checkpoint
from memo_core.audio import NEIGHBOURS
from memo_core.job import Settings
from memo_core.memory import SumsCache
from memo_core.nets.emotion2vec import Emotion2Vec
from memo_core.nets.emotion_head import EmotionHead
from memo_core.sampling import Conditions, Sampler, sample_window
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
    emotions = Emotion2Vec.from_config(presets.EMOTION)
    emotions.save_pretrained(tmp_path / "checkpoint" / "emotion2vec")
    head = EmotionHead(feature_dim=emotions.feature_dim, hidden_dim=8)
    head.save_pretrained(tmp_path / "checkpoint" / checkpoint.EMOTION_HEAD)
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
    exempt = torch.tensor([False, True, False])
    assert float(losses.robust_flow_loss(predicted, velocity, sigma, weight, 0.3, exempt)[1]) == 1
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
    assert (batch.audio[:, :, NEIGHBOURS, 0, 0] == now).all(), "the middle of the audio context is the frame's own"
    assert len(set(now[:, 0].tolist())) > 1


def test_memory_in_training_is_the_memory_of_sampling(narrow: None) -> None:
    torch.manual_seed(0)
    nets = stages.Nets().eval()
    nets.device = torch.device("cpu")
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


def test_a_videos_first_window_remembers_one_window(narrow: None) -> None:
    torch.manual_seed(0)
    nets = stages.Nets().eval()
    past = torch.randn(2, 48, 4, SIZE, SIZE)
    tokens = nets.image_proj(torch.zeros(1, presets.FACE_EMBEDDING))
    with torch.no_grad():
        first = stages.memory_of(nets, past, tokens, begins=torch.tensor([True, False]))
        last, whole = (stages.memory_of(nets, past[row : row + 1, begin:], tokens) for row, begin in ((0, 32), (1, 0)))
    for got, one, all_of_it in zip(first, last, whole):
        assert relative_l2(got[0][:1], one[0]) < 1e-5 and relative_l2(got[0][1:], all_of_it[0]) < 1e-5


def test_rows_keep_their_conditions_when_some_lose_theirs() -> None:
    """With half of the references dropped, every row still has its own voice, emotion and portrait."""
    rows, seen = 8, {}
    code = torch.arange(rows, dtype=torch.float32)

    def network(noisy: torch.Tensor, timestep: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.update(given, timestep=timestep, noisy=noisy)
        return noisy

    nets: Any = SimpleNamespace(
        image_proj=lambda embedding: torch.zeros(1, 1, 1),
        audio_proj=lambda audio: audio.mean(dim=(2, 3, 4))[..., None, None],
        reference_net=lambda latents, tokens: [latents.mean(dim=(1, 2, 3))],
        diffusion_net=_Callable(network),
    )

    def spread(*shape: int) -> torch.Tensor:
        return code.view(-1, *[1] * len(shape)).expand(rows, *shape).clone()

    batch = data.Batch(
        latents=spread(4, 16, 2, 2),
        portrait=spread(4, 2, 2),
        focus=torch.zeros(rows, 2, 2),
        past=spread(16, 4, 2, 2),
        audio=spread(16, 5, 3, 8),
        emotion=torch.arange(rows),
    )
    config = replace(
        presets.TOON_STAGES[1], drop_reference=0.5, drop_emotion=0.0, drop_audio=0.0, drop_all=0.0, drop_past=0.0
    )
    stages.flow_loss(nets, batch, config, float("inf"), torch.Generator().manual_seed(1))
    order, unconditional = seen["emotion"], seen["unconditional"]
    assert 0 < unconditional < rows and sorted(order.tolist()) == list(range(rows)) != order.tolist()
    assert seen["reference"][0].tolist() == order[unconditional:].tolist()
    assert (seen["audio_tokens"][:, 0, 0, 0] == order).all()
    sigma = seen["timestep"].view(rows, 16) / 1000
    assert (sigma == sigma[:, :1]).all() and 0 < sigma.min() and sigma.max() < 1


def test_what_is_learned_as_velocity_leads_back_when_sampled() -> None:
    clean, noise = torch.randn(2, 1, 4, 16, 4, 4)
    _, velocity = losses.noised(clean, noise, torch.tensor(1.0))
    nets: Any = SimpleNamespace(diffusion_net=_Callable(lambda *_, **__: velocity))
    conditions = Conditions(reference=[], memory=[], face_tokens=clean, audio_tokens=clean, emotion=clean)
    sampled = sample_window(nets, noise, conditions, Settings(steps=7, guidance_scale=1.0))
    torch.testing.assert_close(sampled, clean, atol=1e-5, rtol=1e-5)


class _Callable:
    """A network that a test writes as a function."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.conv_in = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward(*args, **kwargs)

    def memory_sums(self, *_: Any) -> Iterator[Any]:
        return iter(())


def test_every_stage_trains_what_it_should_and_becomes_a_checkpoint(folder: Path) -> None:
    groups = {
        name: {key for key, value in nets.named_parameters() if any(value is p for p in parameters)}
        for nets in [stages.Nets()]
        for name, parameters in nets.groups().items()
    }
    torch.manual_seed(0)
    start = stages.Nets()
    stages.initialise(start)
    previous, before = None, start.state_dict()
    for config in presets.TOON_STAGES:
        config = replace(config, steps=2, batch=2, warmup_steps=1, join_step=0)
        previous = stages.train(config, folder, previous)
        after = torch.load(previous, weights_only=True)
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        for name, keys in groups.items():
            assert bool(changed & keys) == (name in config.train), f"{config.name}: {name}"
        before = after
    assert list((folder / "samples").glob("stage3_*.png"))
    out = folder / "made"
    for _ in range(2):  # the second time it replaces what is there
        stages.assemble(folder, out)
    assert MemoPipeline.from_pretrained(out).default_size == (128, 128)
    assert '"stage2"' in (out / "training.json").read_text()
    assert {path.name for path in folder.iterdir() if path.name.startswith("made")} == {"made"}


@pytest.mark.parametrize("stage", presets.TOON_STAGES, ids=lambda stage: stage.name)
def test_a_stopped_stage_goes_on_as_if_it_had_not_been(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: presets.StageConfig
) -> None:
    config = replace(stage, steps=4, batch=2, warmup_steps=1)
    halved = folder.with_name(f"{folder.name}_halved")
    shutil.copytree(folder, halved)
    whole = torch.load(stages.train(config, folder, None), weights_only=True)

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

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
            stages.train(config, halved, None)
    resumed = torch.load(stages.train(config, halved, None), weights_only=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    with pytest.raises(ValueError, match="begun with other settings"):
        stages.train(replace(config, batch=3), halved, None)


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


def test_the_shipped_figures_are_this_checkpoints_and_above_the_floor() -> None:
    """The figures.json that `python -m training evaluate` wrote: it takes a quarter of an hour, so it is only read."""
    figures = json.loads((checkpoint.find("toon") / "evaluation.json").read_text())
    assert figures["checkpoint"] == checkpoint.load("toon").digest and figures["clips"] >= 20
    assert figures["mouth_correlation"] >= 0.35 and figures["mouth_lag"] <= 1 and figures["swapped_correlation"] < 0.2
    assert figures["likeness"] >= 0.65 and figures["emotion_read"] >= 0.35


def test_the_shipped_checkpoint_is_small_enough_to_ship() -> None:
    folder = checkpoint.find("toon")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * 2**20
