"""Training data: shards that survive crashes, and samples that are the same however often a run is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import batches, presets
from training.config import Data, Drop, Stage
from training.shards import INDEX, ShardError, Shards, ShardWriter

DROP_NOTHING = Drop(emotion=0, reference=0, audio=0, past=0)
WINDOWS = Stage(name="windows", steps=1, drop=DROP_NOTHING)


def clip(frames: int = 64, value: float | None = None) -> dict[str, torch.Tensor]:
    """A clip whose every tensor tells the number of its frame."""
    count = torch.arange(float(frames)) if value is None else torch.full((frames,), value)
    return {
        "latents": count.view(-1, 1, 1, 1).expand(-1, 4, 2, 2).half(),
        "speech": count.view(-1, 1, 1).expand(-1, 2, 3).half(),
        "emotion": torch.full((frames,), 3, dtype=torch.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten clips in four shards."""
    with ShardWriter(tmp_path, {"vae": "abc"}, samples_per_shard=3) as writer:
        for number in range(10):
            writer.add(f"clip{number}", clip(), {"video": f"{number}.mp4"})
    return tmp_path


def test_what_was_written_is_read_frame_by_frame(folder: Path) -> None:
    shards = Shards(folder)
    assert len(shards) == 10 and [sample.key for sample in shards.samples] == [f"clip{i}" for i in range(10)]
    assert shards.names(7) == {"emotion": (64,), "latents": (64, 4, 2, 2), "speech": (64, 2, 3)}
    assert shards.read(7, "latents", slice(5, 8))[:, 0, 0, 0].tolist() == [5, 6, 7]
    assert shards.read(0, "emotion").unique().tolist() == [3] and shards.meta(7) == {"video": "7.mp4"}
    with pytest.raises(ShardError, match="clip7 .* has no focus, only latents, speech, emotion"):
        shards.read(7, "focus")
    with pytest.raises(ShardError, match="rows 60 to 70 of latents, which has 64"):
        shards.read(7, "latents", slice(60, 70))


def test_any_webdataset_reader_streams_the_shards(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"clip{i}" for i in range(10)]
    assert all({"safetensors", "json"} <= set(sample) for sample in samples)


