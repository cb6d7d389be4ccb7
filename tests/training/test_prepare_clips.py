"""The data pipeline: sound and picture in step, repeated pictures, one pass over a video, and tables that grow."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_prepare import FPS, NOSE, Inline, arguments, make_models, scene, settings_for, video_row, write

from memo_core.video.read import probe
from training import media
from training.prepare import clip, command, engines, faces, pipeline, preview, review, scenes, sync
from training.prepare.engines import Local
from training.prepare.rows import PrepareError, Row, Table, decide
from training.prepare.settings import Settings
from training.shards import Shards


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    (folder / "syncnet_v2.model").write_bytes(b"stands for SyncNet's weights")
    return folder


def prepare(raw: Path, out: Path, models: Path, *more: str) -> tuple[list[Row], list[tuple[str, str]]]:
    engine = Inline()
    pipeline.prepare(command.check(arguments(raw, out, models, *more)), engine)
    return list(Table(out / "table.jsonl").rows.values()), engine.asked


class Loudness:
    """Stands for SyncNet: its features are how bright the left edge of the face's picture is, and how loud the sound,
    in five frames.
    """

    def embed_faces(self, faces: torch.Tensor) -> torch.Tensor:
        return (faces[..., :16].float().mean((1, 2, 3)) / 255).unfold(0, 5, 1)

    def embed_sound(self, waveform: torch.Tensor, count: int) -> torch.Tensor:
        return loudness(waveform.numpy()).unfold(0, 5, 1)[:count]


def loudness(waveform: np.ndarray) -> torch.Tensor:
    """Of each 1/25 s, in [0, 1]."""
    frames = torch.from_numpy(waveform[: len(waveform) // 640 * 640].reshape(-1, 640))
    return (8 * frames.square().mean(1).sqrt()).clamp(max=1)


def talking(seconds: float, late: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A toon head that talks, at the left edge of the square in the middle how loud it is, and its voice, which comes
    `late` frames after that.
    """
    frames, waveform = scene(2, seconds)
    frames[:, :, 40:60] = (255 * loudness(waveform)[: len(frames), None, None, None]).numpy()
    silence = np.zeros(abs(late) * 640, np.float32)
    waveform = np.concatenate([silence, waveform]) if late >= 0 else np.concatenate([waveform[len(silence) :], silence])
    return frames, waveform


# Sound and picture


