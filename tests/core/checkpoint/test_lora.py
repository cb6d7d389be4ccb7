"""Adapters: read strictly, merged exactly, part of the model's digest; trained with peft they do the same merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memo_core import MemoPipeline
from memo_core.checkpoint import lora
from memo_core.checkpoint.digest import base_digest
from memo_core.checkpoint.load import load
from memo_core.checkpoint.lora import Adapter, Factors
from memo_core.checkpoint.networks import Networks
from memo_core.cli import build_parser, main
from memo_core.errors import CheckpointError, MemoError
from memo_core.nets.conditions import Conditions
from memo_core.nets.config import LayerKind
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.kinds import AUDIO, TEMPORAL
from memo_core.nets.past import in_turn
from memo_core.sampling.settings import Settings
from memo_core.video.read import read_video

TO_Q = "diffusion_net.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "reference_net.mid_block.attentions.0.proj_in"  # 1x1


def weight_of(nets: object, module: str) -> Tensor:
    net, _, path = module.partition(".")
    return getattr(nets, net).get_submodule(path).weight.detach()


def random_adapter(nets: Networks, *modules: str, rank: int = 4, alpha: float = 8, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    factors = {}
    for module in modules or (TO_Q, CONV):
        out, into, *ones = weight_of(nets, module).shape
        factors[module] = Factors(torch.randn(rank, into, *ones) / 10, torch.randn(out, rank, *ones) / 10, alpha)
    return Adapter(modules=factors, base=nets.base_digest, targets=("attention",), settings="steps: 3")


def copied(nets: Networks) -> Networks:
    return dataclasses.replace(nets, **{net: copy.deepcopy(getattr(nets, net)) for net in lora.NETS})


@pytest.fixture
def nets(pipe: MemoPipeline) -> Networks:
    """The small checkpoint, to be changed."""
    return copied(pipe.nets)


@pytest.fixture
def file(pipe: MemoPipeline, tmp_path: Path) -> Path:
    random_adapter(pipe.nets).save(tmp_path / "face.safetensors")
    return tmp_path / "face.safetensors"


# --- The file ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_written(nets: Networks, tmp_path: Path) -> None:
    written = random_adapter(nets)
    two = random_adapter(nets, "audio_proj.proj1", rank=2, alpha=3)
    written = Adapter(modules={**written.modules, **two.modules}, base="b" * 16, targets=("audio",), settings="lr: 1")
    written.save(tmp_path / "a.safetensors")
    back = lora.read(tmp_path / "a.safetensors")
    assert back.modules.keys() == written.modules.keys()
    for name, factors in written.modules.items():
        assert torch.equal(back.modules[name].down, factors.down) and torch.equal(back.modules[name].up, factors.up)
        assert back.modules[name].alpha == factors.alpha
    assert (back.base, back.targets, back.settings) == ("b" * 16, ("audio",), "lr: 1")
    assert back.name == "a.safetensors" and back.digest == written.digest
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"], "written atomically, nothing left over"


def damaged(file: Path, tensors: dict[str, Tensor] | None = None, drop: str = "", **metadata: str) -> Path:
    with safe_open(file, "pt") as opened:
        about = opened.metadata() | metadata
    stored = load_file(file) | (tensors or {})
    save_file({name: tensor for name, tensor in stored.items() if name != drop}, file, about)
    return file


A, B = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"
BROKEN = {
    "of another network": (dict(format="pt"), "face.safetensors is not a MEMO adapter"),
    "later version": (dict(version="2"), "has version 2, this program reads version 1"),
    "strange key": (dict(tensors={"lora_unet_x.alpha": torch.ones(1)}), "unexpected lora_unet_x.alpha"),
    "strange net": (dict(tensors={"vae.x.lora_A.weight": torch.ones(1, 1)}), "unexpected vae.x.lora_A.weight"),
    "half a pair": (dict(drop=B), f"{TO_Q} lacks lora_B"),
    "rank 0": (dict(tensors={A: torch.ones(0, 32), B: torch.ones(32, 0)}), "a rank r from 1"),
    "ranks differ": (dict(tensors={A: torch.ones(3, 32)}), "its rank is said to be 4"),
    "3x3 convolution": (dict(tensors={A: torch.ones(4, 32, 3, 3), B: torch.ones(32, 4, 1, 1)}), "not [r, in]"),
    "whole numbers": (dict(tensors={A: torch.ones(4, 32, dtype=torch.int8)}), "holds I8, not floating-point"),
    "NaN": (dict(tensors={A: torch.full((4, 32), torch.nan)}), f"{TO_Q} has NaN or infinite values"),
    "8 bits": (dict(tensors={A: torch.ones(4, 32).to(torch.float8_e4m3fn)}), "holds F8_E4M3, not floating-point"),
    "infinite alpha": (dict(alpha="inf"), f"{TO_Q} has an alpha that is no finite number"),
    "huge alpha": (dict(alpha_pattern=f'{{"{TO_Q}": 1e300}}'), f"{TO_Q} has an alpha that is no finite number"),
    "truth for alpha": (
        dict(alpha_pattern=f'{{"{TO_Q}": true}}'),
        f"{TO_Q} has an alpha that is no finite number",
    ),
    "no rank": (dict(rank="many"), "its rank is 'many', not a number"),
    "endless rank": (dict(rank="9" * 5000), "its rank is said to be None"),
    "deep metadata": (dict(targets="[" * 100_000), "its targets is no JSON"),
    "odd metadata": (dict(alpha_pattern="5"), "its alpha_pattern should be a dict, it is 5"),
    "odd targets": (dict(targets="[3]"), "its targets are no names"),
    "odd rate": (dict(config='{"fps": 0}'), "face.safetensors: fps = 0 must be a whole number from 1"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_and_says_why(file: Path, change: dict, message: str) -> None:
    assert torch.equal(lora.read(damaged(file)).modules[TO_Q].down, load_file(file)[A])
    with pytest.raises(CheckpointError) as caught:
        lora.read(damaged(file, **change))
    assert message in str(caught.value)


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no adapter at .*absent"):
        lora.read(tmp_path / "absent.safetensors")
    for content in (b"", b"nonsense" * 99, file.read_bytes()[:-9]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a readable adapter"):
            lora.read(tmp_path / "x")
    monkeypatch.setattr(lora, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000 are allowed"):
        lora.read(file)


# --- Merging ----------------------------------------------------------------------------------------------------------


def test_it_adds_its_product_to_linear_layers_and_1x1_convolutions(nets: Networks) -> None:
    adapter, before = random_adapter(nets), copied(nets)
    lora.apply(nets, adapter, -0.5)
    for module, (down, up, _) in adapter.modules.items():
        old, new = weight_of(before, module), weight_of(nets, module)
        product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(old.shape)
        torch.testing.assert_close(new, old - 0.5 * 8 / 4 * product)
        assert not torch.equal(new, old)
    plain = before.diffusion_net.state_dict()
    changed = {name for name, value in nets.diffusion_net.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == {TO_Q.partition(".")[2] + ".weight"}
    assert not any(parameter.requires_grad for parameter in nets.diffusion_net.parameters())


def test_strength_0_is_no_adapter_bit_by_bit(nets: Networks, memo_tiny: Path, file: Path) -> None:
    same = load(memo_tiny, lora=[(file, 0.0)])
    for net in lora.NETS:
        plain = getattr(nets, net).state_dict()
        assert all(torch.equal(plain[name], value) for name, value in getattr(same, net).state_dict().items())
    assert same.digest == nets.digest and same.title == nets.title


def test_half_precision_is_rounded_once_per_adapter(nets: Networks, memo_tiny: Path) -> None:
    adapter, half = random_adapter(nets), load(memo_tiny, dtype=torch.bfloat16)
    old = weight_of(half, TO_Q)
    lora.apply(half, adapter, 1.0)
    assert torch.equal(weight_of(half, TO_Q), (old.float() + adapter.modules[TO_Q].delta()).bfloat16())


def test_the_digest_names_content_and_strength(memo_tiny: Path, nets: Networks, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    random_adapter(nets, seed=1).save(other)

    def digest(*files: tuple[Path, float]) -> str:
        loaded = load(memo_tiny, lora=files)
        assert loaded.base_digest == nets.digest
        return loaded.digest

    several = [(), ((file, 1.0),), ((file, 0.5),), ((other, 1.0),), ((file, 1.0), (other, 1.0))]
    digests = [digest(*files) for files in several]
    assert len(set(digests)) == len(several) and digests[0] == nets.digest
    assert base_digest(memo_tiny) == nets.digest
    renamed = file.rename(tmp_path / "renamed.safetensors")
    assert digest((renamed, 1.0)) == digests[1], "the same file in another session, by another name"
    title = load(memo_tiny, lora=[(renamed, 0.5), (other, 1)]).title
    assert title.startswith("memo_tiny + renamed.safetensors:0.5 + other.safetensors:1 (")


def test_sampling_follows_what_adapters_were_shown(memo_tiny: Path, nets: Networks, tmp_path: Path) -> None:
    """Their frame rate, rows of face tokens and crop margin; where they differ, the checkpoint's own."""
    said = {
        "old": {},
        "one": {"fps": 25, "face_token_rows": "grouped", "crop_margin": 0.05},
        "same": {"fps": 25, "face_token_rows": "grouped", "crop_margin": 0.05},
        "wide": {"fps": 25, "face_token_rows": "grouped", "crop_margin": 0.4},
    }
    for name, config in said.items():
        dataclasses.replace(random_adapter(nets), config=config).save(tmp_path / name)

    def shown(*names: str, strength: float = 1.0) -> tuple[int, str | None, float]:
        made = MemoPipeline.from_pretrained(memo_tiny, lora=[(tmp_path / name, strength) for name in names])
        settings = Settings().for_checkpoint(made.nets.diffusion_net.config)
        return made.nets.fps, settings.face_token_rows, made.crop_margin

    assert shown() == shown("old") == shown("one", strength=0) == (30, "released", 0.35)
    assert shown("one") == shown("one", "same") == shown("old", "one") == (25, "grouped", 0.05)
    assert shown("one", "wide") == (25, "grouped", 0.35) and shown("wide", "one", "same") == (25, "grouped", 0.35)
    assert "fps 25, face_token_rows grouped, crop_margin 0.05" in lora.describe(tmp_path / "one")


