"""Finding, loading and saving checkpoints: strict, and clear about what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memo_core import MemoPipeline
from memo_core.checkpoint import layout
from memo_core.checkpoint.digest import base_digest, weights_digest
from memo_core.checkpoint.layout import find
from memo_core.checkpoint.load import load
from memo_core.checkpoint.save import save_module
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
    nets = load(memo_tiny, dtype=torch.bfloat16)
    for net in (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae):
        if net is not nets.vae:  # of which a part stays in float32 (tests/test_precision.py)
            assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
        assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
        assert not any(tensor.is_meta for tensor in net.state_dict().values())
    for net in (nets.speech_encoder, nets.emotion_encoder, nets.emotion_head):
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32} and not net.training
    assert nets.sample_size == 16 and nets.folder == memo_tiny and not nets.embedded


def test_sizes_that_no_config_names_come_from_the_tensors(memo_tiny: Path) -> None:
    nets = load(memo_tiny)
    assert nets.audio_proj.proj1.in_features == 5 * 2 * 32 and nets.audio_proj.tokens == 4
    assert nets.image_proj.proj.in_features == 512
    assert "proj1" not in (memo_tiny / "audio_proj" / "config.json").read_text()


@pytest.mark.parametrize("name", ["doll", "/absent/folder", "toon2"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at '{name}'.* one of toon"):
        load(name)


def test_embedded_checkpoints_are_found_by_name(
    memo_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(memo_tiny, tmp_path / "toon")
    monkeypatch.setattr(layout, "assets", lambda: tmp_path)
    assert find("toon") == tmp_path / "toon"
    assert load("toon").embedded and load(tmp_path / "toon").embedded


def test_missing_files_are_listed(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "emotion2vec" / "config.yaml").unlink()
    shutil.rmtree(folder / "image_proj")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
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
        load(folder)
    lines = str(caught.value).splitlines()
    assert net in lines[0] and len(lines) == 1 + 10 + 1 and lines[-1].strip() == "and 4 more"
    assert f"missing {key}" in lines[1]
    assert any(f"{bias} has shape (7,), expected" in line for line in lines)
    assert any("unexpected strange.00" in line for line in lines) and not any("strange.11" in line for line in lines)


@pytest.mark.parametrize("net", ["image_proj", "audio_proj"])
def test_projections_without_sizes_are_refused(folder: Path, net: str) -> None:
    change_weights(folder, net, lambda weights: weights.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=f"{net}.*lacks 'norm.weight'"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 10, None], ids=["empty", "nonsense", "truncated"])
def test_damaged_weights_are_named(folder: Path, content: bytes | None) -> None:
    path = folder / "reference_net" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"block_out_channels": 3}'])
def test_damaged_configurations_are_named(folder: Path, content: str) -> None:
    (folder / "diffusion_net" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="diffusion_net/config.json"):
        load(folder)


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
        load(folder)


def test_settings_that_are_not_implemented_are_refused(folder: Path) -> None:
    change_config(folder, "reference_net", act_fn="gelu")
    with pytest.raises(CheckpointError, match="act_fn = 'gelu' is not supported"):
        load(folder)


def test_the_old_names_of_the_vae_load(folder: Path) -> None:
    """Stable Diffusion's VAE names its attention's layers as diffusers once did, and keeps them as 1x1 convolutions."""
    digest = load(folder).digest

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
    assert load(folder).digest == digest


def test_digest_names_the_weights_and_not_the_precision_they_run_in(folder: Path) -> None:
    digest = load(folder).digest
    assert load(folder, dtype=torch.bfloat16).digest == digest
    assert load(folder.rename(folder.parent / "elsewhere")).digest == digest


@pytest.mark.parametrize("net", ["reference_net", "diffusion_net", "image_proj", "audio_proj", "vae"])
def test_digest_differs_when_a_network_does(folder: Path, pipe: MemoPipeline, net: str) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        name = next(iter(sorted(weights)))
        weights[name] = weights[name] * 1.01

    change_weights(folder, net, change)
    assert load(folder).digest != pipe.nets.digest


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
    net = load(memo_tiny).audio_proj
    save_module(folder / "audio_proj", net, {"_class_name": "AudioProjModel"}, dtype=torch.float32)
    assert load(folder).digest == load(memo_tiny).digest
    save_module(folder / "audio_proj", net, {"_class_name": "AudioProjModel"})
    stored = load_file(folder / "audio_proj" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load(folder).audio_proj
    for mine, wanted in zip(loaded.parameters(), net.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, wanted.half().float())
    assert read_json(folder / "audio_proj" / "config.json") == {"_class_name": "AudioProjModel"}


def test_a_host_may_bring_its_own_layers(memo_tiny: Path) -> None:
    class Ops(nn.Module):
        class Linear(nn.Linear):
            pass

        Conv2d, GroupNorm, LayerNorm, Embedding = nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding

    nets = load(memo_tiny, ops=Ops)
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


HUGE = 10**9
WRONG = [
    ("diffusion_net/config.json", "layers_per_block", HUGE),
    ("diffusion_net/config.json", "layers_per_block", 60_000),
    ("diffusion_net/config.json", "layers_per_block", True),
    ("diffusion_net/config.json", "block_out_channels", [32] * 10_000),
    ("diffusion_net/config.json", "block_out_channels", [32, 32, 64, "64"]),
    ("diffusion_net/config.json", "block_out_channels", [32, 32, 64, 10**400]),
    ("diffusion_net/config.json", "attention_head_dim", 0),
    ("diffusion_net/config.json", "attention_head_dim", 7),
    ("diffusion_net/config.json", "norm_eps", "1e-5"),
    ("diffusion_net/config.json", "norm_eps", float("nan")),
    ("diffusion_net/config.json", "sample_size", [64, 64]),
    ("diffusion_net/config.json", "sample_size", 1e400),
    ("diffusion_net/config.json", "motion_module_kwargs", ["x"]),
    ("diffusion_net/config.json", "motion_module_kwargs", {"num_transformer_block": HUGE}),
    ("diffusion_net/config.json", "motion_module_kwargs", {"num_transformer_block": 60_000}),
    ("diffusion_net/config.json", "motion_module_resolutions", 3),
    ("diffusion_net/config.json", "down_block_types", [1, 2, 3, 4]),
    ("reference_net/config.json", "in_channels", 5),
    ("vae/config.json", "layers_per_block", HUGE),
    ("vae/config.json", "layers_per_block", 60_000),
    ("vae/config.json", "scaling_factor", 0),
    ("vae/config.json", "scaling_factor", "x"),
    ("vae/config.json", "act_fn", {}),
    ("wav2vec2/config.json", "num_hidden_layers", HUGE),
    ("wav2vec2/config.json", "num_hidden_layers", 60_000),
    ("wav2vec2/config.json", "hidden_size", 60_000),
    ("wav2vec2/config.json", "layerdrop", "x"),
    ("wav2vec2/config.json", "conv_stride", [60_000] * 7),
    ("wav2vec2/config.json", "num_attention_heads", 0),
    ("wav2vec2/config.json", "hidden_act", "no such"),
    ("wav2vec2/preprocessor_config.json", "do_normalize", "yes"),
    ("emotion2vec/config.yaml", "depth", HUGE),
    ("emotion2vec/config.yaml", "depth", 60_000),
    ("emotion2vec/config.yaml", "embed_dim", 60_000),
    ("emotion2vec/config.yaml", "num_heads", 3),
    ("emotion2vec/config.yaml", "mlp_ratio", "x"),
    ("emotion2vec/config.yaml", "modalities", ["audio"]),
    ("emotion2vec/config.yaml", "modalities", {"audio": {"feature_encoder_spec": "[(1,1,1)]" + "*100" * 9}}),
    ("emotion2vec/config.yaml", "modalities", {"audio": {"feature_encoder_spec": "[(1,1,60000)]*9"}}),
]


@pytest.fixture(scope="module")
def quick(memo_tiny: Path) -> Callable[[Path, str], object]:
    """Reads one file's settings as a load does, without the files before it."""
    from memo_core.encoders.emotion2vec import Emotion2Vec
    from memo_core.encoders.speech import SpeechEncoder

    def read(folder: Path, name: str) -> object:
        part = name.partition("/")[0]
        if part in ("wav2vec2", "emotion2vec"):
            return (SpeechEncoder if part == "wav2vec2" else Emotion2Vec).from_pretrained(folder / part)
        return load(folder)

    return read