def test_writing_goes_on_and_a_crash_loses_only_the_unfinished_shard(folder: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(folder, {"vae": "abc"}, samples_per_shard=2) as writer:
        assert "clip9" in writer.keys
        for number in range(10, 13):
            writer.add(f"clip{number}", clip())
        raise RuntimeError("killed")
    assert [sample.key for sample in Shards(folder).samples][10:] == ["clip10", "clip11"]
    with ShardWriter(folder, {"vae": "abc"}) as writer:
        assert "clip11" in writer.keys and "clip12" not in writer.keys
        writer.add("clip12", clip())
    assert len(Shards(folder)) == 13


def test_clips_of_other_encoders_do_not_mix(folder: Path) -> None:
    with pytest.raises(ShardError, match="made with .*abc.*, now it is .*xyz"):
        ShardWriter(folder, {"vae": "xyz"})


@pytest.mark.parametrize("key", ["", "clip1", "a.b", "../a", "a\\b"])
def test_keys_that_a_shard_cannot_hold_are_refused(folder: Path, key: str) -> None:
    with ShardWriter(folder, {"vae": "abc"}) as writer, pytest.raises(ShardError, match="cannot be a sample's key"):
        writer.add(key, clip())


def test_damaged_shards_are_named(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match=f"{shard.name} should have .* copy or make it again"):
        Shards(folder)
    (folder / INDEX).write_text("{", encoding="utf-8")
    with pytest.raises(ShardError, match="damaged"):
        Shards(folder)
    with pytest.raises(ShardError, match="no shards in"):
        Shards(tmp_path / "elsewhere")


# --- Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_shows_every_clip_once_however_many_read(folder: Path, workers: int) -> None:
    config = replace(WINDOWS, data=Data(workers=workers))
    data = batches.TrainingSet(folder, config, samples_together=2)
    streams = [batches.loader(data, 1, 0, rank, processes=2) for rank in range(2)]
    seen = [key for _ in range(10) for stream in streams for key in next(stream).keys]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(f"clip{i}" for i in range(10))
    assert seen[:10] != seen[10:], "every epoch has an order of its own"


def test_two_processes_see_what_one_with_twice_the_batch_sees(folder: Path) -> None:
    config = replace(WINDOWS, data=Data(past_windows=(1, 2, 3)), drop=Drop(all=0.2))
    data = batches.TrainingSet(folder, config, samples_together=4)
    whole = batches.loader(data, 4, 0)
    halves = [batches.loader(data, 2, 0, rank, 2) for rank in range(2)]
    for _ in range(6):
        one, two = next(whole), batches.collate([next(half) for half in halves])
        assert one.keys == two.keys
        assert all(
            torch.equal(getattr(one, item.name), getattr(two, item.name))
            for item in dataclasses.fields(one)
            if item.name != "keys"
        )


def test_a_stream_that_begins_later_goes_on_as_the_whole_one(folder: Path) -> None:
    data = batches.TrainingSet(folder, WINDOWS)
    whole, later = batches.loader(data, 3, 0), batches.loader(data, 3, 7)
    for _ in range(7):
        next(whole)
    a, b = next(whole), next(later)
    assert a.keys == b.keys and torch.equal(a.noise, b.noise) and torch.equal(a.latents, b.latents)


def test_past_and_sound_belong_to_the_window(folder: Path) -> None:
    config = replace(WINDOWS, data=Data(past_windows=(2,)))
    data = batches.TrainingSet(folder, config)
    firsts = set()
    for number in range(60):
        sample = data[number]
        now, past = sample.latents[0, 0, :, 0, 0], sample.past[0, :, 0, 0, 0]
        first, known = int(now[0]), int(sample.past_windows)
        firsts.add(first)
        assert now.tolist() == list(range(first, first + 16)) and known == min(2, max(1, first // 16))
        assert (sample.audio[0, :, 2, 0, 0] == now).all(), "the middle of the audio context is the frame's own"
        assert sample.audio[0, 0, 0, 0, 0] == max(0, first - 2) and sample.audio[0, -1, -1, 0, 0] == min(63, first + 17)
        counted = past[-16 * known :]
        if first < 16:
            assert len(counted.unique()) == 1, "before a video's first window the past is the portrait"
        else:
            assert counted.tolist() == list(range(first - 16 * known, first))
    assert min(firsts) < 16 and max(firsts) == 48, "windows begin at any frame, the last whole one included"


def test_all_of_a_step_have_equally_many_past_windows(folder: Path) -> None:
    config = replace(WINDOWS, data=Data(past_windows=(1, 2, 3)))
    stream = batches.loader(batches.TrainingSet(folder, config, samples_together=4), 4, 0)
    lengths = [next(stream).past.shape[1] for _ in range(30)]
    assert set(lengths) == {16, 32, 48}


def test_conditions_are_dropped_as_often_as_asked(folder: Path) -> None:
    data = batches.TrainingSet(folder, replace(WINDOWS, drop=presets.memo_stage2().drop))
    samples = [data[number] for number in range(1000)]
    shares = {
        "emotion": sum(int(sample.emotion) == 9 for sample in samples) / 1000,
        "reference": sum(bool(sample.no_reference) for sample in samples) / 1000,
        "audio": sum(bool(sample.no_audio) for sample in samples) / 1000,
        "past": sum(int(sample.past_windows) == 0 for sample in samples) / 1000,
    }
    # Each by itself, and all but the past together in 5% besides.
    asked = {"emotion": 1 - 0.95 * 0.7, "reference": 1 - 0.95**2, "audio": 1 - 0.95**2, "past": 0.05}
    assert shares == pytest.approx(asked, abs=0.03)
    assert {int(sample.emotion) for sample in samples} == {3, 9}


def test_single_frames_are_any_frames_of_a_clip(folder: Path) -> None:
    data = batches.TrainingSet(folder, replace(WINDOWS, data=Data(single_frames=True, frames=4)))
    sample = data[0]
    frames = sample.latents[0, 0, :, 0, 0].tolist()
    assert len(set(frames)) == 4 and sample.audio is None and sample.past is None
    assert len(set(sample.sigma[0].tolist())) == 4, "each has a noise level of its own"


def test_clips_too_short_or_silent_are_said(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "short") as writer:
        writer.add("a", clip(frames=10))
    with pytest.raises(ShardError, match="none of the 1 clips .* has 16 frames"):
        batches.TrainingSet(tmp_path / "short", WINDOWS)
    with ShardWriter(tmp_path / "silent") as writer:
        writer.add("a", {"latents": clip()["latents"]})
    with pytest.raises(ShardError, match="have latents, but windows need speech and emotion"):
        batches.TrainingSet(tmp_path / "silent", WINDOWS)


# --- Indexes and shards of strangers ----------------------------------------------------------------------------------


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("shards"),
        lambda index: index.update(shards={}),
        lambda index: index.update(encoders=["vae"]),
        lambda index: index["shards"].append(3),
        lambda index: index["shards"][0].update(name="/etc/passwd"),
        lambda index: index["shards"][0].update(name="../other/clips-000000.tar"),
        lambda index: index["shards"][0].update(name=".."),
        lambda index: index["shards"][0].update(name=3),
        lambda index: index["shards"][0].update(name="a\0b.tar"),
        lambda index: index["shards"][0].update(bytes="many"),
        lambda index: index["shards"][0].update(bytes=10**30),
        lambda index: index["shards"][0].update(samples="x"),
        lambda index: index["shards"][0]["samples"].append([1, 2]),
        lambda index: index["shards"][0]["samples"][0].__setitem__(0, "../x"),
        lambda index: index["shards"][0]["samples"][0].__setitem__(1, -512),
        lambda index: index["shards"][0]["samples"][0].__setitem__(1, True),
        lambda index: index["shards"][0]["samples"][0].__setitem__(2, 10**9),
        lambda index: index["shards"][0]["samples"][0].__setitem__(2, 2.5),
        lambda index: index["shards"][0]["samples"][0].__setitem__(3, 0),
        lambda index: index["shards"][0]["samples"][1].__setitem__(1, index["shards"][0]["samples"][0][1] + 8),
    ],
    ids=range(20),
)
def test_an_index_that_makes_no_sense_is_refused(folder: Path, change: Callable[[dict], object]) -> None:
    change_index(folder, change)
    for kind in (Shards, lambda folder: ShardWriter(folder, {"vae": "abc"})):
        with pytest.raises(ShardError, match="damaged"):
            kind(folder)


def test_bombs_and_pipes_for_an_index_are_refused(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 100_000)
    with pytest.raises(ShardError, match="nested too deep"):
        Shards(folder)
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(ShardError, match="regular file"):
        Shards(folder)


def test_nothing_outside_the_folder_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shard = folder / "clips-000001.tar"
    away = tmp_path_factory.mktemp("away") / shard.name
    shard.rename(away)
    shard.symlink_to(away)
    with pytest.raises(ShardError, match="leads out of its folder"):
        Shards(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ShardError, match="regular file"):
        Shards(folder)
    shard.unlink()
    away.rename(folder / "elsewhere.tar")
    shard.symlink_to("elsewhere.tar")  # within it
    assert len(Shards(folder).read(3, "emotion")) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": 3},
        {"shape": [64, 4, 2, 3]},
        {"shape": [-64, -4, 2, 2]},
        {"shape": "x"},
        {"shape": [True] * 4},
        {"data_offsets": [0, 10**9]},
        {"data_offsets": [-8, 2040]},
        {"data_offsets": [2048, 0]},
        {"data_offsets": ["0", "2048"]},
        {"data_offsets": [0.0, 2048.0]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_headers_that_make_no_sense_are_refused(folder: Path, change: dict) -> None:
    sample, path = Shards(folder).samples[1], folder / "clips-000000.tar"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[sample.offset : sample.offset + 8], "little")
    header = json.loads(data[sample.offset + 8 : sample.offset + 8 + length])
    del header["emotion"], header["speech"]
    header["latents"] |= change
    data[sample.offset + 8 : sample.offset + 8 + length] = json.dumps(header).encode().ljust(length)
    path.write_bytes(data)
    shards = Shards(folder)
    for read in (lambda: shards.read(1, "latents"), lambda: shards.names(1)):
        with pytest.raises(ShardError, match="does not make sense"):
            read()
    assert len(shards.read(0, "latents")) == 64


def test_a_huge_header_is_not_read(folder: Path) -> None:
    sample, path = Shards(folder).samples[1], folder / "clips-000000.tar"
    data = bytearray(path.read_bytes())
    for length in (2**62, 2**64 - 1, sample.size - 7):
        data[sample.offset : sample.offset + 8] = length.to_bytes(8, "little")
        path.write_bytes(data)
        with pytest.raises(ShardError, match="holds no safetensors"):
            Shards(folder).names(1)


def test_damaged_members_are_named(folder: Path) -> None:
    path = folder / "clips-000000.tar"
    data = path.read_bytes()
    path.write_bytes(b"\0" * 512 + data[512:])
    with pytest.raises(ShardError, match="does not tell about clip1"):
        Shards(folder).meta(1)
    with pytest.raises(ShardError), ShardWriter(folder, {"vae": "abc"}) as writer:
        writer.remove({"clip0"})
    assert not list(folder.glob(".*")) and path.is_file()


def test_values_of_the_wrong_kind_are_named(folder: Path) -> None:
    shards, writer = Shards(folder), ShardWriter(folder, {"vae": "abc"})
    for call in (
        lambda: Shards(3),
        lambda: Shards(None),
        lambda: Shards("a\0b"),
        lambda: ShardWriter(3),
        lambda: ShardWriter(folder, ["vae"]),
        lambda: ShardWriter(folder, {"vae": "abc"}, samples_per_shard="3"),
        lambda: shards.read("0", "latents"),
        lambda: shards.read(10, "latents"),
        lambda: shards.read(True, "latents"),
        lambda: shards.read(0, 3),
        lambda: shards.read(0, ["latents"]),
        lambda: shards.read(0, "latents", 3),
        lambda: shards.read(0, "latents", slice(None, 3)),
        lambda: shards.read(0, "latents", slice("0", 3)),
        lambda: shards.meta(None),
        lambda: shards.names(-1),
        lambda: writer.add(3, clip()),
        lambda: writer.add("new", 3),
        lambda: writer.add("new", {"latents": [1]}),
        lambda: writer.add("new", {"speech": torch.zeros(3)}),
        lambda: writer.add("new", clip(), {"x": {1}}),
    ):
        with pytest.raises(ShardError):
            call()
    assert shards.read(np.int64(0), "latents", slice(np.int64(1), np.int64(3))).shape[0] == 2
    assert not list(folder.glob(".*"))