def test_an_adapter_of_other_networks_is_refused(nets: Networks) -> None:
    strange = random_adapter(nets).modules[TO_Q]
    wide = Factors(torch.ones(1, 7), torch.ones(5, 1), 1.0)
    modules = {f"diffusion_net.layer{i}": strange for i in range(12)}
    modules |= {TO_Q: wide, "diffusion_net.conv_norm_out": wide}
    with pytest.raises(CheckpointError) as caught:
        lora.apply(nets, Adapter(modules=modules, base="abc", name="x"), 1.0)
    message = str(caught.value)
    assert "x does not fit this checkpoint; it was trained on abc" in message and "and 4 more" in message
    with pytest.raises(CheckpointError, match=r"to_q has shape \(32, 32\), the adapter is for \(5, 7\)"):
        lora.apply(nets, Adapter(modules={TO_Q: wide}), 1.0)
    for_3x3 = {"reference_net.conv_in": Factors(torch.ones(1, 4), torch.ones(32, 1), 1.0)}
    with pytest.raises(CheckpointError, match=r"conv_in has shape \(32, 4, 3, 3\), the adapter is for \(32, 4\)"):
        lora.apply(nets, Adapter(modules=for_3x3), 1.0)
    for strength in (torch.nan, torch.inf):
        with pytest.raises(CheckpointError, match="must be a finite number"):
            lora.apply(nets, random_adapter(nets), strength)
    nets.diffusion_net.half()
    with pytest.raises(CheckpointError, match="exceeds torch.float16 .*lower the strength"):
        lora.apply(nets, random_adapter(nets), 1e6)