@pytest.mark.parametrize("name, setting, value", WRONG, ids=[f"{n} {s} {str(v)[:20]}" for n, s, v in WRONG])
def test_a_wrong_setting_is_refused_before_anything_is_built(
    folder: Path, quick: Callable, name: str, setting: str, value: object
) -> None:
    path = folder / name
    settings = yaml.safe_load(path.read_text())
    (settings["model_conf"] if path.suffix == ".yaml" else settings)[setting] = value
    path.unlink()
    path.write_text(yaml.safe_dump(settings) if path.suffix == ".yaml" else json.dumps(settings))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            quick(folder, name)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000


DEEP = "[" * 100_000 + "]" * 100_000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))


@pytest.mark.parametrize("name", ["diffusion_net/config.json", "wav2vec2/config.json", "emotion2vec/config.yaml"])
@pytest.mark.parametrize(
    "content",
    [DEEP, '{"a": ' * 100_000 + "1" + "}" * 100_000, '{"model_conf": ' + "[" * 900 + "]" * 900 + "}", "9" * 5000]
    + [LAUGHS + "model_conf: {}", MERGES + "model_conf: {}", "model_conf: &a [*a]", "model_conf: {a: 2001-99-99}"]
    + [" " * 2**20 + "{}", "\xff", "", "!!python/object/apply:os.system [true]"],
    ids=range(12),
)
def test_settings_that_are_bombs_are_refused(folder: Path, quick: Callable, name: str, content: str) -> None:
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name.partition("/")[0]):
        quick(folder, name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for read in (read_json, read_tensors):
        for path in (tmp_path / "config.json", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
            with pytest.raises(CheckpointError):
                read(path)
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")
    with pytest.raises(CheckpointError, match="vae/config.json"):
        load(folder)


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "x" * 5000, 3, None, ["toon"], b"toon", "\udcff"])
def test_what_is_no_checkpoint_is_named(path: object) -> None:
    for call in (find, load, base_digest):
        with pytest.raises(CheckpointError):
            call(path)


