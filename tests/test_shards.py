"""Training data: shards that survive crashes, and samples that are the same however often a run is stopped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace
from pathlib import Path

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
    assert shares["emotion"] == pytest.approx(0.3, abs=0.05)
    assert all(shares[name] == pytest.approx(0.05, abs=0.025) for name in ("reference", "audio", "past"))
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
