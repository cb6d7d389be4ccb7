"""Training: the flow and its filter, memory as inference builds it, runs that stop and go on, checkpoints that load."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import ROOT, relative_l2
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from small_training import SIZE, TINY, launch, log_of, small_nets, stopped_at, write_clips

from memo_core import MemoPipeline, MemoryState, Reference, kernels
from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.checkpoint.save import save_module
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.encoders.speech import SpeechEncoder
from memo_core.errors import CheckpointError
from memo_core.memory.cache import MemoryCache
from memo_core.nets.conditions import Conditions
from memo_core.nets.config import NetConfig
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.layers import ResnetBlock
from memo_core.nets.memory_module import MemoryModule
from memo_core.nets.multimodal import AudioModule
from memo_core.nets.spatial import SpatialTransformer
from memo_core.sampling.conditions import Conditioner
from memo_core.sampling.settings import Settings
from memo_core.sampling.window import sample_window
from training import __main__ as command
from training import batches, config, engine, learning, losses, presets
from training.config import ConfigError, Drop, Loss
from training.nets import Nets, checkpoint_gradients, link_encoders
from training.objectives import flow
from training.shards import Shards, ShardWriter
from training.toon import sizes


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VAE, speech and emotion encoder in the released layout."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    vae = sizes.VAE | {"block_out_channels": [8, 8, 8, 8]}
    save_module(folder / "vae", AutoencoderKL.from_config(vae), vae)
    SpeechEncoder.from_config(sizes.SPEECH).save_pretrained(folder / "wav2vec2")
    emotions = Emotion2Vec.from_config(sizes.EMOTION)
    emotions.save_pretrained(folder / "emotion2vec")
    EmotionHead(emotions.feature_dim, 8).save_pretrained(folder / EMOTION_HEAD)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{net}.{key}": value
        for net in ("reference_net", "diffusion_net", "image_proj", "audio_proj")
        for key, value in load_file(folder / net / "diffusion_pytorch_model.safetensors").items()
    }


def assert_same_state(one: Path, other: Path) -> None:
    """Checkpoints of the same bits: averaged weights, raw weights, the optimiser's moments."""
    ours, theirs = weights_of(one), weights_of(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ("model.safetensors", "average.safetensors"):
        ours, theirs = load_file(one / "state" / name), load_file(other / "state" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    moments = [torch.load(path / "state" / "optimizer.bin", weights_only=True)["state"] for path in (one, other)]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_papers() -> None:
    one, two, three = presets.memo_stage1(), presets.memo_stage2(), presets.memo_stage3()
    assert [stage.steps for stage in (one, two, three)] == [15_000, 500_000, 100_000]
    assert one.data.single_frames and set(one.train) == {"reference", "spatial", "face"}
    assert (
        set(two.train) - set(two.join) == {"audio", "memory"}
        and set(two.train) == set(config.PARTS)
        and two.data.past_windows == (1,)
    )
    assert set(three.train) == {"audio", "memory"} and three.data.past_windows == (1, 2, 3)
    for stage in (two, three):
        assert stage.drop == Drop(emotion=0.3, reference=0.05, audio=0.05, past=0.05, all=0.05)
        assert stage.loss.robust_measure == "quantile" and stage.loss.weighting == "logit_normal"
        assert stage.optimizer.learning_rate == 1e-5
    assert all(config.check(preset()).name for preset in presets.PRESETS.values())


def test_settings_are_overridden_by_name_and_kept_as_they_were() -> None:
    changed = config.override(
        TINY, ["optimizer.learning_rate=2e-4", "data.past_windows=1,3", "data.single_frames=true", "steps=9"]
    )
    assert changed.optimizer.learning_rate == 2e-4 and changed.data.past_windows == (1, 3)
    assert changed.data.single_frames and changed.steps == 9 and TINY.steps == 6
    assert config.from_json(config.to_json(changed)) == changed
    assert config.from_json(config.to_json(TINY)).loss.robust_threshold == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.rate=1", "there is no setting 'optimizer.rate'; here there are learning_rate"),
        ("optimizer=1", "is a group of settings"),
        ("steps", "not of the form name=value"),
        ("steps=many", "steps: 'many' is not int"),
        ("steps.more=1", "nothing inside"),
        ("data.single_frames=maybe", "'maybe' is not bool"),
        ("loss.weighting=best", "'best' is none of 'logit_normal'"),
        ("train=audio,eyes", "'eyes' is none of 'reference'"),
        ("drop.audio=2", "between 0 and 1, got 2"),
        ("optimizer.batch=0", "at least 1, got 0"),
        ("data.past_windows=0", "numbers from 1 on"),
    ],
)
def test_impossible_settings_are_refused_with_what_is_possible(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.override(TINY, [change])


# --- Flow -------------------------------------------------------------------------------------------------------------


def test_path_from_face_to_noise_is_straight() -> None:
    clean, noise = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    at = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1, 1)
    noisy, velocity = losses.noised(clean, noise, at)
    torch.testing.assert_close(noisy - at * velocity, clean)
    torch.testing.assert_close(noisy + (1 - at) * velocity, noise)


