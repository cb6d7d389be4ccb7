"""Every kind of layer is a configuration: checkpoints with it load, remember, sample, adapt and are budgeted alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import relative_l2, thinned
from torch import Tensor, nn

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.budget.counting import needs
from memo_core.checkpoint.lora import Adapter, Factors, apply
from memo_core.checkpoint.save import save_module
from memo_core.errors import CheckpointError
from memo_core.kernels import memory_attention, memory_sums
from memo_core.memory.cache import MemoryCache
from memo_core.nets.audio import AudioLayer
from memo_core.nets.conditions import Conditions
from memo_core.nets.config import NetConfig
from memo_core.nets.cross_audio import CrossAudioModule
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.kinds import AUDIO
from memo_core.nets.last_frames import LastFramesAttention
from memo_core.nets.past import LastFrames
from memo_core.nets.past_attention import PastAttention
from memo_core.nets.temporal import PositionEncoding
from memo_core.running.options import Options
from memo_core.sampling import schedule
from memo_core.sampling.settings import PRESETS, Settings
from memo_core.sampling.store import WindowStore

KINDS: dict[str, dict[str, Any]] = {
    "last 2": {"temporal_modules": {"kind": "last_frames", "frames": 2}},
    "last 4": {"temporal_modules": {"kind": "last_frames", "frames": 4}},
    "past": {"temporal_modules": "past_attention"},
    "past 24": {"temporal_modules": {"kind": "past_attention", "frames": 24}},
    "cross": {"audio_modules": "cross"},
    "each level its own": {
        "temporal_modules": ["memory", {"kind": "last_frames", "frames": 3}, "past_attention", "memory"],
        "audio_modules": ["cross", "multimodal", "cross", "multimodal"],
    },
    "places": {"motion_module_kwargs": {"temporal_position_encoding": True, "temporal_position_encoding_max_len": 24}},
}
FAST = ("each level its own",)  # every kind of module is in it


@pytest.fixture(scope="module")
def checkpoint(memo_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small checkpoint with a kind of layers from KINDS, of random weights."""

    @cache
    def make(kind: str) -> Path:
        settings, folder = KINDS[kind], tmp_path_factory.mktemp("checkpoint") / "kind"
        shutil.copytree(memo_tiny, folder)
        config = json.loads((folder / "diffusion_net" / "config.json").read_text())
        motion = config["motion_module_kwargs"] | settings.get("motion_module_kwargs", {})
        config |= settings | {"motion_module_kwargs": motion}
        torch.manual_seed(0)
        save_module(folder / "diffusion_net", DiffusionNet(NetConfig.from_json(config)), config, torch.float32)
        return folder

    return make


@pytest.mark.parametrize("kind", thinned(KINDS, FAST))
def test_a_kind_loads_samples_remembers_and_is_stored(
    checkpoint: Callable[[str], Path], expected: dict[str, Tensor], kind: str, tmp_path: Path
) -> None:
    """Its own memory, over more than one window, is the same whether it was kept or is made of the state."""
    pipe = MemoPipeline.from_pretrained(checkpoint(kind))
    picture, embedding = expected["in.reference_image"][0, :, 32:96, 32:96], expected["in.face_embedding"]
    reference, track = pipe.encode_reference(picture, embedding), pipe.encode_audio(expected["in.waveform"], 16000)
    store = WindowStore(tmp_path / "store", 2**30)
    whole, memory = pipe.sample_clip(reference, track, steps=1, num_frames=64, store=store)
    assert torch.isfinite(whole.latents).all() and len(memory.entries) == 5
    first, between = pipe.sample_clip(reference, track, steps=1, num_frames=48)
    another = MemoPipeline.from_pretrained(checkpoint(kind))  # which has kept nothing
    second, after = another.sample_clip(reference, track, memory=between, start=48, num_frames=16, steps=1)
    assert torch.equal(torch.cat([first.latents, second.latents], dim=1), whole.latents)
    assert after.digest == memory.digest
    job = another.job(reference, track, steps=1, num_frames=64)
    assert another.count_stored(job, store) == 4
    without, _ = another.sample_clip(reference, track, start=48, num_frames=16, steps=1)
    assert relative_l2(without.latents, second.latents) > 1e-6, "the past does not matter"


