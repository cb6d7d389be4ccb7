"""What commands and the pipeline import: those that only read answer at once, those that compute load torch alone.

Each is run in a process of its own, which lists the packages that are in memory when it is done.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT
from PIL import Image

from memo_core import MemoryState
from memo_core.checkpoint.lora import Adapter, Factors
from memo_core.video.read import probe
from memo_core.video.write import VideoWriter

READ = {"numpy", "safetensors"}
# What no video needs, though it may be installed.
LARGE = {"accelerate", "diffusers", "huggingface_hub", "librosa", "matplotlib", "numba", "onnxruntime", "pandas"}
LARGE |= {"peft", "scipy", "sklearn", "soundfile", "tokenizers", "transformers"}
# Parts of torch that take seconds, which nothing here needs before something is compiled.
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.onnx")
PROGRAM = """
import sys
if {torch}:
    import torch
before = set(sys.modules)
code = 0
{body}
new = set(sys.modules) - before
tops = {{name.partition(".")[0] for name in new}} - sys.stdlib_module_names - {{"cffi", "cython_runtime"}}
names = sorted(name for name in tops if not name.startswith("_"))
print(code, names, sorted(new & set({heavy})))
"""
COMMAND = "from memo_core.cli import main; code = main({argv!r})"


def imported(body: str, folder: Path, after_torch: bool = False) -> tuple[set[str], list[str]]:
    """Third-party packages in memory after the statements, and those of HEAVY; with `after_torch`, without torch's."""
    program = PROGRAM.format(torch=after_torch, body=body, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){program}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    code, _, names = done.stdout.splitlines()[-1].partition(" ")
    assert code == "0", done.stdout + done.stderr
    packages, heavy = ast.literal_eval(names.replace("] [", "], ["))
    return set(packages), heavy


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, an adapter, memory states, a face and a voice at 44.1 kHz."""
    folder = tmp_path_factory.mktemp("imports")
    with VideoWriter(folder / "video.mp4", 64, 64, 30) as writer:
        writer.write_frames(np.zeros((3, 64, 64, 3), np.uint8))
    modules = {"diffusion_net.conv": Factors(torch.ones(2, 4), torch.ones(3, 2), 1.0)}
    Adapter(modules=modules).save(folder / "lora.safetensors", torch.bfloat16)
    state = MemoryState.empty().push(torch.ones(16, 4, 8, 8), torch.ones(1, 512), "m", "r")
    state.save(folder / "state.safetensors")
    Image.new("RGB", (80, 80), "teal").save(folder / "face.png")
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes((10000 * np.sin(np.arange(30000) / 30)).astype("<i2").tobytes())
    return folder


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ("import memo_core", {"memo_core"}),
        ("import memo_core.cli", {"memo_core"}),
        (COMMAND.format(argv=["--help"]), {"memo_core"}),
        (COMMAND.format(argv=["download", "--help"]), {"memo_core"}),
        (COMMAND.format(argv=["info", "toon"]), {"memo_core", *READ, "yaml"}),
        (COMMAND.format(argv=["info", "lora.safetensors"]), {"memo_core", *READ}),
        (COMMAND.format(argv=["info", "state.safetensors"]), {"memo_core", *READ}),
        (COMMAND.format(argv=["sheet", "video.mp4"]), {"memo_core", "numpy", "PIL", "av"}),
    ],
    ids=["package", "cli", "help", "download", "checkpoint", "adapter", "memory", "sheet"],
)
def test_what_only_reads_does_without_torch(here: Path, body: str, allowed: set[str]) -> None:
    packages, heavy = imported(body, here)
    assert packages <= allowed and not heavy


def test_packages_are_docstrings() -> None:
    """Of what they hold nothing is imported with them; `memo_core.kernels` chooses between its modules."""
    inits = [path for path in (ROOT / "memo_core").glob("*/**/__init__.py") if "kernels" not in path.parts]
    for path in (path for path in inits if path.parent.name not in ("cli", "assets")):
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) <= 1, path


def test_a_video_takes_torch_and_none_of_the_large_libraries(here: Path, memo_tiny: Path) -> None:
    argv = ["generate", "face.png", "voice.wav", "--checkpoint", str(memo_tiny), "--steps", "1", "--duration", "0.1"]
    argv += ["--device", "cpu", "--no-store"]
    packages, heavy = imported(COMMAND.format(argv=argv), here, after_torch=True)
    assert not packages & LARGE and not heavy


BLOCKED = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers"):
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("checkpoint", ["toon", "memo_tiny"])
def test_a_video_is_made_where_neither_diffusers_nor_transformers_is_installed(
    here: Path, memo_tiny: Path, checkpoint: str
) -> None:
    path = "toon" if checkpoint == "toon" else str(memo_tiny)
    argv = ["generate", "face.png", "voice.wav", "-o", f"{checkpoint}.mp4", "--checkpoint", path, "--steps", "1"]
    argv += ["--size", "64", "--duration", "0.1", "--device", "cpu", "--no-store"]
    imported(BLOCKED + COMMAND.format(argv=argv), here)
    assert probe(here / f"{checkpoint}.mp4").frames == 3


def test_what_trains_a_speech_encoder_says_that_it_needs_transformers(here: Path) -> None:
    body = """
from memo_core.encoders.speech import SpeechEncoder
from memo_core.errors import CheckpointError
try:
    SpeechEncoder.from_config({})
except CheckpointError as error:
    code = 0 if "comfyui-memo[training]" in str(error) else 1
else:
    code = 1
"""
    imported(BLOCKED + body, here)


def test_pipeline_and_one_step_take_torch_alone(here: Path, memo_tiny: Path) -> None:
    body = f"""
from memo_core import MemoPipeline
pipe = MemoPipeline.from_pretrained({str(memo_tiny)!r})
audio = pipe.encode_audio(torch.ones(2, 9000), 22050)
reference = pipe.encode_reference(torch.zeros(3, 64, 64))
pipe.sample_clip(reference, audio, steps=1, num_frames=2)[0].to_tensor()
"""
    packages, heavy = imported(body, here, after_torch=True)
    assert not packages & (LARGE | {"av", "tqdm"}) and not heavy