@pytest.mark.parametrize(
    "wrong",
    [{"device": "x"}, {"device": None, "dtype": 3}, {"dtype": "float32"}, {"dtype": torch.int8}, {"lora": [3]}]
    + [{"lora": [("a", "b")]}, {"lora": [("a", True)]}, {"options": {"compile": True}}],
    ids=str,
)
def test_wrong_arguments_are_named(memo_tiny: Path, wrong: dict) -> None:
    with pytest.raises(CheckpointError, match="received"):
        load(memo_tiny, **wrong)


def test_torch_files_that_hold_more_than_they_weigh_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1).expand(10**5, 10**5)}, path)
    with pytest.raises(CheckpointError, match="as large as the file"):
        read_tensors(path)
    torch.save({"a": torch.zeros(10, 10)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part, old.read(part).ljust(2**20, b"\0"), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="are in it"):
        read_tensors(tmp_path / "packed.pt")
    for odd in ({3: torch.zeros(1)}, {"a": torch.zeros(2, device="meta")}, {"a": torch.zeros(3, 3).to_sparse()}):
        torch.save(odd, path)
        with pytest.raises(CheckpointError):
            read_tensors(path)


def test_weights_of_whole_numbers_are_refused(folder: Path) -> None:
    change_weights(
        folder, "audio_proj", lambda weights: weights.update({"norm.weight": torch.ones(32).to(torch.int32)})
    )
    with pytest.raises(CheckpointError, match="norm.weight holds torch.int32"):
        load(folder)


def test_files_are_written_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_module(tmp_path / "net", torch.nn.Linear(2, 2), {})
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "net").iterdir()}
    assert found == {"config.json": 0o644, WEIGHTS: 0o644}


def test_what_a_trainer_keeps_beside_the_weights_is_no_fault(tmp_path: Path) -> None:
    """Optimisers number their states; only tensors need names."""
    stored = {"model": {"a": torch.zeros(2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, 7: "x"}
    torch.save(stored, tmp_path / "model.pt")
    assert set(read_tensors(tmp_path / "model.pt")) == {"model", "optimizer"}
    torch.save({"model": {0: torch.zeros(2)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="a tensor under 0"):
        read_tensors(tmp_path / "model.pt")
