"""SyncNet: the published file format, its features of sound, and finding the shift between two tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memo_core.errors import CheckpointError
from training.syncnet import SyncNet, best_shift, face_region, mfcc


@pytest.fixture(scope="module")
def net() -> SyncNet:
    return SyncNet.random(0)


@pytest.mark.parametrize("late", [-7, 0, 4])
def test_a_known_shift_is_found(late: int) -> None:
    """The picture shows at frame i what was heard at frame i - late."""
    generator = torch.Generator().manual_seed(0)
    track = torch.randn(140, 64, generator=generator)
    video, sound = track[20 - late : 120 - late], track[20:120] + 0.1 * torch.randn(100, 64, generator=generator)
    score = best_shift(video, sound)
    assert score.offset == late
    # Independent normal features lie sqrt(2 * 64) apart, those that belong together 0.1 * 8; shifts beyond the ends of
    # the sound compare with zeros, sqrt(64) away.
    rest = abs(late) / 100
    assert score.distance == pytest.approx((1 - rest) * 0.8 + rest * 8, rel=0.03)
    assert score.confidence + score.distance == pytest.approx(11.3, abs=0.6)


def test_tracks_that_share_nothing_have_little_confidence() -> None:
    video, sound = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(1))
    assert best_shift(video, sound).confidence < 1


def test_mfcc_equals_python_speech_features() -> None:
    """Values of python_speech_features 0.6, mfcc(int16, 16000), for 0.1 s of 440 Hz at half scale."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / 16000)
    found = mfcc(tone)
    assert found.shape == (9, 13)
    first = [20.49483, 18.80814, 1.70897, -14.18287, -27.18832, -33.53491, -29.67512, -18.55711, -3.28148]
    last = [20.26216, 22.15896, 5.72364, -10.05302, -22.96953, -29.22886, -25.39385, -14.75542, -0.45904]
    np.testing.assert_allclose(found[0, :9], first, atol=1e-4)
    np.testing.assert_allclose(found[-1, :9], last, atol=1e-4)
    assert np.isfinite(mfcc(np.zeros(16000))).all()


def test_frames_in_one_run_equal_single_windows(net: SyncNet) -> None:
    """What the published code computes: each window of five BGR frames for itself."""
    faces = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    windows = torch.stack([faces[i : i + 5] for i in range(4)]).flip(2).transpose(1, 2).float()
    expected = net.netfclip(net.netcnnlip(windows).flatten(1))
    torch.testing.assert_close(net.embed_faces(faces), expected, atol=1e-5, rtol=1e-4)


def test_score_of_faces_and_a_voice(net: SyncNet) -> None:
    faces = torch.zeros(9, 3, 224, 224, dtype=torch.uint8)
    video, sound = net.features(faces, torch.rand(16000, generator=torch.Generator().manual_seed(3)) - 0.5)
    assert video.shape == sound.shape == (4, 1024)
    score = net.score(faces, torch.zeros(16000))
    assert abs(score.offset) <= 15 and np.isfinite(score[1:]).all()


@pytest.mark.parametrize(
    ("faces", "sound", "words"),
    [
        (torch.zeros(5, 3, 224, 224, dtype=torch.uint8), torch.zeros(16000), "at least 6"),
        (torch.zeros(9, 3, 224, 224, dtype=torch.uint8), torch.zeros(3000), "at least 6"),
        (torch.zeros(9, 3, 96, 96, dtype=torch.uint8), torch.zeros(16000), "224"),
        (torch.zeros(9, 3, 224, 224), torch.zeros(16000), "uint8"),
        (torch.zeros(9, 3, 224, 224, dtype=torch.uint8), torch.full((16000,), torch.nan), "finite"),
        (torch.zeros(9, 3, 224, 224, dtype=torch.uint8), torch.zeros(2, 16000), r"\[T\]"),
    ],
    ids=["few frames", "short sound", "size", "type", "nan", "stereo"],
)
def test_what_cannot_be_scored_is_refused(net: SyncNet, faces: torch.Tensor, sound: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        net.score(faces, sound)


def test_the_published_file_is_read(net: SyncNet, tmp_path: Path) -> None:
    """A dictionary of tensors; old files do not count batches."""
    path = tmp_path / "syncnet_v2.model"
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    loaded = SyncNet.load(path)
    for name, value in state.items():
        assert torch.equal(loaded.state_dict()[name], value)

    torch.save(state | {"netfclip.3.weight": torch.zeros(512, 512)}, path)
    with pytest.raises(CheckpointError, match="netfclip.3.weight"):
        SyncNet.load(path)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "syncnet_v2.model"
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match="convert it once"):
        SyncNet.load(path)
    with pytest.raises(CheckpointError, match="robots.ox.ac.uk"):
        SyncNet.load(tmp_path / "absent.model")


def test_the_region_around_a_face() -> None:
    """As the published pipeline cuts it: 2.8 half boxes wide and high, the chin well inside."""
    assert face_region((100, 100, 180, 200)) == (70, 100, 210, 240)
