"""Readers of what comes from strangers, given 500 (`make test`: 100) kinds of damage each: their own errors, soon."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import examples
from fuzzing import altered, assert_no_foreign, damaged, json_text
from safetensors import safe_open
from safetensors.torch import load_file, save

from memo_core import MemoryState
from memo_core.checkpoint import lora
from memo_core.checkpoint.load import load
from memo_core.checkpoint.settings import read_net_config, read_sample_size, read_vae_settings
from memo_core.errors import CheckpointError, EmotionError, MemoryStateError
from memo_core.inputs.emotion import EmotionTrack
from memo_core.nets.weights import WEIGHTS, read_json, read_tensors

RUNS = examples(500, fast=100)


def tensors_damaged(path: Path, rng: random.Random) -> bytes:
    """The bytes of a safetensors file with damage anywhere, or whole but for odd tensors or odd JSON in its header."""
    kind = rng.randrange(3)
    if kind == 0:
        return damaged(path.read_bytes(), rng)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    if kind == 1:
        value = tensors.pop(name)
        odd = (
            lambda: value.to(rng.choice((torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.float64))),
            lambda: value[..., :0],
            lambda: torch.full_like(value, rng.choice((float("nan"), float("inf"), 1e38))),
            lambda: value[None],
            lambda: value.flatten()[:1],
            lambda: torch.empty(2**40, 0),
        )
        tensors[rng.choice((name, name, name + "x", "\0"))] = rng.choice(odd)().contiguous()
        return save(tensors, about)
    key = rng.choice(sorted(about) or ["format"])
    try:
        text = json_text(altered(json.loads(about[key]), rng))
    except (ValueError, KeyError):
        text = str(altered([about.get(key)], rng)).encode("utf-8", "replace").decode()
    return save(tensors, about | {key: text})


def test_states(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "state"
    state = MemoryState.empty(4)
    for count in (16, 16, 5):
        state = state.push(torch.randn(count, 4, 4, 4), torch.zeros(1, 512), "m" * 16, "r" * 16)
    state.save(whole)
    loaded = 0
    for seed in range(RUNS):
        path.write_bytes(tensors_damaged(whole, random.Random(seed)))
        loaded += assert_no_foreign(lambda: MemoryState.load(path).inspect(), MemoryStateError)
    assert loaded < RUNS // 4


def test_adapters(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "adapter"
    modules = {
        f"diffusion_net.layers.{i}.to_q": lora.Factors(torch.randn(2 + i, 8), torch.randn(6, 2 + i), 4.0 + i)
        for i in range(3)
    }
    lora.Adapter(modules=modules, base="b" * 16, targets=("audio",), settings="lr: 1").save(whole)
    loaded = 0
    for seed in range(RUNS):
        path.write_bytes(tensors_damaged(whole, random.Random(seed)))
        loaded += assert_no_foreign(lambda: lora.read(path).describe(), CheckpointError)
        assert_no_foreign(lambda: lora.is_adapter(path), ())
    assert loaded < RUNS // 2


def test_emotion_lines() -> None:
    track = EmotionTrack.constant("neutral", 90)
    words = ("1e400", "nan", "inf", "9" * 400, "-1", "\u00b2", "end", "angry", "0:59.5", "\udcff", "\r", "1.5-2.5")
    edited = 0
    for seed in range(RUNS):
        rng = random.Random(seed)
        text = "0.0-1.5 happy 0.25\n1.5-2.5 angry\n# a remark\n0:02.5-end sad 0.7\n"
        if rng.random() < 0.5:
            text = damaged(text.encode(), rng).decode("utf-8", "replace")
        else:
            parts = text.split(" ")
            parts[rng.randrange(len(parts))] = rng.choice(words)
            text = " ".join(parts)
        edited += assert_no_foreign(lambda: track.edited(text), EmotionError)
    assert 0 < edited < RUNS


def yaml_text(value: Any) -> str:
    try:
        return yaml.safe_dump(value)
    except (yaml.YAMLError, ValueError):
        return "model_conf: [" * 1000


@pytest.fixture
def copied(memo_tiny: Path, tmp_path: Path) -> Path:
    """The small checkpoint, its files linked: each is replaced, not written into."""
    for path in memo_tiny.rglob("*"):
        if path.is_file() and path.name not in ("expected.safetensors", "speech.wav"):
            target = tmp_path / "tiny" / path.relative_to(memo_tiny)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target) if path.stat().st_dev == tmp_path.stat().st_dev else target.write_bytes(
                path.read_bytes()
            )
    return tmp_path / "tiny"


def replaced(path: Path, content: bytes) -> Callable[[], None]:
    """Puts other content in a file's place; what is returned puts the old one back."""
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    path.write_bytes(content)
    return lambda: aside.replace(path)