def test_another_checkpoint_than_it_was_trained_on_is_a_warning(
    nets: Networks, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = random_adapter(nets)
    with caplog.at_level(logging.WARNING):
        lora.apply(nets, adapter, 1.0)
        lora.apply(nets, adapter, 1.0)  # the base is still the same
        assert caplog.text == ""
        lora.apply(nets, Adapter(modules=adapter.modules, base="0" * 16, name="elsewhere"), 1.0)
    assert f"elsewhere was trained on checkpoint {'0' * 16}, this one is {nets.base_digest}" in caplog.text


# --- For the user -----------------------------------------------------------------------------------------------------


def test_a_pipeline_takes_files_with_and_without_strength(memo_tiny: Path, file: Path) -> None:
    one, same, half = (MemoPipeline.from_pretrained(memo_tiny, lora=[item]) for item in (file, (file, 1), (file, 0.5)))
    assert one.nets.digest == same.nets.digest != half.nets.digest
    assert torch.equal(weight_of(one.nets, TO_Q), weight_of(same.nets, TO_Q))
    assert not torch.equal(weight_of(one.nets, TO_Q), weight_of(half.nets, TO_Q))


@pytest.mark.parametrize(
    "text, meant",
    [("a.safetensors", ("a.safetensors", 1)), ("a:0.8", ("a", 0.8)), ("a:-1", ("a", -1)), ("C:\\a", ("C:\\a", 1))],
)
def test_the_command_line_names_file_and_strength(text: str, meant: tuple[str, float]) -> None:
    args = build_parser().parse_args(["generate", "p", "v", "--lora", text, "--lora", "b:2"])
    assert args.lora == [meant, ("b", 2)]


@pytest.mark.parametrize("text", ["a:nan", "a:inf", ":0.5", ""])
def test_the_command_line_refuses_a_strength_that_is_none(text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "p", "v", "--lora", text]) == 2
    assert "is not FILE or FILE:STRENGTH" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_uses_an_adapter_and_writes_so(
    memo_tiny: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted_once: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "tan").save("face.png")
    with wave.open("voice.wav", "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(range(256)) * 32)
    quick = ["--checkpoint", str(memo_tiny), "--size", "64", "--steps", "1", "--emotion", "null", "--device", "cpu"]
    videos = []
    for name, more in {"plain": [], "none": [f"{file}:0"], "some": [f"{file}:4"]}.items():
        options = [word for text in more for word in ("--lora", text)]
        assert main(["generate", "face.png", "voice.wav", *quick, *options, "-o", f"{name}.mp4"]) == 0
        about, frames = read_video(f"{name}.mp4")
        videos.append((about.metadata["model"], np.stack(list(frames)).astype(int)))
    (plain, first), (zero, second), (adapted, third) = videos
    assert plain == zero and np.array_equal(first, second)
    assert adapted.startswith("memo_tiny + face.safetensors:4 (")
    assert np.abs(third - first).mean() > 1


def test_info_describes_an_adapter(nets: Networks, file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    for fact in ("face.safetensors", nets.digest, "rank         4", "alpha        8", "attention", "steps: 3"):
        assert fact in out
    assert "diffusion_net  1 layers" in out and f"{sum(t.numel() for t in load_file(file).values()):,}" in out


# --- Training ---------------------------------------------------------------------------------------------------------


class Container(nn.Module):
    """The four networks, as training has them."""

    def __init__(self, nets: Networks):
        super().__init__()
        for net in lora.NETS:
            setattr(self, net, getattr(nets, net))


def velocity(nets: object) -> Tensor:
    """What the networks make of fixed inputs, every part of them taking part: [1, 4, 2, 16, 16]."""
    random = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    face = nets.image_proj(draw(1, 512))
    features = nets.reference_net(draw(3, 4, 16, 16), face.expand(3, -1, -1))
    past = nets.diffusion_net.past([feature[1:] for feature in features], 16, 16, 2)
    memory = [layer.carries.of_window(key, value) for layer, key, value in past]
    width = nets.audio_proj.proj1.in_features
    return nets.diffusion_net.predict(
        draw(1, 4, 2, 16, 16),
        torch.tensor([300.0]),
        Conditions(
            reference=[feature[:1] for feature in features],
            face_tokens=face,
            audio_tokens=nets.audio_proj(draw(1, 2, 1, 1, width)),
            emotion=torch.tensor([3]),
            frames=2,
        ),
        in_turn(memory),
    )


@pytest.fixture
def tuning():
    pytest.importorskip("peft")
    from training import lora as tuning

    return tuning


@pytest.mark.slow
def test_what_was_trained_does_the_same_merged(tuning, nets: Networks, memo_tiny: Path, tmp_path: Path) -> None:
    container = Container(nets)
    with torch.no_grad():
        start = velocity(container)
    torch.manual_seed(0)
    parameters = tuning.add(container, 4, 8, tuple(tuning.TARGETS))
    with torch.no_grad():
        assert torch.equal(velocity(container), start), "an adapter begins as nothing"
    assert {id(p) for p in container.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (velocity(container) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = velocity(container)
    assert (trained - start).norm() / start.norm() > 0.05

    path = tmp_path / "mine.safetensors"
    tuning.save(container, path, nets.base_digest, json.dumps({"steps": 3}))
    merged = load(memo_tiny, lora=[(path, 1.0)])
    with torch.no_grad():
        difference = (velocity(merged) - trained).norm() / trained.norm()
    assert difference < 1e-5, difference
    adapter = lora.read(path)
    assert adapter.targets == tuple(tuning.TARGETS) and adapter.base == nets.digest
    assert {name.partition(".")[0] for name in adapter.modules} == set(lora.NETS)


@pytest.mark.slow
def test_training_goes_on_from_a_file(tuning, nets: Networks, tmp_path: Path) -> None:
    def fresh(rank: int = 4, targets: tuple[str, ...] = ("attention", "audio")) -> Container:
        container = Container(copied(nets))
        tuning.add(container, rank, 8, targets)
        return container

    first, path = fresh(), tmp_path / "mine.safetensors"
    for parameter in first.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    tuning.save(first, path, "b" * 16, "")
    second = fresh()
    assert tuning.load(second, path).base == "b" * 16
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for other in (fresh(rank=2), fresh(targets=("attention",))):
        with pytest.raises(MemoError, match="does not continue"):
            tuning.load(other, path)
    with pytest.raises(MemoError, match="have adapters already"):
        tuning.add(first, 4, 8, ("memory",))


QKV = r"to_(q|k|v|out\.0)"
# What the groups hold in the released layout, by the full names of layers.
GROUPS = {
    "attention": rf"diffusion_net\..+\.attentions\..+\.attn[12]\.{QKV}",
    "audio": r"audio_proj\.proj[123]"
    rf"|diffusion_net\..+\.audio_modules\..+\.(audio_)?attn[12]\.({QKV}|add_[qkv]_proj|to_add_out)",
    "emotion": r"diffusion_net\..+\.adaLN_modulation\.1",
    "memory": rf"diffusion_net\..+\.motion_modules\..+\.attention_blocks\.\d+\.{QKV}",
    "reference": rf"reference_net\..+\.attn[12]\.{QKV}",
    "face": r"image_proj\.proj",
    "feed_forward": r"(reference|diffusion)_net\..+\.(audio_)?ff\.net\.(0\.proj|2)",
    "projections": r"(reference|diffusion)_net\..+\.proj_(in|out)",
}


@pytest.mark.parametrize("kinds", ["released", "mixed"])
def test_groups_hold_the_layers_that_their_modules_name(tuning, nets: Networks, kinds: str) -> None:
    """Of every kind of layer."""
    container = Container(nets)
    if kinds == "mixed":
        config = nets.diffusion_net.config
        levels = range(len(config.block_out_channels))
        with torch.device("meta"):
            container.diffusion_net = DiffusionNet(
                dataclasses.replace(
                    config,
                    audio=tuple(LayerKind(list(AUDIO)[i % len(AUDIO)]) for i in levels),
                    temporal=tuple(LayerKind(list(TEMPORAL)[i % len(TEMPORAL)], i % 3) for i in levels),
                )
            )
    assert tuple(GROUPS) == tuple(tuning.TARGETS)
    for group, pattern in GROUPS.items():
        wanted = [name for name, _ in container.named_modules() if re.fullmatch(pattern, name)]
        assert tuning.layers(container, (group,)) == sorted(wanted) and len(wanted) == len(set(wanted)) > 0, group


def test_targets_and_numbers_that_are_none_are_refused(tuning, nets: Networks) -> None:
    with pytest.raises(MemoError, match=r"\['attention', 'mouth'\]; allowed are .*attention, audio, emotion, memory"):
        tuning.add(Container(nets), 4, 8, ("attention", "mouth"))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(MemoError, match="LoRA"):
            tuning.add(Container(nets), **({"rank": 4, "alpha": 8.0} | wrong))
    with pytest.raises(CheckpointError, match="changes no layer"):
        tuning.save(Container(nets), "x.safetensors", "", "")


# Parameters of rank 16 on the released networks. In the file, float32: 4 bytes each.
RANK_16 = {"attention": 3_188_736, "audio": 6_036_480, "memory": 4_833_280, "reference": 3_092_480}


@pytest.mark.slow
def test_the_size_on_the_released_networks(tuning) -> None:
    from training.nets import Nets

    with torch.device("meta"):
        for target, count in RANK_16.items():
            parameters = tuning.add(Nets(), 16, 16, (target,))
            assert sum(parameter.numel() for parameter in parameters) == count
            assert all(parameter.dtype == torch.float32 for parameter in parameters)
