"""Finding, loading and saving checkpoints: strict, and clear about what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memo_core import checkpoint
from memo_core.checkpoint import save_module, weights_digest
from memo_core.errors import CheckpointError
from memo_core.nets.projections import AudioProjection
from memo_core.nets.weights import WEIGHTS, load_strict, read_json, read_tensors


@pytest.fixture
def folder(memo_tiny: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to break."""
    return shutil.copytree(memo_tiny, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("expected*", "*.wav"))


def change_weights(folder: Path, net: str, change) -> None:
    path = folder / net / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)


def change_config(folder: Path, net: str, **changes: object) -> None:
    path = folder / net / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_small_checkpoint_loads(memo_tiny: Path) -> None:
    nets = checkpoint.load(memo_tiny, dtype=torch.bfloat16)
    for net in (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae):
        assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
        assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
        assert not any(tensor.is_meta for tensor in net.state_dict().values())
    for net in (nets.speech_encoder, nets.emotion_encoder, nets.emotion_head):
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32} and not net.training
    assert nets.sample_size == 16 and nets.folder == memo_tiny and not nets.embedded


def test_sizes_that_no_config_names_come_from_the_tensors(memo_tiny: Path) -> None:
    nets = checkpoint.load(memo_tiny)
    assert nets.audio_proj.proj1.in_features == 5 * 2 * 32 and nets.audio_proj.tokens == 4
    assert nets.image_proj.proj.in_features == 512
    assert "proj1" not in (memo_tiny / "audio_proj" / "config.json").read_text()


@pytest.mark.parametrize("name", ["doll", "/absent/folder", "toon2"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at '{name}'.* one of toon"):
        checkpoint.load(name)


def test_embedded_checkpoints_are_found_by_name(
    memo_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(memo_tiny, tmp_path / "toon")
    monkeypatch.setattr(checkpoint, "assets", lambda: tmp_path)
    assert checkpoint.find("toon") == tmp_path / "toon"
    assert checkpoint.load("toon").embedded and checkpoint.load(tmp_path / "toon").embedded


def test_missing_files_are_listed(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "emotion2vec" / "config.yaml").unlink()
    shutil.rmtree(folder / "image_proj")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "lacks 4 of" in message and f"__main__.py download {folder}" in message
    for name in (f"vae/{WEIGHTS}", "emotion2vec/config.yaml", "image_proj/config.json", f"image_proj/{WEIGHTS}"):
        assert name in message


@pytest.mark.parametrize("net", ["reference_net", "diffusion_net", "vae"])
def test_the_first_ten_keys_that_do_not_fit_are_listed(folder: Path, net: str) -> None:
    key = (
        "conv_out.weight" if net == "diffusion_net" else "decoder.conv_out.weight" if net == "vae" else "conv_in.weight"
    )
    bias = key.replace("weight", "bias")

    def change(weights: dict[str, Tensor]) -> None:
        del weights[key]
        weights[bias] = torch.zeros(7)
        weights |= {f"strange.{i:02}": torch.zeros(1) for i in range(12)}

    change_weights(folder, net, change)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    lines = str(caught.value).splitlines()
    assert net in lines[0] and len(lines) == 1 + 10 + 1 and lines[-1].strip() == "and 4 more"
    assert f"missing {key}" in lines[1]
    assert any(f"{bias} has shape (7,), expected" in line for line in lines)
    assert any("unexpected strange.00" in line for line in lines) and not any("strange.11" in line for line in lines)


@pytest.mark.parametrize("net", ["image_proj", "audio_proj"])
def test_projections_without_sizes_are_refused(folder: Path, net: str) -> None:
    change_weights(folder, net, lambda weights: weights.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=f"{net}.*lacks 'norm.weight'"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 10, None], ids=["empty", "nonsense", "truncated"])
def test_damaged_weights_are_named(folder: Path, content: bytes | None) -> None:
    path = folder / "reference_net" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"block_out_channels": 3}'])
def test_damaged_configurations_are_named(folder: Path, content: str) -> None:
    (folder / "diffusion_net" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="diffusion_net/config.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("diffusion_net/config.json", '"norm_num_groups": ', '"norm_num_groups": 7'),
        ("vae/config.json", '"block_out_channels": [', '"block_out_channels": ["a", '),
        ("wav2vec2/config.json", '"num_attention_heads": ', '"num_attention_heads": 7'),
        ("emotion2vec/config.yaml", "embed_dim: ", "embed_dim: many"),
    ],
)
def test_settings_of_which_no_network_can_be_built_name_their_files(
    folder: Path, file: str, old: str, new: str
) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=file.split("/")[0]):
        checkpoint.load(folder)


