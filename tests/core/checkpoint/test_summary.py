"""What is told of files without torch equals what is told with it."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memo_core import MemoryState
from memo_core.checkpoint import lora
from memo_core.checkpoint.digest import stored_weights, weights_digest
from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.checkpoint.load import load
from memo_core.checkpoint.summary import summarise
from memo_core.errors import CheckpointError, MemoryStateError
from memo_core.memory import file as memory
from memo_core.nets.reading import Listed, list_weights
from memo_core.nets.weights import WEIGHTS, read_tensors
from memo_core.tensorfile import float32, is_finite, open_arrays

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def special(dtype: torch.dtype) -> torch.Tensor:
    """The ends of a number format, zeros of both signs, its smallest numbers, infinities and NaN."""
    if not dtype.is_floating_point:
        return torch.tensor([0, 1, 100]).to(dtype)
    info = torch.finfo(dtype)
    ends = [info.max, -info.max, info.tiny, info.tiny / 4, -0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1 / 3]
    return torch.tensor(ends, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE], ids=str)
def test_arrays_have_the_values_and_digest_of_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "special": special(dtype),
        "long": torch.randn(1000).mul(50).to(dtype),
        "odd": torch.randn(3, 5, 7).mul(50).to(dtype),
        "one": torch.randn(()).to(dtype),
        "none": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"said": "so"})
    with open_arrays(tmp_path / "a.safetensors") as file:
        assert file.metadata() == {"said": "so"} and sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            array = file.get_tensor(name)
            assert array.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(float32(array), tensor.float().numpy())
            if tensor.is_floating_point():
                assert is_finite(array) == is_finite(tensor)
    listed = list_weights(tmp_path / "a.safetensors")
    assert listed is not None
    for weights in (listed, tensors):  # torch itself has more than one way to convert NaN
        weights["special"] = weights["special"][:8]
    assert weights_digest(listed) == weights_digest(tensors)


def test_numbers_of_eight_bits_are_read_with_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert list_weights(tmp_path / "a.safetensors") is None
    stored = stored_weights(tmp_path / "a.safetensors")
    assert weights_digest(stored) == weights_digest({"a": torch.ones(64)})


def test_a_checkpoint_in_short_is_the_checkpoint(memo_tiny: Path) -> None:
    summary, nets = summarise(memo_tiny), load(memo_tiny)
    assert (summary.folder, summary.digest, summary.sample_size) == (nets.folder, nets.digest, nets.sample_size)
    modules = {
        "reference_net": nets.reference_net,
        "diffusion_net": nets.diffusion_net,
        "image_proj": nets.image_proj,
        "audio_proj": nets.audio_proj,
        "vae": nets.vae,
        "wav2vec2": nets.speech_encoder,
        "emotion2vec": nets.emotion_encoder,
        EMOTION_HEAD: nets.emotion_head,
    }
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert list(summary.parameters.items()) == list(counted.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_torch_files_are_listed_by_shape_or_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    stored = {"model": {"a": torch.ones(3, 4), "b": torch.ones(5).half()}, "c": torch.ones(())}
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    assert (list_weights(path) is None) is not zipped
    found = stored_weights(path)
    assert [found["model"]["a"].shape, found["model"]["b"].shape, found["c"].shape] == [(3, 4), (5,), ()]
    assert isinstance(found["c"], Listed) is zipped


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('ran', 'w')",)


@pytest.mark.parametrize(
    "content", [{"a": Runs()}, [torch.ones(1)], {1: torch.ones(1)}], ids=["code", "list", "number"]
)
def test_what_is_no_dictionary_of_tensors_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "model.pt")
    assert list_weights(tmp_path / "model.pt") is None
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "model.pt")
    assert not Path("ran").exists()


def test_what_can_be_told_of_files_is_refused(memo_tiny: Path, tmp_path: Path) -> None:
    def changed(name: str, content: bytes) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(memo_tiny, folder)
        (folder / name).write_bytes(content)
        return folder

    weights = (memo_tiny / "vae" / WEIGHTS).read_bytes()
    config = json.loads((memo_tiny / "diffusion_net" / "config.json").read_text())
    for name, content in (
        (f"vae/{WEIGHTS}", weights[:-1]),
        (f"audio_proj/{WEIGHTS}", b"none of it is such a file"),
        ("diffusion_net/config.json", json.dumps(config | {"act_fn": "tanh"}).encode()),
        ("diffusion_net/config.json", json.dumps(config | {"layers_per_block": 9000}).encode()),
        ("wav2vec2/config.json", b"{}"),
        ("emotion2vec/model.pt", b"none"),
        ("emotion2vec/config.yaml", b"model_conf: {layer_norm_first: true}"),
        (f"{EMOTION_HEAD}/{WEIGHTS}", weights),
    ):
        folder = changed(name, content)
        said = []
        for read in (summarise, load):
            with pytest.raises(CheckpointError) as caught:
                read(folder)
            said.append(str(caught.value))
        assert said[0] == said[1], name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_adapter_is_described_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    modules = {
        f"diffusion_net.a.{i}": lora.Factors(torch.randn(2 + i, 8), torch.randn(6, 2 + i), i + 0.5) for i in (0, 1)
    }
    modules["audio_proj.b"] = lora.Factors(torch.randn(2, 5, 1, 1), torch.randn(3, 2, 1, 1), 1.0)
    path = tmp_path / "adapter.safetensors"
    lora.Adapter(modules=modules, base="b" * 16, targets=("audio",), settings="lr: 1").save(path, dtype)
    assert lora.describe(path) == lora.read(path).describe()
    path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)  # NaN in every format
    for read in (lora.describe, lora.read):
        with pytest.raises(CheckpointError, match="NaN"):
            read(path)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_a_memory_is_described_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state, path = MemoryState.empty(horizon=4), tmp_path / "state.safetensors"
    for _ in range(3):
        state = state.push(torch.randn(16, 4, 8, 16).to(dtype), torch.randn(1, 512), "model", "reference")
    state = state.decayed(0.1)
    state.save(path)
    assert memory.describe(path) == MemoryState.load(path).inspect() == state.inspect()
    path.write_bytes(path.read_bytes()[:-1] + b"\x3f")
    said = []
    for read in (memory.describe, MemoryState.load):
        with pytest.raises(MemoryStateError, match="damaged") as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r" + (2**32 - 1).to_bytes(4, "little") + b".",  # a memo of four thousand million places
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(" + b"\x8a\x05\xff\xff\xff\xff\x7f" * 100_000 + b"tNNNtR.",
    ],
    ids=["memo", "sides"],
)
def test_a_torch_file_that_asks_for_everything_gets_nothing(tmp_path: Path, pickled: bytes) -> None:
    """In the time and the memory of its own size."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as parts:
        parts.writestr("model/data.pkl", pickled)
    tracemalloc.start()
    began = time.process_time()
    found = list_weights(tmp_path / "model.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not found and time.process_time() - began < 20 and peak < 2**27