@pytest.mark.parametrize("weighting", ["logit_normal", "mode", "cosmap", "sigma_sqrt", "uniform"])
def test_noise_levels_lie_between_clean_and_noise(weighting: str) -> None:
    sigma = losses.draw_sigma(2000, Loss(weighting=weighting), torch.Generator().manual_seed(0))
    assert sigma.min() >= 0 and sigma.max() <= 1 and sigma.std() > 0.1
    assert torch.isfinite(losses.sigma_weight(sigma.clamp(0.01, 0.99), Loss(weighting=weighting))).all()
    shifted = losses.draw_sigma(2000, Loss(logit_mean=1.0), torch.Generator().manual_seed(0))
    if weighting == "logit_normal":
        assert float(sigma.mean()) == pytest.approx(0.5, abs=0.02) and float(shifted.median()) > 0.7


def test_a_sample_that_is_far_off_does_not_teach() -> None:
    velocity, sigma = torch.zeros(3, 4, 2, 4, 4), torch.full((3, 1, 1, 1, 1), 0.5)
    predicted = torch.full_like(velocity, 0.1)
    predicted[1] = 5.0
    loss, error = losses.flow_errors(predicted, velocity, sigma, torch.ones(()), Loss(robust_measure="loss"))
    torch.testing.assert_close(loss, torch.tensor([0.01, 25.0, 0.01]))
    torch.testing.assert_close(error, loss)
    _, clean = losses.flow_errors(predicted, velocity, sigma, torch.ones(()), Loss(robust_measure="clean"))
    _, compared = losses.flow_errors(predicted, velocity, sigma, torch.ones(()), Loss(robust_measure="quantile"))
    assert torch.equal(compared, clean)
    torch.testing.assert_close(clean, loss / 4)
    no = torch.zeros(3, dtype=torch.bool)
    assert losses.kept_by_filter(loss, error, no, 0.1).tolist() == [True, False, True]
    assert losses.kept_by_filter(loss, error, torch.tensor([False, True, False]), 0.1).all(), (
        "nobody knows the faceless"
    )
    assert losses.kept_by_filter(loss, error, no, math.inf).all()
    one, nan = torch.ones(1), torch.tensor([math.nan])
    assert not losses.kept_by_filter(one, nan, torch.tensor([True]), math.inf).any()
    assert not losses.kept_by_filter(nan, one, torch.tensor([True]), math.inf).any()


def test_places_in_focus_count_more() -> None:
    velocity, focus = torch.zeros(1, 4, 2, 4, 4), torch.ones(1, 1, 1, 4, 4)
    focus[..., 0, 0] = 5.0
    predicted = torch.zeros_like(velocity)
    predicted[..., 0, 0] = 1.0
    loss, error = losses.flow_errors(predicted, velocity, torch.tensor(0.5), focus, Loss())
    assert float(loss) == pytest.approx(5 / 20) and float(error) == pytest.approx(1 / 16)


def test_what_is_learned_as_velocity_leads_back_when_sampled() -> None:
    clean, noise = torch.randn(2, 1, 4, 16, 4, 4)
    _, velocity = losses.noised(clean, noise, torch.tensor(1.0))
    nets: Any = SimpleNamespace(diffusion_net=_Callable(lambda *_, **__: velocity))
    conditions = Conditions(reference=[], face_tokens=clean, audio_tokens=clean, emotion=clean, frames=16)
    sampled = sample_window(nets, noise, conditions, [], Settings(steps=7, guidance_scale=1.0))
    torch.testing.assert_close(sampled, clean, atol=1e-5, rtol=1e-5)