SETTINGS = (
    "reference_net/config.json",
    "diffusion_net/config.json",
    "vae/config.json",
    "wav2vec2/config.json",
    "wav2vec2/preprocessor_config.json",
    "emotion2vec/config.yaml",
)
SMALL_WEIGHTS = (
    f"audio_proj/{WEIGHTS}",
    f"misc/audio_emotion_classifier/{WEIGHTS}",
    "wav2vec2/model.safetensors",
    "emotion2vec/model.pt",
)


def settings_damaged(path: Path, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(path.read_bytes(), rng)
    if path.suffix == ".yaml":
        return yaml_text(altered(yaml.safe_load(path.read_text()), rng)).encode()
    return json_text(altered(json.loads(path.read_text()), rng)).encode()


def parse(folder: Path, name: str) -> None:
    """What a load does with one file."""
    from memo_core.encoders.emotion2vec import Emotion2Vec
    from memo_core.encoders.emotion_head import EmotionHead
    from memo_core.encoders.speech import SpeechEncoder

    path = folder / name
    if name.startswith("wav2vec2"):
        SpeechEncoder.from_pretrained(path.parent)
    elif name.startswith("emotion2vec"):
        Emotion2Vec.from_pretrained(path.parent)
    elif name.startswith("misc"):
        EmotionHead.from_pretrained(path.parent)
    elif name == "vae/config.json":
        read_vae_settings(path)
    elif name.endswith(".json"):
        read_net_config(path.parent)
        read_sample_size(path)
    else:
        read_tensors(path)
        read_json(path.with_name("config.json"))


@pytest.mark.parametrize("names", [SETTINGS, SMALL_WEIGHTS], ids=["settings", "weights"])
def test_files_of_checkpoints(copied: Path, names: tuple[str, ...]) -> None:
    for name in names:
        parse(copied, name)  # also imports what takes longer than any reading
    for seed in range(RUNS):
        rng = random.Random(seed)
        name = rng.choice(names)
        harm = tensors_damaged if name.endswith(".safetensors") else settings_damaged
        harm = (lambda path, rng: damaged(path.read_bytes(), rng)) if name.endswith(".pt") else harm
        restore = replaced(copied / name, harm(copied / name, rng))
        assert_no_foreign(lambda: parse(copied, name), CheckpointError)
        restore()


@pytest.mark.slow
def test_checkpoints(copied: Path) -> None:
    for seed in range(24):
        rng = random.Random(seed)
        name = rng.choice(SETTINGS + SMALL_WEIGHTS[:3])
        harm = tensors_damaged if name.endswith(".safetensors") else settings_damaged
        restore = replaced(copied / name, harm(copied / name, rng))
        assert_no_foreign(lambda: load(copied), CheckpointError, seconds=20)
        restore()


def test_shards(tmp_path: Path) -> None:
    pytest.importorskip("training")
    from training.shards import INDEX, ShardError, Shards, ShardWriter

    with ShardWriter(tmp_path, {"vae": "abc"}, samples_per_shard=2) as writer:
        for number in range(4):
            writer.add(f"clip{number}", {"latents": torch.zeros(16, 4, 2, 2).half()}, {"video": "x", "rate": [30, 1.5]})
    index, shard = tmp_path / INDEX, tmp_path / "clips-000000.tar"

    def read() -> None:
        shards = Shards(tmp_path)
        for number in range(len(shards)):
            for call in (shards.names, lambda i: shards.read(i, "latents", slice(2, 5)), shards.meta):
                with contextlib.suppress(ShardError):
                    call(number)

    for seed in range(RUNS):
        rng = random.Random(seed)
        whole = {path: path.read_bytes() for path in (index, shard)}
        kind = rng.randrange(3)
        if kind == 0:
            index.write_text(json_text(altered(json.loads(whole[index]), rng)))
        elif kind == 1:
            index.write_bytes(damaged(whole[index], rng))
        else:  # as long as it was, or it is refused at once
            shard.write_bytes(damaged(whole[shard], rng).ljust(len(whole[shard]), b"\0")[: len(whole[shard])])
        assert_no_foreign(read, ShardError)
        for path, content in whole.items():
            path.write_bytes(content)