@pytest.mark.parametrize("late", [5, -3])
def test_sound_that_comes_late_or_early_ends_in_step_in_sample_and_preview(
    late: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_net", lambda models, device: Loudness())
    samples = {}
    for name, by in (("right", 0), ("wrong", late)):
        raw, out = tmp_path / name, tmp_path / f"{name} out"
        raw.mkdir()
        write(raw / "a.mp4", talking(3.0, by))
        (row,), _ = prepare(raw, out, models, "--skip", "scenes", "faces", "quality", "--min-confidence", "0.05")
        assert row.decision == "keep" and row.sync_offset == -by
        shards = Shards(out / "shards")
        assert shards.samples[0].key == row.key and shards.meta(0)["sync_offset"] == -by
        assert (shards.meta(0)["source"], shards.meta(0)["identity"]) == ("a.mp4", row.identity)
        assert shards.samples[0].video == row.identity, "which the index tells, too"
        samples[name] = shards.read(0, "speech").float()[10:-10].flatten(), shards.read(0, "latents")
        shown = replace(row, source=f"{row.id}.mp4", start=0.0, end=3.0, box=[0.0, 0, 256, 256])
        (shown,) = sync.measure(shown, settings_for(out / "clips", out))
        assert shown.sync_offset == 0
    assert torch.equal(samples["right"][1], samples["wrong"][1])
    assert float(torch.corrcoef(torch.stack([samples["right"][0], samples["wrong"][0]]))[0, 1]) > 0.97

    # A lower threshold takes it out, without measuring anything again.
    rows, asked = prepare(
        raw, out, models, "--skip", "scenes", "faces", "quality", "--min-confidence", "0.05", "--max-offset", "2"
    )
    assert asked == [] and rows[0].cause == "large offset" and f"{abs(late)} frames apart" in rows[0].detail


def test_samples_encoded_before_the_sound_was_moved_are_encoded_again_and_others_are_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_net", lambda models, device: Loudness())
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write(raw / "late.mp4", talking(2.0, 5))
    write(raw / "right.mp4", talking(2.2))
    words = ("--skip", "scenes", "faces", "quality", "--min-confidence", "0")
    with monkeypatch.context() as before:
        before.setattr(Row, "delay", property(lambda row: 0.0))
        before.setattr(clip, "sample_key", lambda row, digest: f"{row.id}-{digest[:8]}")
        before.setattr(pipeline, "sample_key", lambda row, digest: f"{row.id}-{digest[:8]}")
        prepare(raw, out, models, *words)
    assert len(Shards(out / "shards")) == 2
    rows, asked = prepare(raw, out, models, *words)
    assert asked == [("encode", "late.mp4")]
    assert {row.key for row in rows} == {sample.key for sample in Shards(out / "shards").samples}
    assert [row.key[-8:] for row in rows if row.source == "late.mp4"] == ["-sound-5"]
    assert prepare(raw, out, models, *words)[1] == []


def test_slow_video_is_dropped_unread_with_its_hours_and_taken_when_the_rate_allows(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "a.mp4", talking(2.0))
    skip = ("--skip", "scenes", "faces", "quality", "sync")
    args = arguments(raw, tmp_path / "out", models, *skip)
    args.min_fps, args.max_repeated = None, 0.1  # as they are without being told
    engine = Inline()
    with monkeypatch.context() as unread:
        unread.setattr(media, "frames", None)
        pipeline.prepare(command.check(args), engine)
    (row,) = Table(tmp_path / "out" / "table.jsonl").rows.values()
    assert (row.cause, row.fps, round(row.seconds)) == ("frame rate too low", 25, 2)
    assert "17% of pictures would be repeated" in row.detail
    assert "1 frame rate too low 2 s" in capsys.readouterr().out

    args.min_fps = 15.0  # it is read now, and the pictures that 30 fps would repeat are counted
    pipeline.prepare(command.check(args), engine)
    (row,) = Table(tmp_path / "out" / "table.jsonl").rows.values()
    assert row.cause == "repeated pictures" and row.fps == 25 and row.repeated_at(30) > 1 / 6
    args.min_fps, args.max_repeated, args.fps, args.out = None, 0.2, 25.0, tmp_path / "at 25"
    assert command.check(args).min_fps == pytest.approx(24.17, abs=0.01)
    pipeline.prepare(command.check(args), engine)
    shards = Shards(tmp_path / "at 25" / "shards")
    assert shards.samples[0].frames == 50 and shards.meta(0)["encoded_fps"] == 25
    assert shards.encoders["frames"] == "64 px, 25 fps"


@pytest.mark.parametrize(("every", "share"), [(None, 0.0), (6, 1 / 6), (2, 0.5)])
def test_pictures_that_the_source_repeats_are_counted(every: int | None, share: float, tmp_path: Path) -> None:
    """25 fps that were made 30 before, and 15."""
    frames, waveform = scene(3, 3.0)
    kept = [i for i in range(len(frames)) for _ in range(1 + (every is not None and i % (every - 1) == 0))]
    # A head that holds still for some pictures: what moves is a little noise, as of any camera.
    noise = np.random.default_rng(0).normal(0, 3, frames.shape)
    noisy = (frames + noise).clip(0, 255).astype(np.uint8)
    write(tmp_path / "a.mp4", (noisy[kept], np.tile(waveform, 3)), fps=30)
    (row, *_) = scenes.split(video_row("a.mp4"), settings_for(tmp_path, tmp_path, skip=("scenes", "faces")))
    assert row.repeated == pytest.approx(share, abs=0.02)
    row = decide(row, settings_for(tmp_path, tmp_path, max_repeated=0.1))
    assert row.cause == ("repeated pictures" if share else "")


# One pass

ALL_KEPT = ("--min-quality", "0", "--min-confidence", "-9", "--max-offset", "15")


def test_all_stages_together_decode_a_video_twice_at_most(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for scenes and faces, once for all that needs the square."""
    monkeypatch.setattr(sync, "_net", lambda models, device: Loudness())
    decoded, decode = [0], media._decode

    def counted(*args: object) -> Iterator:
        for found in decode(*args):
            decoded[0] += 1
            yield found

    monkeypatch.setattr(media, "_decode", counted)
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "a.mp4", scene(1, 3.0))
    rows, asked = prepare(raw, tmp_path / "out", models, *ALL_KEPT)
    assert [row.decision for row in rows] == ["keep"] and len(Shards(tmp_path / "out" / "shards")) == 1
    assert asked == [("scenes faces", "a.mp4"), ("quality sync encode", "a.mp4")]
    assert decoded[0] <= 2 * 3 * FPS


def test_stages_together_find_what_each_finds_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_net", lambda models, device: Loudness())
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "a.mp4", scene(1, 2.0))
    skips = ["encode", "sync", "quality"], ["encode", "sync"], ["encode"], []
    for stage in skips:  # one more each time
        words = ["--skip", *stage] if stage else []
        (slow,), asked = prepare(raw, tmp_path / "slow", models, *ALL_KEPT, *words)
    assert asked == [("encode", "a.mp4")]
    (fast,), _ = prepare(raw, tmp_path / "fast", models, *ALL_KEPT)
    assert slow == fast
    slow, fast = (Shards(tmp_path / name / "shards") for name in ("slow", "fast"))
    assert set(slow.names(0)) == {"latents", "speech", "emotion", "face_embedding", "focus"}
    assert all(torch.equal(slow.read(0, name), fast.read(0, name)) for name in slow.names(0))


def test_what_bad_quality_drops_is_not_judged_further_and_has_a_preview(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces_seen = []
    net = Loudness()
    net.embed_faces = lambda pictures: faces_seen.append(pictures)
    monkeypatch.setattr(sync, "_net", lambda models, device: net)
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "a.mp4", scene(2, 1.6, level=0.4))
    (row,), _ = prepare(raw, tmp_path / "out", models)
    assert row.cause == "low quality" and row.sync_offset is None and row.key == "" and not faces_seen
    video, strip = preview.files(tmp_path / "out", row.id)
    assert strip.stat().st_size
    tags = probe(video).metadata
    assert tags["title"] == row.id and "artificial" not in str(tags), "a camera took these pictures"
    assert not list((tmp_path / "out").glob("encoded/*"))


# Faces


def test_a_look_without_a_face_divides_a_clip(models: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    frames, waveform = scene(1, 5.0)
    left, top = 16 * NOSE[0], 16 * NOSE[1]
    for away in (slice(55, 60), slice(75, 76)):  # the second one leaves too little before it
        frames[away, top : top + 16, left : left + 16] = 0
    write(raw / "a.mp4", (frames, waveform))
    skip = ("--skip", "scenes", "quality", "sync", "encode")
    rows, _ = prepare(raw, out, models, "--detect-fps", "0.3", *skip)
    assert [(row.start, row.end, row.cause) for row in rows] == [(0.0, 5.0, "")]
    rows, asked = prepare(raw, out, models, *skip)  # divides the clips there are
    assert [work for work, _ in asked] == ["faces", "", ""]
    assert {path.stem for path in (out / "clips").iterdir()} == {rows[0].id, rows[2].id}
    spans = [(round(row.start, 2), round(row.end, 2), row.cause) for row in rows]
    assert spans == [(0.0, 2.0, ""), (2.0, 3.2, "no face"), (3.2, 5.0, "")]
    assert "at 2.20 s" in rows[1].detail and len({row.id for row in rows}) == 3
    assert rows[0].looks[-1][0] == 2.0 and rows[2].looks[0][0] == 3.2

    fresh, asked = prepare(raw, tmp_path / "fresh", models, *skip)
    assert [work for work, _ in asked] == ["scenes faces", "", ""]
    assert [(row.id, row.cause, row.looks) for row in fresh] == [(row.id, row.cause, row.looks) for row in rows]


def test_what_an_earlier_version_dropped_whole_is_divided_once(models: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    frames, waveform = scene(1, 2.4)
    frames[40:] = 0
    write(raw / "a.mp4", (frames, waveform))
    skip = ("--skip", "scenes", "quality", "sync", "encode")
    new, _ = prepare(raw, out, models, *skip)
    assert [row.cause for row in new] == ["", "no face"]
    old = replace(new[0], id=f"{new[0].identity}-0-2400", end=new[1].end, box=None, face_box=None, looks=None)
    table = Table(out / "table.jsonl")
    table.remove([row.id for row in new])
    table.put([old.fail("faces", "no face", "0 faces at 1.60 s")])
    table.close()
    rows, asked = prepare(raw, out, models, *skip)
    assert [work for work, _ in asked] == ["faces"] and [(r.id, r.cause) for r in rows] == [
        (r.id, r.cause) for r in new
    ]
    assert prepare(raw, out, models, *skip) == (rows, []), "what was divided is not looked at again"


def test_a_small_face_is_dropped_by_the_pixels_of_its_square(models: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", scene(1, 1.2))
    row = replace(video_row("a.mp4"), start=0.0, end=1.2, width=320, height=240, fps=25.0)
    settings = settings_for(tmp_path, tmp_path, models, min_face=70.0)
    (row,) = faces.crop(row, settings)  # 64 pixels, times 1.1
    assert decide(row, settings).decision == "keep"
    assert decide(row, replace(settings, min_face=71.0)).cause == "small face"
    args = arguments(tmp_path, tmp_path / "out", models)
    assert command.check(args).min_face == 32  # half of --size


def test_a_scale_between_two_numbers_is_drawn_by_the_clip(models: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tmp_path, scale=(1.1, 1.8))
    drawn = [settings.scale_of(f"clip {n}") for n in range(400)]
    assert 1.1 <= min(drawn) < 1.12 and 1.78 < max(drawn) <= 1.8 and 1.43 < np.mean(drawn) < 1.47
    assert drawn[:9] == [settings.scale_of(f"clip {n}") for n in range(9)]
    assert Settings.from_json(json.loads(json.dumps(settings.__dict__))) == settings
    write(tmp_path / "a.mp4", scene(1, 1.2))
    row = replace(video_row("a.mp4"), start=0.0, end=1.2, width=320, height=240, fps=25.0)
    (row,) = faces.crop(row, replace(settings, models=str(models)))
    assert row.scale == settings.scale_of(row.id) and row.box[2] - row.box[0] == pytest.approx(64 * row.scale, abs=0.01)
    for wrong in (["2", "1"], ["1", "2", "3"], ["0.5"]):
        with pytest.raises(PrepareError, match="--scale"):
            command.check(arguments(tmp_path, tmp_path / "out", models, "--scale", *wrong))


# Tables


def rows_of(count: int, looks: int = 75) -> Iterator[Row]:
    for n in range(count):
        found = [[n + i / 5, 100.5, 200.5, 300.5, 400.5] for i in range(looks)]
        yield replace(
            video_row(f"{n // 9}.mp4"), id=f"{n:012x}-0", start=float(n), end=n + 15.0, fps=25.0, looks=found,
            box=[0.0, 0.0, 9.0, 9.0], quality=float(n),
        )  # fmt: skip


def test_a_table_is_appended_to_and_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    rows = list(rows_of(20))
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))  # as it was written before
    table, before = Table(path), path.stat()
    table.put(rows)
    assert path.stat().st_size == before.st_size, "what is there is not written again"
    table.put([replace(rows[3], quality=50.0)])
    table.remove([rows[5].id, "absent"])
    after = path.stat()
    assert after.st_ino == before.st_ino and after.st_size - before.st_size < 2 * before.st_size / 20
    with open(path, "ab") as file:
        file.write(b'{"id": "half a li')  # killed here
    again = Table(path)
    assert len(again.rows) == 19 and again.rows[rows[3].id].quality == 50 and rows[5].id not in again.rows
    again.put([replace(rows[7], quality=1.0)])
    assert Table(path).rows[rows[7].id].quality == 1
    again.save()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 19 and [line["start"] for line in lines[:5]] == [0, 1, 2, 3, 4]
    path.write_text('{"id": "x"}\n' + path.read_text())
    with pytest.raises(PrepareError, match="line 1 is not a row"):
        Table(path)


def test_a_table_killed_in_its_first_line_begins_anew_and_no_other_file_is_written_over(tmp_path: Path) -> None:
    path, (row,) = tmp_path / "table.jsonl", rows_of(1)
    line = json.dumps(row.to_json())
    for length in (0, 1, 12, len(line) - 1):
        path.write_text(line[:length])
        table = Table(path)
        assert not table.rows
        table.put([row])
        table.save()
        assert list(Table(path).rows.values()) == [row] and path.read_text() == line + "\n"
    path.write_text("notes of mine")
    with pytest.raises(PrepareError, match="line 1 is not a row"):
        Table(path)


def test_a_table_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    table.put(rows_of(300))
    tracemalloc.start()
    table = Table(tmp_path / "table.jsonl")
    assert sum(row.quality < 100 for row in table.rows.values()) == 100
    table.put(replace(row, quality=0.0) for row in table.rows.values())
    table.save()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / 300 < 200e6 / 120_000, "120,000 rows in 200 MB"


def test_a_table_whose_lines_are_mostly_old_is_written_anew_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prepare.rows.SPARE_LINES", 10)
    table = Table(tmp_path / "table.jsonl")
    for n in range(30):
        table.put([replace(row, quality=float(n)) for row in rows_of(4, looks=1)])
        table.save(now=False)
        assert len(table.path.read_text().splitlines()) <= 2 * 4 + 10 + 4
    assert [row.quality for row in Table(table.path).rows.values()] == [29.0] * 4


def test_a_review_of_many_clips_has_several_pages_which_share_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "CLIPS", 2)
    rows = {row.id: row for row in rows_of(5)}
    first, *_, last = rows
    rows[first] = replace(rows[first], verdict="keep")
    small = replace(rows[first], id="small", stage="faces", verdict="")  # was never decoded for a preview

    def data(name: str) -> dict:
        page = (tmp_path / name).read_text("utf-8")
        return json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])

    review.write_page(tmp_path, {**rows, "small": small}, settings_for(tmp_path, tmp_path))
    names = ["review.html", "review-2.html", "review-3.html"]
    pages = [data(name) for name in names]
    assert [len(page["clips"]) for page in pages] == [2, 2, 1]
    assert {clip["id"] for page in pages for clip in page["clips"]} == set(rows)
    assert all(page["verdicts"] == {first: "keep"} and page["pages"] == names for page in pages)
    review.write_page(tmp_path, {last: rows[last]}, settings_for(tmp_path, tmp_path))
    assert [path.name for path in tmp_path.glob("review*.html")] == ["review.html"]


def test_a_table_begun_before_goes_on(tmp_path: Path) -> None:
    """Digests of what was measured then, with the settings that were usual, and rows without the newer columns."""
    old = {"raw": "/raw", "out": "/out", "models": str(tmp_path)}
    assert Settings(**old).digests() == OLD_DIGESTS
    values = next(rows_of(1)).to_json()
    for name in ("repeated", "scale"):
        del values[name]
    (tmp_path / "table.jsonl").write_text(json.dumps(values) + "\n")
    (row,) = Table(tmp_path / "table.jsonl").rows.values()
    assert row.repeated is None and row.scale is None and row.repeated_at(30) == 0


OLD_DIGESTS = {
    "scenes": "3230e01d7e7811f2",
    "faces": "1bb0b060360a919b",
    "quality": "afc6e1f1375a01ff",
    "sync": "a697e33210e0803d",
    "encode": "26296e7002aad460",
}


# GPUs


def worker_gpu(models: Path, device: str):
    """A scorer for tests: the GPU that its process sees."""
    return lambda picture: float(os.environ["CUDA_VISIBLE_DEVICES"])


def test_local_workers_share_the_gpus_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert [worker.gpu for worker in Local(tmp_path, 3, 60, "cuda")._all] == ["4", "7", "4"]
    assert [worker.gpu for worker in Local(tmp_path, 2, 60, "cpu")._all] == [None, None]
    assert [worker.gpu for worker in Local(tmp_path, 2, 60, "cuda:1")._all] == [None, None]  # it was told which
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engines.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    write(tmp_path / "a.mp4", scene(1, 1.2))
    row = replace(video_row("a.mp4"), start=0.0, end=1.2, fps=25.0, box=[96.0, 56.0, 224.0, 184.0])
    settings = settings_for(tmp_path, tmp_path, scorer="test_prepare_clips:worker_gpu", device="cuda")
    with Local(tmp_path, 1, 60, "cuda") as engine:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # it is told its own
        ((_, (row,)),) = engine({"quality": "x"}, iter([row]), settings)
    assert row.failure is None and row.quality == 7 and row.done == {"quality": "x"}


def test_a_cluster_reserves_gpus_for_stages_that_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, tmp_path, device="cuda")
    engine = engines.OnRay.__new__(engines.OnRay)
    engine.gpus = 0.5
    assert engine.gpus_for({"quality": "", "encode": ""}, settings) == 0.5
    assert engine.gpus_for({}, settings) == 0
    assert engine.gpus_for({"quality": ""}, replace(settings, device="cpu")) == 0
    for there, share in ((False, 0), (True, 0.5)):
        monkeypatch.setattr("training.prepare.settings.finds_faces_on_gpu", lambda there=there: there)
        assert engine.gpus_for({"scenes": "", "faces": ""}, settings) == share
    assert engine.gpus_for({"scenes": "", "faces": ""}, replace(settings, skip=("faces",))) == 0


def test_the_engine_is_given_no_more_rows_than_are_at_work(tmp_path: Path) -> None:
    asked = []

    def rows() -> Iterator[Row]:
        for row in rows_of(1000, looks=0):
            asked.append(row.id)
            yield replace(row, source="absent.mp4")

    with Local(tmp_path, 1, 60) as engine:
        results = engine({"quality": "x"}, rows(), settings_for(tmp_path, tmp_path))
        for _ in range(3):
            next(results)
        assert len(asked) <= 6
        results.close()