class _Callable(torch.nn.Module):
    """A network that a test writes as a function."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.function = forward
        self.conv_in, self.config = SimpleNamespace(weight=torch.zeros(1)), NetConfig()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*args, **kwargs)

    def layers(self) -> Any:
        return iter(())

    predict = forward

    def time_shifts(self, *_: Any) -> list[torch.Tensor]:
        return []

    def prepare(self, _: Any) -> None:
        return None


def test_memory_in_training_is_the_memory_of_sampling() -> None:
    nets = small_nets().eval()
    nets.device = torch.device("cpu")
    past = torch.randn(1, 48, 4, SIZE, SIZE)
    tokens = nets.image_proj(torch.zeros(1, 512))
    with torch.no_grad():
        trained = flow.memory_of(nets, past, tokens)
        state = MemoryState.empty()
        for window in past[0].split(16):
            state = state.push(window, torch.zeros(1, 512), "model", "reference")
        ref = Reference(torch.zeros(3, 64, 64), past[:, 0], torch.zeros(1, 512))
        conditioner = Conditioner(nets, ref, Settings(guidance_scale=1.0), MemoryCache())
        sampled = conditioner.cache.memory_of(state, "", conditioner.past_of)
    assert len(trained) == len(sampled) > 0
    for mine, theirs in zip(trained, sampled):
        assert relative_l2(mine[0], theirs[0]) < 1e-5 and relative_l2(mine[1], theirs[1]) < 1e-5


def test_only_the_windows_that_were_are_remembered() -> None:
    nets = small_nets().eval()
    past = torch.randn(3, 48, 4, SIZE, SIZE)
    tokens = nets.image_proj(torch.zeros(1, 512)).expand(3, -1, -1)
    with torch.no_grad():
        memory = flow.memory_of(nets, past, tokens, torch.tensor([1, 3, 0]))
        last = flow.memory_of(nets, past[:1, 32:], tokens[:1])
        whole = flow.memory_of(nets, past[1:2], tokens[:1])
    for got, one, all_of_it in zip(memory, last, whole):
        assert relative_l2(got[0][:1], one[0]) < 1e-5 and relative_l2(got[0][1:2], all_of_it[0]) < 1e-5
        assert not got[0][2].any() and not got[1][2].any(), "a dropped past is no past"


def test_rows_keep_their_conditions_and_losses_when_some_lose_theirs() -> None:
    """With half of the references dropped, every row still has its own voice, emotion, portrait and loss."""
    rows, seen = 8, {}
    code = torch.arange(rows, dtype=torch.float32)

    def network(noisy: torch.Tensor, timestep: torch.Tensor, given: Conditions, memory: Any) -> torch.Tensor:
        seen.update(asdict(given), timestep=timestep, noisy=noisy)
        return noisy * 0

    nets: Any = torch.nn.Module()
    nets.image_proj = _Callable(lambda embedding: embedding[:, None])
    nets.audio_proj = _Callable(lambda audio: audio.mean(dim=(2, 3, 4))[..., None, None])
    nets.reference_net = _Callable(lambda latents, tokens: [latents.mean(dim=(1, 2, 3))])
    nets.diffusion_net = _Callable(network)

    def spread(*shape: int) -> torch.Tensor:
        return code.view(-1, *[1] * len(shape)).expand(rows, *shape).clone()

    gone = torch.tensor([False, True, False, True, True, False, True, False])
    batch = batches.Batch(
        keys=tuple(map(str, range(rows))),
        latents=spread(4, 16, 2, 2),
        portrait=spread(4, 2, 2),
        face_embedding=spread(1),
        focus=torch.zeros(rows, 2, 2),
        noise=torch.zeros(rows, 4, 16, 2, 2),
        sigma=(0.1 + code / 10)[:, None].expand(-1, 16),
        no_reference=gone,
        past=spread(16, 4, 2, 2),
        past_windows=torch.ones(rows),
        audio=spread(16, 5, 3, 8),
        no_audio=code == 2,
        emotion=torch.arange(rows),
    )
    loss, error = flow.FlowModel(nets, Loss())(batch)
    order = seen["emotion"]
    assert sorted(order.tolist()) == list(range(rows)) != order.tolist()
    assert gone[order[:4]].all() and not gone[order[4:]].any()
    assert seen["reference"][0].tolist() == order[4:].tolist()
    # Without a portrait there is no face embedding either, as in guidance's unconditional row.
    assert seen["face_tokens"].flatten().tolist() == [0] * 4 + order[4:].tolist()
    assert (seen["audio_tokens"][:, 0, 0, 0] == torch.where(order == 2, 0, order)).all()
    torch.testing.assert_close(seen["timestep"].view(rows, 16)[:, 0] / 1000, 0.1 + order / 10)
    torch.testing.assert_close(loss, code.square())  # nothing predicted where the velocity is -clean
    torch.testing.assert_close(error, code.square())


@pytest.mark.parametrize("function", [kernels.naive, kernels.fused], ids=["naive", "fused"])
def test_memory_attention_has_the_gradient_of_its_formula(function: Any) -> None:
    """Equations 2 to 4 against finite differences, for everything they are computed from."""
    torch.manual_seed(0)
    batch, frames, tokens, heads, dim = 1, 3, 2, 2, 3

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    query, key, value, past_key, past_value = (numbers(batch, frames, tokens, heads, dim) for _ in range(5))

    def attend(query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> torch.Tensor:
        return function.memory_attention(query, key, value, function.memory_sums(past_key, past_value))

    assert torch.autograd.gradcheck(attend, (query, key, value, past_key, past_value), eps=1e-6, atol=1e-6)


def test_gradients_are_the_same_when_activations_are_computed_again(data: Path) -> None:
    batch = batches.collate([batches.TrainingSet(data, TINY)[number] for number in range(2)])
    gradients = []
    for again in (False, True):
        nets = small_nets()
        if again:
            checkpoint_gradients(nets)
        flow.FlowModel(nets, Loss())(batch)[0].sum().backward()
        gradients.append({name: p.grad for name, p in nets.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_every_stage_trains_what_it_should_and_becomes_a_checkpoint(data: Path, encoders: Path, tmp_path: Path) -> None:
    nets = small_nets()
    parts = {
        name: {key for key, value in nets.named_parameters() if any(value is p for p in parameters)}
        for name, parameters in nets.parts().items()
    }
    assert sum(map(len, parts.values())) == len(list(nets.parameters())), "every parameter belongs to one part"
    for preset in (presets.toon_stage1, presets.toon_stage2, presets.toon_stage3):
        stage = replace(
            preset(), steps=2, join_step=0, engine=replace(TINY.engine, sample_every=2), optimizer=TINY.optimizer
        )
        before = {key: value.clone() for key, value in nets.state_dict().items()}
        last = engine.train(stage, data, tmp_path / stage.name, nets, encoders)
        after = weights_of(last)
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        for name, keys in parts.items():
            assert bool(changed & keys) == (name in stage.train), f"{stage.name}: {name}"
        assert (tmp_path / stage.name / "samples" / "0000002.png").is_file()
        nets = Nets.from_pretrained(last)
    assert MemoPipeline.from_pretrained(last).default_size == (128, 128)


def test_a_stage_that_warms_up_leaves_the_first_stages_modules_alone(data: Path, tmp_path: Path) -> None:
    stage = replace(TINY, steps=4, join=("reference", "spatial", "face"), join_step=2)
    nets = small_nets()
    before = {key: value.clone() for key, value in nets.state_dict().items()}
    engine.train(replace(stage, engine=replace(stage.engine, export_every=2, ema=0.0)), data, tmp_path, nets, None)
    for step, moved in ((2, False), (4, True)):
        after = weights_of(tmp_path / f"checkpoint-{step:07d}")
        key = "reference_net.conv_in.weight"
        assert torch.equal(before[key], after[key]) != moved
        memory = "diffusion_net.mid_block.motion_modules.0.temporal_transformer.proj_out.weight"
        assert not torch.equal(before[memory], after[memory])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path, accumulate: int) -> None:
    stage = replace(TINY, optimizer=replace(TINY.optimizer, accumulate=accumulate, batch=1))
    whole = engine.train(stage, data, tmp_path / "whole", small_nets(), None)
    with stopped_at(3):
        engine.train(stage, data, tmp_path / "halved", small_nets(), None)
    assert [path.name for path in engine.checkpoints(tmp_path / "halved")] == ["checkpoint-0000002"]
    resumed = engine.train(stage, data, tmp_path / "halved", small_nets(), None)
    assert_same_state(whole, resumed)
    assert len(engine.checkpoints(tmp_path / "halved")) == 2, "only the last ones are kept"
    assert [row["step"] for row in log_of(tmp_path / "halved")] == list(range(1, 7)), "no step is told twice"


def test_a_run_is_not_continued_under_other_settings_weights_or_data(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    engine.train(replace(TINY, steps=2), data, out, small_nets(), None)
    with pytest.raises(ConfigError, match="optimizer.learning_rate was 0.001, is 0.5"):
        changed = replace(TINY, optimizer=replace(TINY.optimizer, learning_rate=0.5))
        engine.train(changed, data, out, small_nets(), None)
    with pytest.raises(ConfigError, match="the start's weights was"):
        engine.train(TINY, data, out, small_nets(seed=1), None)
    shutil.copytree(data, tmp_path / "more")
    with ShardWriter(tmp_path / "more") as writer:
        shards = Shards(data)
        writer.add("another", {name: shards.read(0, name) for name in shards.names(0)})
    with pytest.raises(ConfigError, match="the data was"):
        engine.train(TINY, tmp_path / "more", out, small_nets(), None)
    with pytest.raises(ConfigError, match="samples per step was 2, is 3"):
        unequal = replace(TINY, optimizer=replace(TINY.optimizer, batch=3))
        engine.train(replace(unequal, optimizer=unequal.optimizer), data, out, small_nets(), None)
    engine.train(replace(TINY, steps=4), data, out, small_nets(), None)  # longer is no other run


@pytest.mark.parametrize("moment", ["saving", "stepping"])
def test_a_killed_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path, moment: str) -> None:
    """kill -9 while a checkpoint is half written, and between two steps."""
    whole = engine.train(TINY, data, tmp_path / "whole", small_nets(), None)
    script = (
        "import sys, time; root = sys.argv[1]\n"
        "sys.path[:0] = [root, root + '/tests', root + '/tests/training']; import test_training as t\n"
        "from training import engine, learning\n"
        "def wait(): print('now', flush=True); time.sleep(600)\n"
        "save, step = learning.Average.save, engine.Trainer._step\n"
        "def slow_save(self, path):\n"
        "    save(self, path)\n"
        "    if '0004' in str(path): wait()\n"
        "def slow_step(self, *rest):\n"
        "    if self.step == 3: wait()\n"
        "    return step(self, *rest)\n"
        "if sys.argv[4] == 'saving': learning.Average.save = slow_save\n"
        "else: engine.Trainer._step = slow_step\n"
        "t.engine.train(t.TINY, sys.argv[2], sys.argv[3], t.small_nets(), None)\n"
    )
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", script, str(ROOT), str(data), str(out), moment]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {"checkpoint-0000002", "checkpoint-0000004.tmp"} if moment == "saving" else {"checkpoint-0000002"}
    assert {path.name for path in out.glob("checkpoint-*")} == left
    assert_same_state(whole, engine.train(TINY, data, out, small_nets(), None))
    assert not list(out.glob("*.tmp"))


def test_what_is_logged_can_be_read_back(data: Path, encoders: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = replace(TINY, steps=3, engine=replace(TINY.engine, sample_every=3, samples=2))
    engine.train(stage, data, tmp_path, small_nets(), encoders)
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent), size_guidance={"images": 0})
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in log_of(tmp_path)], rel=1e-5) and len(logged) == 3
    assert {"loss", "gradient_norm", "kept", "learning_rate"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]


def test_bad_samples_are_dropped_counted_and_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = replace(TINY, steps=2, loss=Loss(robust_threshold=0.0, robust_from=1), drop=Drop(reference=0.0))
    stage = replace(stage, engine=replace(stage.engine, save_every=1, export_every=1))
    engine.train(stage, data, tmp_path, small_nets(), None)
    assert [row["kept"] for row in log_of(tmp_path)] == [1.0, 0.0] and math.isnan(log_of(tmp_path)[1]["loss"])
    one, two = (weights_of(path) for path in engine.checkpoints(tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one), "a step that teaches nothing changes nothing"
    assert "loss.robust_threshold=0.0 is below all their errors" in "".join(capsys.readouterr())
    rows = [json.loads(line) for line in (tmp_path / "dropped-0.jsonl").read_text().splitlines()]
    expected = [key for n in (2, 3) for key in batches.TrainingSet(data, stage)[n].keys]
    assert [(row["step"], row["key"]) for row in rows] == [(1, key) for key in expected]
    assert all(row["error"] > 0 for row in rows)


def test_a_damaged_sample_is_left_out_and_named(data: Path, tmp_path: Path) -> None:
    shards = Shards(data)
    with ShardWriter(tmp_path / "data") as writer:
        for number, sample in enumerate(shards.samples[:3]):
            tensors = {name: shards.read(number, name) for name in shards.names(number)}
            if number == 1:
                tensors["latents"] = torch.full_like(tensors["latents"], math.nan)
            writer.add(sample.key, tensors)
    stage = replace(TINY, steps=3, optimizer=replace(TINY.optimizer, batch=3))
    last = engine.train(stage, tmp_path / "data", tmp_path / "out", small_nets(), None)
    rows = log_of(tmp_path / "out")
    assert all(row["kept"] == pytest.approx(2 / 3) and row["skipped"] == 0 for row in rows)
    dropped = [json.loads(line)["key"] for line in (tmp_path / "out" / "dropped-0.jsonl").read_text().splitlines()]
    assert dropped == ["clip1"] * 3
    assert all(torch.isfinite(value).all() for value in weights_of(last).values())


def test_steps_in_parts_are_the_same_steps_also_where_samples_are_dropped(data: Path, tmp_path: Path) -> None:
    errors = [float(flow.FlowModel(small_nets(), Loss())(batches.TrainingSet(data, TINY)[n])[1]) for n in range(4)]
    stage = replace(TINY, steps=2, loss=Loss(robust_threshold=sorted(errors)[2] + 1e-3))
    whole = replace(stage, optimizer=replace(TINY.optimizer, batch=4))
    parts = replace(stage, optimizer=replace(TINY.optimizer, batch=2, accumulate=2))
    for name, run in (("whole", whole), ("parts", parts)):
        engine.train(run, data, tmp_path / name, small_nets(), None)
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert a["kept"] == b["kept"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    assert log_of(tmp_path / "whole")[0]["kept"] < 1


def test_what_is_missing_is_said_before_work_starts(data: Path, encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "vae", tmp_path / "half" / "vae")
    with pytest.raises(CheckpointError, match="half lacks wav2vec2/config.json, emotion2vec/model.pt"):
        engine.train(TINY, data, tmp_path / "out", small_nets(), tmp_path / "half")
    with pytest.raises(ConfigError, match="not installed: aimless"):
        changed = replace(TINY, engine=replace(TINY.engine, trackers=("aimless",)))
        engine.train(changed, data, tmp_path / "out", small_nets(), None)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_encoders_behind_links_come_along(encoders: Path, tmp_path: Path) -> None:
    """As a hub's cache has them."""
    (tmp_path / "blobs").mkdir()
    for path in encoders.rglob("*"):
        if path.is_file():
            target = tmp_path / "snapshot" / path.relative_to(encoders)
            target.parent.mkdir(parents=True, exist_ok=True)
            blob = tmp_path / "blobs" / path.as_posix().replace("/", "_")
            shutil.copy(path, blob)
            target.symlink_to(os.path.relpath(blob, target.parent))
    link_encoders(tmp_path / "snapshot", tmp_path / "made" / "checkpoint")
    for path in encoders.rglob("*"):
        if path.is_file():
            assert (tmp_path / "made" / "checkpoint" / path.relative_to(encoders)).read_bytes() == path.read_bytes()


