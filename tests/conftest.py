"""Shared fixtures: the small checkpoint in the released layout and what the reference computes from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Tests run beside each other, each on one thread, and so do the processes that they start: for networks so small more
# threads take longer. Where a test wants more of them, they wait asleep. Read when numpy and torch are imported.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch

# What Triton does with kernels is settled when it is first imported, by one of the next lines: interpret them on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from common import FIXTURES, PROFILE
from hypothesis import settings
from safetensors.torch import load_file

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, Reference
from memo_core.budget import counting
from memo_core.budget.report import released
from memo_core.checkpoint.networks import Networks
from memo_core.sampling.renderer import Window

# An example's time says more about what else the machine does than about the code. `make test` chooses "fast".
settings.register_profile("full", deadline=None)
settings.register_profile("fast", deadline=None, max_examples=20)
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is marked with the folder it lies in."""
    for item in items:
        item.add_marker(item.path.relative_to(FIXTURES.parent).parts[0])


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds windows that another one left in the user's cache."""
    monkeypatch.setenv("MEMO_STORE", str(tmp_path_factory.mktemp("windows")))


@pytest.fixture(scope="session")
def counted() -> dict[tuple[Any, ...], Any]:
    """What `counted_once` keeps."""
    return {}


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch, counted: dict[tuple[Any, ...], Any]) -> None:
    """What sampling needs is counted for the first pipeline of a checkpoint: it takes longer than a short video."""
    count = counting._count

    def once(nets: Networks, *how: Any) -> Any:
        key = nets.folder, nets.diffusion_net.conv_in.weight.dtype, *how
        if key not in counted:
            counted[key] = count(nets, *how)
        return counted[key]

    monkeypatch.setattr(counting, "_count", once)


@pytest.fixture(scope="session")
def released_nets() -> Networks:
    """The networks that sample at the released size, in bfloat16, without data."""
    return released()


@pytest.fixture(scope="session")
def memo_tiny() -> Path:
    """Folder of a complete small checkpoint in the released layout, random weights."""
    return FIXTURES / "memo_tiny"


@pytest.fixture(scope="session")
def expected(memo_tiny: Path) -> dict[str, torch.Tensor]:
    """What the reference implementation computes from `memo_tiny`, by name."""
    return load_file(memo_tiny / "expected.safetensors")


@pytest.fixture(scope="session")
def pipe(memo_tiny: Path) -> MemoPipeline:
    """The small checkpoint, loaded in fp32 on the CPU."""
    return MemoPipeline.from_pretrained(memo_tiny)


@pytest.fixture(scope="session")
def reference(pipe: MemoPipeline, expected: dict[str, torch.Tensor]) -> Reference:
    """The fixture's portrait, 128 x 128."""
    return pipe.encode_reference(expected["in.reference_image"][0], expected["in.face_embedding"])


@pytest.fixture(scope="session")
def small(pipe: MemoPipeline, expected: dict[str, torch.Tensor]) -> Reference:
    """A 64 x 64 piece of it, for tests that need many windows.

    So small, the random weights' deepest group norms see two numbers each and amplify rounding a hundredfold: compare
    bits.
    """
    return pipe.encode_reference(expected["in.reference_image"][0, :, 32:96, 32:96], expected["in.face_embedding"])


@pytest.fixture(scope="session")
def track(pipe: MemoPipeline, expected: dict[str, torch.Tensor]) -> AudioTrack:
    """The fixture's voice: 69 frames, 80 when padded to whole windows."""
    return pipe.encode_audio(expected["in.waveform"], 16000)


@pytest.fixture(scope="session")
def chain(
    pipe: MemoPipeline,
    reference: Reference,
    track: AudioTrack,
    emotions: EmotionTrack,
    expected: dict[str, torch.Tensor],
) -> list[Window]:
    """The three windows of four steps that the reference implementation sampled, sampled here."""
    noise = torch.cat([expected[f"clip{i}.noise"] for i in range(3)])
    return list(pipe.sample_windows(pipe.job(reference, track, emotions, num_frames=48, steps=4, noise=noise)))


@pytest.fixture(scope="session")
def emotions(pipe: MemoPipeline, expected: dict[str, torch.Tensor], track: AudioTrack) -> EmotionTrack:
    """What is heard in it: disgust, then fear."""
    return pipe.detect_emotion(expected["in.waveform"], 16000, track.num_padded_frames)