@pytest.mark.parametrize("kind", thinned(KINDS, FAST))
def test_a_kind_is_budgeted_fused_and_adapted(checkpoint: Callable[[str], Path], kind: str) -> None:
    pipe = MemoPipeline.from_pretrained(checkpoint(kind))
    assert needs(pipe.nets, 128, 128, Settings()).step > 0
    module = next(m for m in pipe.nets.diffusion_net.layer_modules() if m.part == "memory")
    name = next(n for n, m in pipe.nets.diffusion_net.named_modules() if m is module)
    layer = f"diffusion_net.{name}.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q"
    width = next(module.layers()).to_q.in_features
    adapter = Adapter(modules={layer: Factors(torch.ones(1, width), torch.ones(width, 1), 1.0)})
    before = pipe.nets.digest
    apply(pipe.nets, adapter)
    assert pipe.nets.digest != before
    fused = MemoPipeline.from_pretrained(checkpoint(kind), options=Options(fuse_qkv=True))
    assert any(hasattr(module, "fused") for module in fused.nets.diffusion_net.modules())


class LoudnessBlock(nn.Module):
    def __init__(self, dim: int, audio_dim: int, heads: int, final: bool, ops: Any):
        super().__init__()
        self.heard = ops.Linear(audio_dim, dim)