def test_two_processes_learn_what_one_with_twice_the_batch_learns(data: Path, tmp_path: Path) -> None:
    """Also where one process drops everything: it still takes part, and nobody waits for it forever."""
    alone = replace(TINY, steps=4, engine=replace(TINY.engine, save_every=4))
    errors = [float(flow.FlowModel(small_nets(), Loss())(batches.TrainingSet(data, TINY)[n])[1]) for n in range(2)]
    # Of the first step's two samples the one that is further off is dropped: a process is left with nothing.
    alone = replace(alone, loss=Loss(robust_threshold=sum(errors) / 2), drop=Drop(all=0.3))
    together = replace(alone, optimizer=replace(alone.optimizer, batch=1))
    one = engine.train(alone, data, tmp_path / "one", small_nets(), None)
    launch(together, data, tmp_path / "two", 2)
    first, second = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["kept"] for row in first] == [row["kept"] for row in second]
    assert any(row["kept"] == 0.5 for row in first)
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), "the same loss"
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    ours, theirs = weights_of(one), weights_of(engine.latest(tmp_path / "two"))
    assert all(relative_l2(theirs[key].float(), ours[key].float()) < 2e-2 for key in ours if ours[key].any())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """This process alone, joined by gloo."""
    distributed = pytest.importorskip("torch.distributed.device_mesh")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # about operators in place, which training has none of
