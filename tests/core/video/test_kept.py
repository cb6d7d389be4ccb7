"""Frames that sampling has decoded are not decoded again, and keeping them costs nothing that is missed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memo_core import AudioTrack, MemoPipeline, Reference
from memo_core.video import kept as module
from memo_core.video.kept import KeptFrames


def test_a_clip_is_decoded_once_and_shows_the_same_frames(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipe.job(small, track, num_frames=40, steps=1, guidance_scale=1)
    clip, _ = pipe.collect(job, pipe.sample_windows(job), KeptFrames(tmp_path))
    plain, _ = pipe.collect(job, pipe.sample_windows(job))
    wanted = list(plain.frames())
    decoded: list[int] = []
    decode = pipe.nets.vae.decode
    monkeypatch.setattr(pipe.nets.vae, "decode", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    frames = list(clip.frames())
    assert not decoded and len(frames) == 40
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(frames, wanted))
    assert clip.to_tensor().shape == (40, 64, 64, 3) and decoded, "in full precision they are decoded"


def test_windows_come_back_in_any_order_and_again(tmp_path: Path) -> None:
    kept, windows = KeptFrames(tmp_path), np.random.default_rng(0).integers(0, 256, (3, 16, 8, 8, 3), np.uint8)
    for number in (1, 0, 2):
        kept.put(number, windows[number][: 16 - number])
    for number in (2, 0, 1, 2):
        found = kept.get(number)
        assert found is not None and np.array_equal(found, windows[number][: 16 - number])
    assert kept.get(3) is None


@pytest.mark.skipif(os.name == "nt", reason="there the file has a name while it is open")
def test_nothing_lies_in_the_folder(tmp_path: Path) -> None:
    kept = KeptFrames(tmp_path)
    kept.put(0, np.zeros((16, 8, 8, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_without_room_or_a_folder_nothing_is_kept_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.zeros((16, 8, 8, 3), np.uint8)
    nowhere = KeptFrames(tmp_path / "absent")
    nowhere.put(0, frames)
    assert nowhere.get(0) is None
    monkeypatch.setattr(module, "LEAST_FREE", 2**62)
    full = KeptFrames(tmp_path)
    full.put(0, frames)
    assert full.get(0) is None