class Loudness(AudioLayer):
    """Adds one and the same to all of a frame, by its sound."""

    block = LoudnessBlock

    def prepare(self, conditions: Conditions, index: int) -> tuple[Tensor] | None:
        if conditions.audio_tokens is None:
            return None
        return (self.transformer_blocks[0].heard(conditions.audio_tokens.flatten(0, 1).mean(dim=1)),)

    def forward(self, x: Tensor, audio: Tensor, prepared: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return x + self.proj_out(self.proj_in(self.norm(x)) + prepared[0][:, :, None, None]), audio


def test_another_kind_of_audio_module_is_one_class(
    checkpoint: Callable[[str], Path], expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block, what is prepared for it and how it is called: `AudioLayer` has the rest."""
    monkeypatch.setitem(AUDIO, "loudness", Loudness)
    monkeypatch.setitem(KINDS, "loudness", {"audio_modules": "loudness"})
    pipe = MemoPipeline.from_pretrained(checkpoint("loudness"))
    reference = pipe.encode_reference(expected["in.reference_image"][0, :, 32:96, 32:96], expected["in.face_embedding"])
    spoken, silent = (
        pipe.sample_clip(reference, pipe.encode_audio(sound, 16000), steps=1, num_frames=16)[0].latents
        for sound in (expected["in.waveform"], torch.zeros(16000))
    )
    assert relative_l2(spoken, silent) > 1e-4


def layers(kind: type, frames: int) -> Any:
    torch.manual_seed(0)
    return kind(8, 2, frames=frames).requires_grad_(False)


def remembered(layer: Any, windows: list[Tensor]) -> Any:
    """What a layer carries after windows of past frames, by way of the cache."""
    state = MemoryState.empty()
    past = {}
    for number, window in enumerate(windows):
        latents = torch.full((len(window), 4, 1, 1), float(number))
        state = state.push(latents, torch.zeros(1, 512), "model", "reference")
        past[state.entries[-1].digest] = window
    cache = MemoryCache()
    memory = cache.memory_of(
        state,
        "",
        lambda entry: [(layer, *layer.keys_values(past[entry.digest], len(entry.latents)))],
        frames=layer.carries.frames,
    )
    return memory[0]


@pytest.mark.parametrize("counts", [[16], [16, 16], [16, 1], [3, 1, 1], [1]], ids=str)
def test_last_frames_are_all_that_is_remembered_whatever_their_windows(counts: list[int]) -> None:
    layer, window = layers(LastFramesAttention, 2), torch.randn(16, 3, 8)
    past = [torch.randn(count, 3, 8) for count in counts]
    found = layer(window, remembered(layer, past), 16)
    last = torch.cat(past)[-2:]
    key, value = layer.keys_values(last, len(last))
    query, own_key, own_value = (layer._split(to(window), 16) for to in (layer.to_q, layer.to_k, layer.to_v))
    wanted = memory_attention(query, own_key, own_value, memory_sums(key, value)).reshape(window.shape)
    torch.testing.assert_close(found, layer.to_out[0](wanted))
    changed = [part.clone() for part in past]
    changed[-1][-1] += 1
    assert relative_l2(layer(window, remembered(layer, changed), 16), found) > 1e-4


@pytest.mark.parametrize("counts", [[16], [16, 4], [3]], ids=str)
def test_past_attention_attends_to_past_frames_and_its_own(counts: list[int]) -> None:
    layer, window = layers(PastAttention, 16), torch.randn(16, 3, 8)
    past = [torch.randn(count, 3, 8) for count in counts]
    found = layer(window, remembered(layer, past), 16)
    last = torch.cat(past)[-16:]
    both = torch.cat([last, window])
    query = layer._split(layer.to_q(window), 16).permute(0, 2, 3, 1, 4)
    key, value = (layer._split(to(both), len(both)).permute(0, 2, 3, 1, 4) for to in (layer.to_k, layer.to_v))
    scores = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    wanted = (scores @ value).permute(0, 3, 1, 2, 4).reshape(window.shape)
    torch.testing.assert_close(found, layer.to_out[0](wanted))


@pytest.mark.parametrize("kind", [LastFramesAttention, PastAttention])
def test_a_past_that_is_not_there_is_no_past(kind: type) -> None:
    """As in training, where some samples of a batch have less of it."""
    layer, window = layers(kind, 4), torch.randn(16, 3, 8)
    pairs, there = layer.carries.of_window(*layer.keys_values(torch.randn(16, 3, 8), 16))
    torch.testing.assert_close(layer(window, (pairs * 0, there * 0), 16), layer(window, None, 16))
    assert relative_l2(layer(window, (pairs, there), 16), layer(window, None, 16)) > 1e-3


def test_last_frames_go_on_over_short_windows() -> None:
    carries = LastFrames(4)
    key, value = torch.randn(2, 1, 9, 3, 2, 8)
    windows = [(key[:, a:b], value[:, a:b]) for a, b in ((0, 3), (3, 8), (8, 9))]
    memory = carries.of_window(*windows[0])
    for window in windows[1:]:
        memory = carries.update(memory, 0.5, *window)
    wanted = carries.of_window(key, value)
    assert all(torch.equal(a, b) for a, b in zip(memory, wanted))


def test_cross_attention_hands_the_sound_on_and_hears_it() -> None:
    from memo_core.nets.conditions import Conditions

    torch.manual_seed(0)
    module = CrossAudioModule(16, 16, 8, 2, 4).requires_grad_(False)
    frames, audio = torch.randn(2, 16, 3, 3), torch.randn(1, 2, 4, 8)

    def answer(audio: Tensor) -> Tensor:
        conditions = Conditions(
            reference=[], face_tokens=torch.zeros(1, 1, 1), audio_tokens=audio, emotion=torch.tensor([1]), frames=2
        )
        prepared = module.prepare(conditions, 0)
        entering = module.begin(audio.flatten(0, 1), prepared)
        x, out = module(frames, entering, prepared)
        assert torch.equal(out, audio.flatten(0, 1))
        return x

    assert relative_l2(answer(audio + 1.5 * torch.randn(1, 2, 4, 8)), answer(audio)) > 1e-4


def test_places_in_the_window_are_the_released_sines() -> None:
    """Row p of the table: sin(p / 10000^(2 i / dim)) at 2 i, the cosine at 2 i + 1; added to each frame's tokens."""
    places = PositionEncoding(6, 24)
    assert list(places.state_dict()) == ["pe"] and places.pe.shape == (1, 24, 6)
    angle = torch.arange(24.0)[:, None] / 10000 ** (torch.arange(0, 6, 2) / 6)
    torch.testing.assert_close(places.pe[0, :, 0::2], angle.sin())
    torch.testing.assert_close(places.pe[0, :, 1::2], angle.cos())
    x = torch.randn(2 * 5, 3, 6)
    wanted = x.view(2, 5, 3, 6) + places.pe[:, :5, None]
    assert torch.equal(places(x, 5), wanted.view(10, 3, 6))


def test_places_are_the_windows_and_not_the_pasts(checkpoint: Callable[[str], Path]) -> None:
    """As in the released module: added before queries, keys and values of the window; past frames have none. Its table
    is a weight in the file."""
    pipe = MemoPipeline.from_pretrained(checkpoint("places"))
    module = next(iter(pipe.nets.diffusion_net.temporal_modules()))
    layer = module.temporal_transformer.transformer_blocks[0].attention_blocks[0]
    width = layer.to_q.in_features
    x, past = torch.randn(16, 4, width), torch.randn(16, 4, width)
    key, value = layer.keys_values(past, 16)
    assert torch.equal(key, layer._split(layer.to_k(past), 16))
    memory = layer.carries.of_window(key, value)
    placed = x + layer.pos_encoder.pe[0, :16, None]
    query, own_key, own_value = (layer._split(to(placed), 16) for to in (layer.to_q, layer.to_k, layer.to_v))
    wanted = layer.to_out[0](memory_attention(query, own_key, own_value, memory).reshape(x.shape))
    torch.testing.assert_close(layer(x, memory, 16), wanted)
    names = [name for name in pipe.nets.diffusion_net.state_dict() if name.endswith("pos_encoder.pe")]
    assert len(names) == len(list(pipe.nets.diffusion_net.temporal_modules())) * len(list(module.layers()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temporal_modules": "archive"}, "temporal_modules is 'archive'; there are memory, last_frames"),
        ({"audio_modules": ["cross"]}, "audio_modules has 1 kinds for 4 levels"),
        ({"temporal_modules": {"frames": 2}}, "must be the name of a kind"),
        ({"temporal_modules": {"kind": "last_frames"}}, "needs frames from 1"),
        ({"temporal_modules": {"kind": "last_frames", "frames": -1}}, "whole number"),
        ({"motion_module_kwargs": {"temporal_position_encoding": True, "temporal_position_encoding_max_len": 8}}, "8"),
        ({"temporal_modules": {"kind": "memory", "frames": 4}}, "frames = 4 is not for a layer of this kind"),
        ({"temporal_modules": {"kind": "last_frames", "frames": 5000}}, "at most 256"),
        ({"window_frames": 65}, "at most 64"),
        ({"prediction": "epsilon"}, "only 'flow' is"),
        ({"noise_levels": [1.0, 0.5]}, "must fall from 1 to 0"),
        ({"noise_levels": [0.5, 0.0]}, "must fall from 1 to 0"),
        ({"face_token_rows": "mixed"}, "'mixed' must be one of .*grouped"),
        ({"crop_margin": 11}, "at most 10"),
        ({"crop_margin": -0.1}, "a number from 0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    memo_tiny: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "kind"
    shutil.copytree(memo_tiny, folder)
    file = folder / "diffusion_net" / "config.json"
    config = json.loads(file.read_text())
    motion = config["motion_module_kwargs"] | settings.get("motion_module_kwargs", {})
    file.write_text(json.dumps(config | settings | {"motion_module_kwargs": motion}))
    with pytest.raises(CheckpointError, match=said):
        MemoPipeline.from_pretrained(folder)


def test_a_checkpoint_may_bring_its_window_rate_levels_and_guidance(
    memo_tiny: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    folder = tmp_path / "twelve"
    shutil.copytree(memo_tiny, folder)
    file = folder / "diffusion_net" / "config.json"
    own = {"window_frames": 12, "fps": 25, "noise_levels": [1.0, 0.6, 0.0], "guidance_embedded": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    pipe = MemoPipeline.from_pretrained(folder)
    picture = expected["in.reference_image"][0, :, 32:96, 32:96]
    reference = pipe.encode_reference(picture, expected["in.face_embedding"])
    track = pipe.encode_audio(expected["in.waveform"], 16000)
    assert track.fps == 25 and track.num_padded_frames % 12 == 0
    job = pipe.job(reference, track, num_frames=30)
    assert job.windows == 3 and job.settings.steps == 2 and not job.settings.guided
    rows: list[int] = []
    hook = pipe.nets.diffusion_net.conv_out.register_forward_hook(lambda _, given, x: rows.append(len(x)))
    windows = list(pipe.sample_windows(job))
    hook.remove()
    assert rows == [12] * 6 and [window.latents.shape[1] for window in windows] == [12, 12, 6]
    assert [len(entry.latents) for entry in windows[-1].memory.entries] == [12, 12, 12, 6]


def test_a_checkpoint_may_say_how_it_was_shown_faces(
    memo_tiny: Path, tmp_path: Path, pipe: MemoPipeline, small: Reference, track: AudioTrack
) -> None:
    """Rows of face tokens and the crop: what nobody asks for otherwise is as in its training."""
    folder = tmp_path / "own"
    shutil.copytree(memo_tiny, folder)
    file = folder / "diffusion_net" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"face_token_rows": "grouped", "crop_margin": 0.05}))
    own = MemoPipeline.from_pretrained(folder)

    def sample(one: MemoPipeline, **settings: Any) -> Tensor:
        return one.sample_clip(small, track, num_frames=16, steps=1, **settings)[0].latents

    assert own.job(small, track, num_frames=16).settings.face_token_rows == "grouped"
    assert pipe.job(small, track, num_frames=16).settings.face_token_rows == "released"
    released, grouped = (sample(pipe, face_token_rows=rows) for rows in ("released", "grouped"))
    assert torch.equal(sample(pipe), released) and torch.equal(sample(own), grouped)
    assert torch.equal(sample(own, face_token_rows="released"), released) and not torch.equal(released, grouped)

    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    cuts = dict(size=64, crop="face", face_box=(40, 30, 70, 60), face_embedding=torch.zeros(512))
    for one, margin in ((own, 0.05), (pipe, 0.35)):
        asked = one.encode_reference(picture, margin=margin, **cuts)
        assert torch.equal(one.encode_reference(picture, **cuts).pixels, asked.pixels)
    assert not torch.equal(own.encode_reference(picture, **cuts).pixels, asked.pixels)


@pytest.mark.parametrize("speed", PRESETS)
def test_a_checkpoints_noise_levels_are_the_steps_whatever_the_preset(speed: str) -> None:
    config = replace(NetConfig(), noise_levels=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0))
    settings = Settings(speed=speed).for_checkpoint(config)
    assert settings.steps == len(schedule.of(config, settings.steps)) - 1 == 8
    assert settings.for_checkpoint(config) == settings


def test_a_window_may_be_longer_than_the_released_one(
    memo_tiny: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(memo_tiny, folder)
    file = folder / "diffusion_net" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"window_frames": 24}))
    pipe = MemoPipeline.from_pretrained(folder)
    reference = pipe.encode_reference(expected["in.reference_image"][0, :, 32:96, 32:96], expected["in.face_embedding"])
    track = pipe.encode_audio(expected["in.waveform"], 16000)
    clip, memory = pipe.sample_clip(reference, track, num_frames=30, steps=1, guidance_scale=1)
    assert clip.num_frames == 30 and [len(entry.latents) for entry in memory.entries] == [24, 24, 6]
    memory.save(tmp_path / "state")
    assert MemoryState.load(tmp_path / "state").digest == memory.digest


@pytest.mark.slow
def test_what_may_be_held_is_budgeted(checkpoint: Callable[[str], Path]) -> None:
    """A layer that looks at 24 past frames holds them after its second window."""
    held = [
        sum(needs(MemoPipeline.from_pretrained(checkpoint(kind)).nets, 128, 128, Settings()).layers)
        for kind in ("past", "past 24")
    ]
    assert held[1] == pytest.approx(1.5 * held[0], rel=0.01)


def test_emotion_tracks_fit(pipe: MemoPipeline, track: AudioTrack, emotions: EmotionTrack) -> None:
    assert emotions.fps == track.fps == pipe.nets.fps