def test_a_sharded_model_takes_the_same_step(data: Path, mesh: Any) -> None:
    """Also where activations are computed again."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "register_fsdp_forward_method"):
        pytest.skip("this torch has no FSDP2")
    batch, begun, after = batches.collate([batches.TrainingSet(data, TINY)[0]]), small_nets(), []
    for sharded, again in ((False, False), (True, False), (True, True)):
        model = flow.FlowModel(deepcopy(begun), Loss())
        if again:
            checkpoint_gradients(model.nets)
        if sharded:
            for kind in (ResnetBlock, SpatialTransformer, AudioModule, MemoryModule, DiffusionNet):
                for module in [module for module in model.modules() if isinstance(module, kind)]:
                    fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
            engine.gather_outside_forward(fsdp.fully_shard(model, mesh=mesh))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(batch)[0].sum().backward()
        optimizer.step()
        after.append({name: p.full_tensor() if sharded else p for name, p in model.nets.named_parameters()})
    moved = [name for name, p in begun.named_parameters() if not torch.equal(p, after[0][name])]
    assert len(moved) > 100
    for name in moved:
        for one in after[1:]:
            torch.testing.assert_close(one[name], after[0][name])


def test_the_command_trains_and_its_checkpoint_makes_a_video(data: Path, encoders: Path, tmp_path: Path) -> None:
    small_nets().save(tmp_path / "start")
    settings = ["steps=1", "engine.mixed_precision=no", "optimizer.batch=1", "engine.sample_every=9"]
    command.main(
        [
            "train",
            "toon_stage2",
            "--data",
            str(data),
            "--out",
            str(tmp_path / "run"),
            "--start",
            str(tmp_path / "start"),
        ]
        + ["--encoders", str(encoders), "--set", *settings]
    )
    made = MemoPipeline.from_pretrained(engine.latest(tmp_path / "run"))
    audio = made.encode_audio(torch.randn(16000), 16000, fps=30)
    emotion = made.detect_emotion(torch.randn(16000), 16000, audio.num_padded_frames)
    ref = made.encode_reference(torch.zeros(3, 64, 64))
    clip, _ = made.sample_clip(ref, audio, emotion, num_frames=16, steps=1)
    assert clip.latents.shape == (4, 16, 8, 8) and torch.isfinite(clip.latents).all()
    assert json.loads((engine.latest(tmp_path / "run") / "training.json").read_text())["stage"] == "stage2"


def test_an_adapter_is_trained_and_changes_what_is_sampled(data: Path, encoders: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start = tmp_path / "start"
    small_nets().save(start)
    link_encoders(encoders, start)
    settings = ["steps=2", "optimizer.bits=32", "optimizer.batch=1", "data.workers=0", "lora.rank=2"]
    settings += ["optimizer.learning_rate=1e-2", "engine.save_every=1", "engine.sample_every=9"]
    out = tmp_path / "run"
    command.main(
        ["train", "memo_lora", "--data", str(data), "--out", str(out), "--start", str(start), "--set", *settings]
    )
    assert len(engine.checkpoints(out)) == 2 and not list(out.rglob("reference_net"))
    file = engine.latest(out) / "adapter.safetensors"
    assert file.stat().st_size < 2**20
    plain, adapted = (MemoPipeline.from_pretrained(start, lora=lora) for lora in ([], [file]))
    assert plain.nets.base_digest == adapted.nets.base_digest and plain.nets.digest != adapted.nets.digest
    key = "mid_block.audio_modules.0.transformer_blocks.0.attn2.to_q.weight"
    before, after = (pipe.nets.diffusion_net.state_dict()[key] for pipe in (plain, adapted))
    assert 0 < relative_l2(after, before) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "nowhere"], "nowhere"),
        ([], "either --start"),
        (["--start", "a", "--sd15", "b"], "either --start"),
        (["--start", "nowhere", "--set", "steps=x", "--set", "seed=1"], "'x' is not int"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, data: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        command.main(["train", "memo_stage2", "--data", str(data), "--out", str(tmp_path), *arguments])


def test_eight_bit_moments_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = replace(TINY, optimizer=replace(TINY.optimizer, bits=8))
    groups = [{"params": [torch.nn.Parameter(torch.ones(5000))]}]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        learning.adamw(groups, stage, torch.device("cpu"))
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    assert type(learning.adamw(groups, stage, torch.device("cpu"))).__name__ == "AdamW8bit"