def test_settings_that_are_not_implemented_are_refused(folder: Path) -> None:
    change_config(folder, "reference_net", act_fn="gelu")
    with pytest.raises(CheckpointError, match="act_fn = 'gelu' is not supported"):
        checkpoint.load(folder)


def test_the_old_names_of_the_vae_load(folder: Path) -> None:
    """Stable Diffusion's VAE names its attention's layers as diffusers once did, and keeps them as 1x1 convolutions."""
    digest = checkpoint.load(folder).digest

    def change(weights: dict[str, Tensor]) -> None:
        for new, old in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            for name in [name for name in weights if ".mid_block.attentions." in name and new in name]:
                tensor = weights.pop(name)
                weights[name.replace(new, old)] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor

    change_weights(folder, "vae", change)
    assert any(".query." in name for name in load_file(folder / "vae" / WEIGHTS))
    assert checkpoint.load(folder).digest == digest


def test_digest_names_the_weights_and_not_the_precision_they_run_in(folder: Path) -> None:
    digest = checkpoint.load(folder).digest
    assert checkpoint.load(folder, dtype=torch.bfloat16).digest == digest
    assert checkpoint.load(folder.rename(folder.parent / "elsewhere")).digest == digest


@pytest.mark.parametrize("net", ["reference_net", "diffusion_net", "image_proj", "audio_proj", "vae"])
def test_digest_differs_when_a_network_does(folder: Path, memo_tiny: Path, net: str) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        name = next(iter(sorted(weights)))
        weights[name] = weights[name] * 1.01

    change_weights(folder, net, change)
    assert checkpoint.load(folder).digest != checkpoint.load(memo_tiny).digest


def test_weights_digest() -> None:
    weights = {"a": torch.arange(100.0), "b": torch.ones(2, 3)}
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    halves = {name: tensor.half() for name, tensor in weights.items()}  # which hold these numbers exactly
    assert weights_digest(halves) == digest
    changes = [{"a": torch.arange(100.0) + 1}, {"b": torch.ones(3, 2)}, {"c": torch.ones(1)}]
    assert len({digest, *(weights_digest(weights | change) for change in changes)}) == 4
    assert weights_digest({"a": weights["a"], "c": weights["b"]}) != digest


def test_saved_networks_load_again(folder: Path, memo_tiny: Path) -> None:
    net = checkpoint.load(memo_tiny).audio_proj
    save_module(folder / "audio_proj", net, {"_class_name": "AudioProjModel"}, dtype=torch.float32)
    assert checkpoint.load(folder).digest == checkpoint.load(memo_tiny).digest
    save_module(folder / "audio_proj", net, {"_class_name": "AudioProjModel"})
    stored = load_file(folder / "audio_proj" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = checkpoint.load(folder).audio_proj
    for mine, wanted in zip(loaded.parameters(), net.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, wanted.half().float())
    assert read_json(folder / "audio_proj" / "config.json") == {"_class_name": "AudioProjModel"}


def test_a_host_may_bring_its_own_layers(memo_tiny: Path) -> None:
    class Ops(nn.Module):
        class Linear(nn.Linear):
            pass

        Conv2d, GroupNorm, LayerNorm, Embedding = nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding

    nets = checkpoint.load(memo_tiny, ops=Ops)
    for net in (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj):
        linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
        assert linear and all(isinstance(part, Ops.Linear) for part in linear)


def test_filling_a_module_on_the_meta_device_takes_the_tensors_over() -> None:
    with torch.device("meta"):
        module = AudioProjection(8, 4, 2, 3)
    weights = {name: torch.ones(tensor.shape, dtype=torch.float16) for name, tensor in module.state_dict().items()}
    load_strict(module, weights, "here")
    assert module.proj1.weight.data_ptr() == weights["proj1.weight"].data_ptr()
    elsewhere = AudioProjection(8, 4, 2, 3)
    load_strict(elsewhere, weights, "here")
    assert elsewhere.proj1.weight.dtype == torch.float32 and elsewhere.proj1.weight.eq(1).all()


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "absent.safetensors")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_json(tmp_path / "list.json")
    with pytest.raises(CheckpointError, match="absent.json cannot be read"):
        read_json(tmp_path / "absent.json")
