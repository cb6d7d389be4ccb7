"""The store of finished windows: found again when nothing changed, and only then; never the cause of a failure."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ROOT, thinned
from safetensors.torch import save_file

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference, tensorfile
from memo_core.errors import MemoError
from memo_core.files import replace_whole
from memo_core.sampling import clip as sampling
from memo_core.sampling import store as store_module
from memo_core.sampling.settings import Settings
from memo_core.sampling.store import WindowStore
from memo_core.sampling.vae import encode_frames

KEY = "0123456789abcdef"
SHORT = dict(num_frames=40, steps=1, guidance_scale=1)


@pytest.fixture
def store(tmp_path: Path) -> WindowStore:
    return WindowStore(tmp_path / "windows")


def entry(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"latents": torch.randn(4, 16, 8, 8), "past": torch.randn(16, 4, 8, 8)}


def files(store: WindowStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()]


def sampled(pipe: MemoPipeline, store: WindowStore | None, *inputs, **settings) -> tuple[torch.Tensor, list[bool]]:
    windows = list(pipe.sample_windows(pipe.job(*inputs, **(SHORT | settings)), store=store))
    return torch.cat([window.latents for window in windows], dim=1), [window.stored for window in windows]


def test_what_is_kept_comes_back_bit_for_bit(store: WindowStore) -> None:
    store.put(KEY, entry())
    found = WindowStore(store.folder).get(KEY)
    assert found is not None and all(torch.equal(found[name], tensor) for name, tensor in entry().items())
    assert store.get("f" * 16) is None


def test_a_second_run_samples_nothing_and_gives_the_same_frames(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack, store: WindowStore
) -> None:
    first, stored = sampled(pipe, store, small, track, emotions)
    assert stored == [False] * 3
    again, stored = sampled(pipe, store, small, track, emotions)
    assert stored == [True] * 3 and torch.equal(again, first)
    assert torch.equal(sampled(pipe, None, small, track, emotions)[0], first)
    job = pipe.job(small, track, emotions, **SHORT)
    assert pipe.count_stored(job, store) == 3 and pipe.count_stored(job, None) == 0
    clip, memory = pipe.sample_clip(small, track, emotions, store=store, **SHORT)
    fresh, fresh_memory = pipe.sample_clip(small, track, emotions, **SHORT)
    assert memory.digest == fresh_memory.digest and torch.equal(clip.to_tensor(), fresh.to_tensor())


@pytest.mark.parametrize("dtype", thinned([torch.bfloat16, torch.float16], fast=[torch.bfloat16]), ids=str)
def test_in_half_precision_stored_windows_leave_the_memory_that_sampled_ones_do(
    memo_tiny: Path, small: Reference, track: AudioTrack, store: WindowStore, dtype: torch.dtype
) -> None:
    pipe = MemoPipeline.from_pretrained(memo_tiny, dtype=dtype)
    reference = pipe.encode_reference(small.pixels, small.face_embedding)
    clips = [pipe.sample_clip(reference, track, store=kept, **SHORT) for kept in (store, store, None)]
    (_, made), (_, found), (_, alone) = clips
    assert pipe.count_stored(pipe.job(reference, track, **SHORT), store) == 3
    assert made.digest == found.digest == alone.digest
    assert {entry.latents.dtype for entry in found.entries} == {dtype}


def test_a_longer_clip_takes_what_a_shorter_one_made(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore
) -> None:
    sampled(pipe, store, small, track, num_frames=32)
    assert sampled(pipe, store, small, track, num_frames=69)[1] == [True, True, False, False, False]


def test_one_clip_and_two_wired_ones_share_their_windows(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore
) -> None:
    whole, _ = sampled(pipe, store, small, track, num_frames=64)
    first, memory = pipe.sample_clip(small, track, store=store, num_frames=32, steps=1, guidance_scale=1)
    second, stored = sampled(pipe, store, small, track, None, memory, start=32, num_frames=32)
    assert stored == [True, True] and torch.equal(torch.cat([first.latents, second], dim=1), whole)


CHANGES = {
    "seed": dict(seed=7),
    "steps": dict(steps=2),
    "guidance": dict(guidance_scale=1.5),
    "noise": dict(noise=torch.zeros(3, 4, 16, 8, 8)),
    "start": dict(start=1),
}


@pytest.mark.parametrize("change", thinned(CHANGES, fast=("seed", "start")))
def test_other_settings_are_other_windows(
    change: str, pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore
) -> None:
    sampled(pipe, store, small, track)
    assert sampled(pipe, store, small, track, **CHANGES[change])[1] == [False] * 3


def test_another_face_voice_or_past_is_another_window(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore
) -> None:
    sampled(pipe, store, small, track)
    face = replace(small, face_embedding=small.face_embedding + 1)  # the same picture
    voice = replace(track, embeddings=track.embeddings + 1)
    assert sampled(pipe, store, face, track)[1] == sampled(pipe, store, small, voice)[1] == [False] * 3
    # A horizon matters once it is reached: in the third window, which remembers the portrait and two windows.
    assert sampled(pipe, store, small, track, None, MemoryState.empty(horizon=2))[1] == [True, True, False]


def test_only_windows_from_the_change_on_are_sampled_again(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack, store: WindowStore
) -> None:
    settings = dict(num_frames=64)
    sampled(pipe, store, small, track, emotions, **settings)
    sad = emotions.with_label(1.2, 2.0, "sad")  # frames 36 to 59: most of the third window and of the fourth
    assert sampled(pipe, store, small, track, sad, **settings)[1] == [True, True, False, False]
    embeddings = track.embeddings.clone()
    embeddings[50:] += 1
    voice = replace(track, embeddings=embeddings)
    assert sampled(pipe, store, small, voice, emotions, **settings)[1] == [True, True, True, False]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another file": lambda data: b"not a window" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_reported_once_and_made_anew(
    damage, store: WindowStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, entry())
    path = store.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert store.get(KEY) is None and store.get(KEY) is None
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    store.put(KEY, entry())
    assert store.get(KEY) is not None


def test_an_entry_that_is_no_window_is_not_there(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore
) -> None:
    """Whole, but with other names, shapes or values, for example of another version."""
    fresh, _ = sampled(pipe, store, small, track)
    path = sorted(files(store), key=lambda path: path.stat().st_mtime_ns)[0]
    good = store.get(path.stem)
    for bad in ({"other": good["past"]}, good | {"past": good["past"][1:]}, good | {"past": good["past"] * torch.nan}):
        store.put(path.stem, bad)
        assert pipe.count_stored(pipe.job(small, track, **SHORT), store) == 0
        latents, stored = sampled(pipe, store, small, track)
        assert stored == [False, True, True] and torch.equal(latents, fresh)


def test_a_window_that_went_wrong_is_not_kept(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, store: WindowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encode_frames
    monkeypatch.setattr(sampling, "encode_frames", lambda *args: encode(*args) * torch.nan)
    with pytest.raises(MemoError, match="NaN"):
        sampled(pipe, store, small, track)
    monkeypatch.undo()
    assert not files(store) and sampled(pipe, store, small, track)[1] == [False] * 3


def test_a_huge_file_is_not_read(
    store: WindowStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, entry())
    monkeypatch.setattr(store_module, "MAX_ENTRY_BYTES", 1000)
    monkeypatch.setattr(tensorfile, "safe_open", None)  # would fail if it were called
    assert store.get(KEY) is None and "bytes" in caplog.text


def test_a_full_disk_turns_the_store_off_with_one_warning(
    pipe: MemoPipeline,
    small: Reference,
    track: AudioTrack,
    store: WindowStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fresh, _ = sampled(pipe, None, small, track)
    sampled(pipe, store, small, track, num_frames=16)

    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> None:
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        latents, stored = sampled(pipe, store, small, track, num_frames=40)
    assert stored == [True, False, False] and torch.equal(latents, fresh)
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert len(files(store)) == 1, "half-written files must not stay"


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = WindowStore(tmp_path / "file" / "windows")
    assert store.get(KEY) is None
    store.put(KEY, entry())
    store.put(KEY, entry())
    assert len(caplog.records) == 1


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    keys = [f"{i:016x}" for i in range(1, 11)]
    size = 17 * 2**10  # of one entry, roughly
    store = WindowStore(tmp_path, max_bytes=40 * size)
    for age, key in enumerate(keys):
        store.put(key, entry())
        os.utime(store.path(key), (time.time() - 1000 + age,) * 2)
    entry_bytes = store.path(keys[0]).stat().st_size
    assert store.get(keys[0]) is not None  # used now
    small_store = WindowStore(tmp_path, max_bytes=5 * entry_bytes)
    small_store.put("f" * 16, entry())
    left = {path.stem for path in files(store)}
    assert keys[0] in left and "f" * 16 in left and keys[1] not in left and keys[9] in left
    assert sum(path.stat().st_size for path in files(store)) <= 5 * entry_bytes


def test_half_written_files_of_a_killed_process_are_cleared_and_those_of_a_living_one_stay(store: WindowStore) -> None:
    store.put(KEY, entry())
    left = store.path(KEY).with_name(f".{'e' * 16}.safetensors.01234567.part")
    left.write_bytes(b"half")
    with replace_whole(store.path(KEY[:2] + "d" * 14)) as written:
        os.utime(written, (time.time() - 86400,) * 2)  # however long it takes
        WindowStore(store.folder).put("f" * 16, entry())
        assert not left.exists() and written.exists()
        written.write_bytes(b"whole")


def test_entries_have_the_rights_of_any_new_file(store: WindowStore) -> None:
    before = os.umask(0o027)
    try:
        store.put(KEY, entry())
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.path(KEY).stat().st_mode) == 0o640
    assert [path.name for path in files(store)] == [f"{KEY}.safetensors"]


def test_an_entry_that_may_not_be_read_is_not_damaged(
    store: WindowStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, entry())

    def refused(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # root, who runs some tests, may read everything
        patch.setattr(tensorfile, "open_regular", refused)
        assert store.get(KEY) is None and store.get(KEY) is None
    assert len(caplog.records) == 1 and "Permission denied" in caplog.text and "damaged" not in caplog.text
    assert store.get(KEY) is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_an_entry_is_no_entry(store: WindowStore, caplog: pytest.LogCaptureFixture) -> None:
    store.path(KEY).parent.mkdir(parents=True)
    os.mkfifo(store.path(KEY))
    assert store.get(KEY) is None and "regular file" in caplog.text
    store.put(KEY, entry())
    assert store.get(KEY) is not None


def test_an_entry_of_other_numbers_is_damaged(store: WindowStore, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in entry().items()}
    store.path(KEY).parent.mkdir(parents=True)
    save_file(tensors, store.path(KEY), {"sha256": "0" * 64})
    assert store.get(KEY) is None and "damaged" in caplog.text and not store.path(KEY).exists()


@pytest.mark.parametrize("key", [3, None, b"0" * 16, ["0" * 16], "0" * 15, "x" * 16])
def test_what_is_no_key_is_named(store: WindowStore, key: object) -> None:
    for call in (store.path, store.get, lambda key: store.put(key, entry())):
        with pytest.raises(MemoError, match="hexadecimal digits, received"):
            call(key)


@pytest.mark.parametrize("folder, size", [(3, 100), ("a\0b", 100), ("a", "much"), ("a", True), ("a", float("nan"))])
def test_what_is_no_store_is_named(folder: object, size: object) -> None:
    with pytest.raises(MemoError, match="received"):
        WindowStore(folder, size)


def test_a_key_cannot_leave_the_folder(store: WindowStore) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        store.get("../../etc/passwd")


@pytest.mark.parametrize("value", ["-1", "inf", "nan", "much", "0"])
def test_a_size_that_is_none_is_the_usual_one(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMO_STORE_GB", value)
    assert store_module.allowed_bytes() == store_module.MAX_BYTES


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_the_store_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMO_STORE", value)
    assert WindowStore.default() is None


def test_its_place_and_size_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMO_STORE", str(tmp_path / "mine"))
    monkeypatch.setenv("MEMO_STORE_GB", "0.5")
    store = WindowStore.default(tmp_path / "host")
    assert (store.folder, store.max_bytes) == (tmp_path / "mine", 2**29)
    monkeypatch.delenv("MEMO_STORE")
    assert WindowStore.default(tmp_path / "host").folder == tmp_path / "host"


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from memo_core import MemoPipeline
from memo_core.sampling.store import WindowStore
import torch
pipe = MemoPipeline.from_pretrained({checkpoint!r})
ref = pipe.encode_reference(torch.zeros(3, 64, 64))
audio = pipe.encode_audio(torch.sin(torch.arange(32000) / 20), 16000)
job = pipe.job(ref, audio, steps=1, guidance_scale=1)
for number, window in enumerate(pipe.sample_windows(job, store=WindowStore({store!r}))):
    print(number, window.stored, flush=True)
    if number == {kill_after} - 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_window(memo_tiny: Path, tmp_path: Path) -> None:
    def run(kill_after: int) -> list[str]:
        root = str(ROOT)
        code = KILLED.format(root=root, checkpoint=str(memo_tiny), store=str(tmp_path / "w"), kill_after=kill_after)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split("\n")[:-1]

    assert run(2) == ["0 False", "1 False"]
    assert run(99) == ["0 True", "1 True", "2 False", "3 False"]


def test_settings_are_addressed_as_in_the_first_releases() -> None:
    """Windows stored by them are found again: to the letter, whatever fields settings have had since."""
    assert Settings(seed=7, speed="balanced").address == (
        "Settings(steps=10, guidance_scale=3.5, seed=7, emotion_per='window', face_token_rows='released', "
        "speed=Speed(max_steps=10, solver='ab2', guidance=(0.0, 0.9), reuse=0.0, fp8_sums=True))"
    )
