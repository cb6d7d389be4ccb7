"""The data pipeline on toon videos: what is kept and dropped and why, and what broken videos cost."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from memo_core.video.write import VideoWriter
from training import media
from training.prepare import (  # fmt: skip
    add_command,
    clip,
    command,
    encode,
    engines,
    faces,
    picture,
    pipeline,
    quality,
    review,
    scenes,
    videos,
)
from training.prepare.engines import Local, OnRay
from training.prepare.rows import Drop, PrepareError, Row, Table, Work, decide
from training.prepare.settings import Settings
from training.prepare.worker import Worker, apply
from training.shards import ShardError, Shards, ShardWriter
from training.toon import heads, voices

pytest.importorskip("scenedetect", reason="the scenedetect package, which finds scene cuts, is not installed")
pytest.importorskip("onnx", reason="the onnx package, which builds the test models, is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from face_models import SIDES, make_analyzer  # noqa: E402

from memo_core.checkpoint.layout import EMOTION_HEAD, assets
from memo_core.inputs.speech import NEIGHBOURS, encode_audio

FPS, WIDTH, HEIGHT = 25, 320, 240
NOSE = (10, 7)  # the cell of 16 pixels that the test detector sees as a face when it is red


def scene(seed: int, seconds: float, faces: tuple = (NOSE,), level: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A toon head that talks, [F, 240, 320, 3], and its voice at 16 kHz; `level` darkens the picture."""
    rng = np.random.default_rng(seed)
    utterance = voices.speak(voices.sample_voice(rng), 3, seconds, rng)
    motion = heads.perform(utterance, 3, rng)
    count = round(seconds * FPS)
    head = heads.render(heads.sample_identity(rng), motion[(torch.arange(count) * heads.FPS / FPS).long()])
    frames = np.full((count, HEIGHT, WIDTH, 3), 40 + 50 * (seed % 4), np.uint8)
    frames[:, 56:184, 96:224] = head.permute(0, 2, 3, 1).numpy()
    frames = (frames * level).astype(np.uint8)
    for column, row in faces:
        frames[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255, 0, 0
    return frames, utterance.waveform


def write(path: Path, *parts: tuple[np.ndarray, np.ndarray], fps: float = FPS, sound: bool = True) -> Path:
    height, width = parts[0][0].shape[1:3]
    with VideoWriter(path, width, height, fps, voices.RATE if sound else None) as writer:
        for frames, waveform in parts:
            if sound:
                writer.write_audio(waveform[: round(len(frames) / fps * voices.RATE)])
            writer.write_frames(frames)
    return path


def make_models(folder: Path) -> Path:
    (folder / "misc").mkdir()
    for name in ("vae", "wav2vec2", "emotion2vec"):
        (folder / name).symlink_to(assets() / "toon" / name)
    (folder / EMOTION_HEAD).symlink_to(assets() / "toon" / EMOTION_HEAD)
    make_analyzer(folder, (32,))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes, one of them too dark; two faces; a face at the edge; no face; no video."""
    folder = tmp_path_factory.mktemp("raw")
    write(folder / "two scenes.mp4", scene(1, 1.2), scene(2, 1.6, level=0.4))
    write(folder / "crowd.mp4", scene(3, 1.2, faces=(NOSE, (15, 7))))
    write(folder / "edge.mp4", scene(4, 1.2, faces=((0, 7),)))
    write(folder / "nobody.mp4", scene(5, 1.2, faces=()))
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    return folder


def brightness(models: Path, device: str):
    """A scorer for tests: the mean level in percent, and what a bad picture can do to a process."""

    def score(pixels: np.ndarray) -> float:
        if "CRASH_ON_DARK" in os.environ and pixels.mean() < 70:
            os.kill(os.getpid(), signal.SIGKILL)
        if "SLEEP_ON_DARK" in os.environ and pixels.mean() < 70:
            time.sleep(60)
        if "FAIL_ON_DARK" in os.environ and pixels.mean() < 70:
            raise RuntimeError("out of memory")
        return float(pixels.mean()) / 2.55

    return score


def arguments(raw: Path, out: Path, models: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    words = ["--models", models, "--min-seconds", 1, "--size", 64, "--scorer", "test_prepare:brightness"]
    words += ["--min-fps", 15, "--max-repeated", 1, *more]  # these videos have 25 fps
    return parser.parse_args(["prepare", str(raw), str(out), *map(str, words)])


class Inline:
    """An engine without processes that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, work: Work, rows: Iterable[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        for row in rows:
            self.asked.append((" ".join(work), row.source))
            yield row.id, apply(work, row, settings)


def run(raw: Path, out: Path, models: Path, *more: str) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """Rows by source, as the file has them, and what was computed."""
    engine = Inline()
    pipeline.prepare(command.check(arguments(raw, out, models, *more)), engine)
    rows: dict[str, list[Row]] = {}
    for row in Table(out / "table.jsonl").rows.values():
        rows.setdefault(row.source, []).append(row)
    return rows, engine.asked


def settings_for(raw: Path, tmp_path: Path, models: Path = Path("/nowhere"), **more) -> Settings:
    more = {"min_fps": 15.0, "max_repeated": 1.0, "min_face": 32.0, **more}
    return Settings(raw=str(raw), out=str(tmp_path), models=str(models), min_seconds=1.0, size=64, **more)


def video_row(source: str) -> Row:
    return Row(id="0123", source=source, identity="0123")


def clips_of(out: Path) -> list[dict]:
    """What the page is given."""
    page = (out / "review.html").read_text("utf-8")
    return json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])["clips"]


# Reading


def test_pictures_are_those_nearest_in_time_at_any_rate_and_from_any_place(tmp_path: Path) -> None:
    frames = np.zeros((100, 48, 64, 3), np.uint8)  # tens on the left, ones on the right
    frames[:, :, :32] = (np.arange(100) // 10 * 20)[:, None, None, None]
    frames[:, :, 32:] = (np.arange(100) % 10 * 20)[:, None, None, None]
    path = write(tmp_path / "count.mp4", (frames, np.zeros(64000, np.float32)))

    def numbers(start: float, end: float, fps: float) -> list[int]:
        pictures = media.at_rate(path, start, end, fps)
        return [10 * round(p[:, :24].mean() / 20) + round(p[:, 40:].mean() / 20) for p in pictures]

    assert numbers(0, 4, 25) == list(range(100))
    assert numbers(2, 3, 25) == list(range(50, 75))
    halves = numbers(1, 3, 30)
    assert len(halves) == 60
    assert all(abs(number / 25 - (1 + i / 30)) <= 0.5 / 25 + 1e-6 for i, number in enumerate(halves))
    with pytest.raises(Drop, match="picture ends early"):
        numbers(2, 6, 25)


@pytest.mark.parametrize("first", range(72, 80))
def test_no_picture_of_the_next_scene_is_read_whatever_the_rates(first: int, tmp_path: Path) -> None:
    frames = np.full((100, 32, 32, 3), 20, np.uint8)
    frames[first:] = 220
    path = write(tmp_path / "cut.mp4", (frames, None), fps=24, sound=False)
    times = [time for time, _ in media.pictures(path)]
    for fps in (25, 30, 60):
        before = [picture.mean() for picture in media.at_rate(path, 0.0, times[first], fps)]
        assert len(before) == round(times[first] * fps) and max(before) < 120
        after = [picture.mean() for picture in media.at_rate(path, times[first], times[99], fps)]
        assert min(after) > 120


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_a_telephone_s_video_is_turned_upright(matrix: tuple[int, ...], turns: int, tmp_path: Path) -> None:
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 250  # top left
    path = write(tmp_path / "turned.mp4", (np.stack([frame] * 30), np.zeros(30000, np.float32)))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # of the track's matrix: a, b, 0, c, d, 0 as 16.16 numbers, here in whole ones
    a, b, c, d = matrix
    data[place : place + 24] = b"".join((value * 65536).to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0))
    path.write_bytes(data)
    upright = np.rot90(frame, turns)
    for side in (None, 32):
        picture = next(media.pictures(path, longest_side=side))[1]
        step = 64 // max(picture.shape)
        assert picture.shape == upright[::step, ::step].shape
        assert np.abs(picture.astype(int) - upright[::step, ::step]).mean() < 20
    (row, *_) = scenes.split(video_row(path.name), settings_for(tmp_path, tmp_path, skip=("faces",)))
    assert (row.height, row.width) == upright.shape[:2]


def test_sound_lies_where_its_time_stamps_say(tmp_path: Path) -> None:
    waveform = np.random.default_rng(0).normal(0, 1e-3, 4 * 16000).astype(np.float32)
    clicks = [0.5, 1.7, 3.2]
    for time_ in clicks:
        waveform[round(time_ * 16000) : round(time_ * 16000) + 16] = 0.9
    path = write(tmp_path / "clicks.mp4", (np.zeros((100, 48, 64, 3), np.uint8), waveform))
    for start in (0.0, 0.25, 1.5, 3.0):
        samples, heard = media.sound(path, start, start + 0.6, 16000)
        (expected,) = (click - start for click in clicks if start <= click < start + 0.6)
        assert len(samples) == 9600 and heard == pytest.approx(0.6, abs=0.01)
        assert int(np.abs(samples).argmax()) / 16000 == pytest.approx(expected, abs=0.003)
    samples, heard = media.sound(path, 3.5, 5.0, 16000)
    assert len(samples) == 24000 and heard == pytest.approx(0.5, abs=0.05) and not samples[9600:].any()


# Scenes


def test_a_hard_cut_divides_a_video_and_long_scenes_are_cut_into_equal_pieces(raw: Path, tmp_path: Path) -> None:
    settings = settings_for(raw, tmp_path, skip=("faces",))
    first, second = scenes.split(video_row("two scenes.mp4"), settings)
    assert [first.start, first.end, second.start, second.end] == pytest.approx([0, 1.2, 1.2, 2.8])
    assert first.failure is None and (first.width, first.height, first.fps) == (320, 240, 25)
    short, long = scenes.split(video_row("two scenes.mp4"), replace(settings, min_seconds=1.5))
    assert short.failure[:2] == ["scenes", "too short"] and long.failure is None
    pieces = scenes.split(video_row("two scenes.mp4"), replace(settings, skip=("scenes", "faces"), max_seconds=1.3))
    assert [p.start for p in pieces] == pytest.approx([0, 2.8 / 3, 5.6 / 3])
    assert [p.end for p in pieces] == pytest.approx([2.8 / 3, 5.6 / 3, 2.8])


def empty_mp4(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.add_stream("aac", rate=48000, layout="mono")
        file.mux(stream.encode(None))


def truncated_mkv(path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (150, 48, 64, 3), np.uint8)
    whole = path.with_suffix(".whole.mkv")
    with av.open(str(whole), "w") as file:
        stream, audio = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=48000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode(None))
        file.mux(audio.encode(None))
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    whole.unlink()


HOSTILE = {
    "empty.mp4": (lambda path: path.write_bytes(b""), "cannot be read"),
    "noise.mkv": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(20000)), "cannot be read"),
    "playlist.mp4": (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"), "cannot be read"),
    "folder.mp4": (lambda path: path.mkdir(), "cannot be read"),
    "gone.mp4": (lambda path: None, "cannot be read"),
    "zero.mp4": (empty_mp4, None),
    "truncated.mkv": (truncated_mkv, "truncated"),
    "silent.mp4": (lambda path: write(path, (np.zeros((50, 48, 64, 3), np.uint8), None), sound=False), "no sound"),
    "slow.mp4": (
        lambda path: write(path, (np.zeros((20, 48, 64, 3), np.uint8), np.zeros(160000)), fps=2),
        "frame rate too low",
    ),
    "wide.mp4": (
        lambda path: write(path, (np.zeros((30, 32, 4096, 3), np.uint8), np.zeros(20000))),
        "picture too large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_video_that_cannot_be_used_is_one_row_with_its_reason(name: str, tmp_path: Path) -> None:
    make, cause = HOSTILE[name]
    make(tmp_path / name)
    (row,) = apply(
        {"scenes": "x"}, video_row(name), settings_for(tmp_path, tmp_path, max_pixels=100_000, skip=("faces",))
    )
    assert row.failure is not None and row.failure[0] == "scenes" and row.failure[2]
    assert not row.error, row.failure
    assert cause is None or row.failure[1] == cause, row.failure


def test_a_video_of_eight_hours_is_refused_by_a_stated_limit(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "long.mkv"), "w") as file:
        stream, audio = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=48000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):  # 39 pictures, and one after eight hours
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
            frame.pts = number if number < 39 else 8 * 3600 * 25
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        file.mux(audio.encode(None))
    (row,) = apply({"scenes": "x"}, video_row("long.mkv"), settings_for(tmp_path, tmp_path, skip=("faces",)))
    assert row.failure[1] == "too long" and "--max-hours 4" in row.failure[2]


def test_any_name_any_link_and_any_place_is_met_once(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "raw" / "out"
    (raw / "deep" / "er").mkdir(parents=True)
    out.mkdir()
    names = ["a b.mp4", "</script><b>.MP4", "-x.mkv", "ü\n.webm", os.fsdecode(b"\xff\xfe.mp4"), "deep/er/http:x.avi"]
    for name in names:
        (raw / name.replace("</", "<")).write_bytes(name.encode("utf-8", "surrogateescape"))
    (raw / "deep" / "loop").symlink_to(raw)
    (raw / "self.mp4").symlink_to(raw / "self.mp4")
    (raw / "z same.mp4").symlink_to(raw / "a b.mp4")
    (raw / "z copy.mp4").write_bytes((raw / "a b.mp4").read_bytes())
    (raw / "notes.txt").write_text("no video")
    (out / "own.mp4").write_bytes(b"x")
    os.mkfifo(raw / "pipe.mp4")
    rows = {row.source: row for row in videos.find_videos(raw, out.resolve())}
    unusable = {
        "self.mp4": "cannot be read", "pipe.mp4": "cannot be read",
        "z same.mp4": "same file", "z copy.mp4": "same file",
    }  # fmt: skip
    assert set(rows) == {name.replace("</", "<") for name in names} | set(unusable)
    assert len({row.id for row in rows.values()}) == len(rows)
    causes = {source: row.failure[1] for source, row in rows.items() if row.failure}
    assert causes == unusable
    table = Table(tmp_path / "table.jsonl")
    table.put(rows.values())
    table.save()
    assert Table(table.path).rows == table.rows
    cut_out = [replace(row, box=[0.0] * 4, start=0.0, end=1.0) for row in rows.values()]
    review.write_page(tmp_path, {row.id: row for row in cut_out}, settings_for(raw, out))
    assert {clip["id"] for clip in clips_of(tmp_path)} == {row.id for row in cut_out}


# Faces, quality, sync


@pytest.mark.parametrize(
    ("source", "cause"), [("crowd", "several faces"), ("edge", "partial face"), ("nobody", "no face")]
)
def test_none_several_and_partial_faces_are_dropped(
    raw: Path, models: Path, tmp_path: Path, source: str, cause: str
) -> None:
    row = replace(video_row(f"{source}.mp4"), start=0.0, end=1.2, width=WIDTH, height=HEIGHT, fps=25.0)
    (row,) = apply({"faces": "x"}, row, settings_for(raw, tmp_path, models))
    assert row.failure[:2] == ["faces", cause] and not row.error


def test_the_crop_is_one_square_around_the_face_in_all_pictures(raw: Path, models: Path, tmp_path: Path) -> None:
    row = replace(video_row("two scenes.mp4"), start=0.0, end=1.2, width=WIDTH, height=HEIGHT, fps=25.0)
    (row,) = faces.crop(row, settings_for(raw, tmp_path, models))
    x, y = 16 * NOSE[0], 16 * NOSE[1]
    sides = [16 * side for side in SIDES]
    assert row.face_box == pytest.approx([x - sides[0], y - sides[1], x + sides[2], y + sides[3]])
    left, top, right, bottom = row.box
    assert right - left == pytest.approx(bottom - top) == pytest.approx(1.1 * 64)
    assert (left + right) / 2 == pytest.approx(x + 8) and (top + bottom) / 2 == pytest.approx(y + 8)
    (row,) = clip.measure(row, {}, settings_for(raw, tmp_path, models), lambda stage: None)
    assert row.failure is None and (tmp_path / "review" / f"{row.id}.jpg").is_file()
    with av.open(str(tmp_path / "clips" / f"{row.id}.mp4")) as shown:
        assert shown.streams.video[0].frames == 30 and shown.streams.audio
    # The detector's eyes are a quarter and three quarters of 16 pixels from the cell's corner, half way down.
    eyes = np.array([x + 4, y + 8, x + 12, y + 8]) - np.array([left, top, left, top])
    assert row.eyes_box[0] < eyes[0] / 70.4 < eyes[2] / 70.4 < row.eyes_box[2]
    assert row.eyes_box[1] < eyes[1] / 70.4 < row.eyes_box[3] < row.mouth_box[3]


def test_a_crop_stays_inside_the_picture_and_never_cuts_the_face() -> None:
    assert faces.square([0, 0, 100, 100], 1.1, 200, 400) == pytest.approx([0, 0, 110, 110])
    assert faces.square([90, 300, 199, 400], 1.5, 200, 400) == pytest.approx([36.5, 236.5, 200, 400])
    assert faces.square([10, 10, 190, 100], 1.5, 200, 300) == pytest.approx([0, 0, 200, 200])
    with pytest.raises(Drop, match="partial face"):
        faces.square([0, 10, 300, 100], 1.1, 400, 200)


def test_quality_is_that_of_the_first_picture_cut_out(raw: Path, tmp_path: Path) -> None:
    seen = []
    row = replace(video_row("two scenes.mp4"), start=1.2, end=2.8, fps=25.0, box=[100.0, 60.0, 200.0, 160.0])
    (row,) = quality.assess(row, settings_for(raw, tmp_path), lambda pixels: seen.append(pixels) or 42.1234)
    assert row.quality == 42.123 and seen[0].shape == (64, 64, 3)
    truth = media.cut(scene(2, 1.6, level=0.4)[0][0], row.box, 64)
    assert np.abs(seen[0].astype(int) - truth).mean() < 3


def test_sound_is_as_loud_as_it_was_recorded(tmp_path: Path) -> None:
    tone = (0.5 * np.sin(np.arange(44100) * 0.1) * 32767).astype(np.int16)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(np.stack([tone, tone], axis=1).tobytes())
    samples, seconds = media.sound(tmp_path / "tone.wav", 0.0, 0.9, 16000)
    assert seconds == pytest.approx(0.9, abs=0.01)
    assert float(np.sqrt(np.mean(samples[1000:] ** 2))) == pytest.approx(0.5 / 2**0.5, rel=0.02)


def test_hyperiqa_reads_the_published_format_without_the_network(tmp_path: Path) -> None:
    hypernet = pytest.importorskip("pyiqa.archs.hypernet_arch", reason="the pyiqa package is not installed")
    timm = pytest.importorskip("timm")
    create, timm.create_model = timm.create_model, lambda *a, **k: create(*a, **{**k, "pretrained": False})
    try:
        torch.manual_seed(0)
        network = hypernet.HyperNet(pretrained=False).eval()
    finally:
        timm.create_model = create
    torch.save({"params": network.state_dict()}, tmp_path / quality.HYPERIQA)
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    with torch.no_grad():
        expected = 100 * float(network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255))
    assert quality.hyperiqa(tmp_path)(pixels) == pytest.approx(expected, rel=1e-4)


# Decisions and review


def test_the_reviewer_wins_over_scores_and_nothing_wins_over_a_clip_that_cannot_be_made() -> None:
    def decided(row: Row, min_quality: float, min_confidence: float) -> tuple[str, str, str]:
        limits = {"min_quality": min_quality, "min_confidence": min_confidence}
        row = decide(row, Settings(raw="", out="", models="", **limits))
        return row.decision, row.stage, row.cause

    row = replace(video_row("x.mp4"), quality=39.9, sync_confidence=4.9)
    assert decided(row, 40, 5) == ("drop", "quality", "low quality")
    assert decided(row, 39, 5) == ("drop", "sync", "out of sync") and decided(row, 39, 4) == ("keep", "", "")
    assert decided(replace(row, verdict="keep"), 40, 5)[0] == "keep"
    assert decided(replace(row, verdict="drop"), 0, 0)[1] == "review"
    failed = replace(row, verdict="keep").fail("faces", "no face", "0 faces")
    assert decided(failed, 0, 0) == ("drop", "faces", "no face")


def test_the_page_shows_the_most_doubtful_first_and_no_name_ends_its_script(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tmp_path)
    rows = [
        replace(video_row(name), id=name, start=0.0, end=2.0, box=[0.0, 0, 1, 1], quality=q, sync_confidence=c)
        for name, q, c in (("sure", 80.0, 9.0), ("</script><script>alert(1)</script>", 60.0, 5.1), ("bad", 39.0, None))
    ]
    review.write_page(tmp_path, {row.id: row for row in [*rows, video_row("never cut out")]}, settings)
    page = (tmp_path / "review.html").read_text("utf-8")
    assert page.count("</script>") == 2
    assert [clip["id"] for clip in clips_of(tmp_path)] == [rows[1].id, "bad", "sure"]


def test_verdicts_are_read_from_json_and_csv_and_refused_when_they_make_no_sense(tmp_path: Path) -> None:
    assert review.read_verdicts(tmp_path) is None
    (tmp_path / "verdicts.json").write_text('{"verdicts": {"a-1": "keep", "b-2": "drop", "c": ""}}')
    assert review.read_verdicts(tmp_path) == {"a-1": "keep", "b-2": "drop", "c": ""}
    other = tmp_path / "mine.csv"
    other.write_text("\ufeffid,verdict,note\na-1,drop,blurred\nb-2,,\n", "utf-8")
    assert review.read_verdicts(tmp_path, other) == {"a-1": "drop", "b-2": ""}
    other.write_text("id,verdict\na-1,maybe\n")
    with pytest.raises(PrepareError, match="'maybe'; keep, drop"):
        review.read_verdicts(tmp_path, other)
    (tmp_path / "verdicts.json").write_text("[1, 2")
    with pytest.raises(PrepareError, match=r"verdicts\.json holds no verdicts"):
        review.read_verdicts(tmp_path)


# All of it


def test_videos_become_shards_and_a_second_run_does_only_what_is_new(
    raw: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ours, out = tmp_path / "raw", tmp_path / "out"
    ours.mkdir()
    for path in raw.iterdir():
        os.link(path, ours / path.name)
    skip = ("--skip", "sync")

    rows, asked = run(ours, out, models, "--min-quality", "30", *skip)
    causes = {source: [row.cause for row in rows[source]] for source in rows}
    assert causes == {
        "two scenes.mp4": ["", "low quality"],
        "crowd.mp4": ["several faces"],
        "edge.mp4": ["partial face"],
        "nobody.mp4": ["no face"],
        "broken.mp4": ["cannot be read"],
    }
    bright, dark = rows["two scenes.mp4"]
    assert bright.quality > 30 > dark.quality and all(row.skipped == ["sync"] for row in (bright, dark))
    shards = Shards(out / "shards")
    assert [sample.key for sample in shards.samples] == [bright.key] and len(shards.encoders["vae"]) == 16
    assert shards.samples[0].frames == 36
    layers = 36, *shards.names(0)["speech"][1:]
    assert shards.names(0) == {
        "latents": (36, 4, 8, 8), "speech": layers, "emotion": (36,), "face_embedding": (512,), "focus": (8, 8),
    }  # fmt: skip
    assert shards.read(0, "latents").dtype == torch.float16 and int(shards.read(0, "emotion").max()) < 9
    assert (
        0 < float(shards.read(0, "focus").float().mean()) < 1
        and float(shards.read(0, "face_embedding").abs().max()) > 0
    )
    assert shards.meta(0)["source"] == "two scenes.mp4" and not list((out / "encoded").iterdir())
    assert "1 several faces" in capsys.readouterr().out and (out / "funnel.png").is_file()

    again, asked = run(ours, out, models, "--min-quality", "30", *skip)
    assert asked == [] and again == rows

    # A lower threshold only encodes, a verdict takes out; what is measured is not measured again.
    _, asked = run(ours, out, models, "--min-quality", "1", *skip)
    assert asked == [("encode", "two scenes.mp4")]
    keys = {row.key for row in Table(out / "table.jsonl").rows.values() if row.decision == "keep"}
    assert {sample.key for sample in Shards(out / "shards").samples} == keys and len(keys) == 2
    (out / "verdicts.json").write_text(json.dumps({"verdicts": {bright.id: "drop", dark.id: "keep"}}))
    capsys.readouterr()
    rows, asked = run(ours, out, models, "--min-quality", "30", *skip)
    assert "samples taken out of the shards: 1 (0.00 h): 1 (0.00 h) reviewer\n" in capsys.readouterr().out
    assert asked == [] and [row.decision for row in rows["two scenes.mp4"]] == ["drop", "keep"]
    assert [sample.key for sample in Shards(out / "shards").samples] == [rows["two scenes.mp4"][1].key]

    # A new video, and one that changed.
    write(ours / "new.mp4", scene(7, 1.2))
    (ours / "broken.mp4").unlink()
    (ours / "broken.mp4").write_bytes(b"other")
    rows, asked = run(ours, out, models, "--min-quality", "30", *skip)
    assert sorted(asked) == sorted(
        [("scenes faces", "new.mp4"), ("scenes faces", "broken.mp4"), ("quality encode", "new.mp4")]
    )
    assert len(rows["broken.mp4"]) == 1 and len(Shards(out / "shards")) == 2
    with pytest.raises(ShardError, match="128 px"):
        run(ours, out, models, "--size", "128", *skip)


def test_taking_samples_out_writes_only_their_shards_and_survives_a_kill_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(folder: Path) -> dict[str, float]:
        shards = Shards(folder)
        return {
            s.key: float(shards.read(i, "latents").sum()) + shards.meta(i)["n"] for i, s in enumerate(shards.samples)
        }

    class Killed(BaseException):
        pass

    for kill in (0, 1, 2, 3, None):  # at the shard's rename, the index's, two deletions, never
        folder = tmp_path / str(kill)
        with ShardWriter(folder, samples_per_shard=2) as writer:
            for n in range(6):
                writer.add(f"c{n}", {"latents": torch.full((1, 2), n)}, {"n": n})
        before, untouched = contents(folder), (folder / "clips-000002.tar").stat().st_mtime_ns
        calls, replace_, unlink = [], os.replace, Path.unlink

        def counted(function, calls=calls, kill=kill):
            def call(*args, **kwargs):
                calls.append(args)
                if len(calls) - 1 == kill:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace_))
            patch.setattr(Path, "unlink", counted(unlink))
            try:
                ShardWriter(folder).remove({"c0", "c1", "c3"})
            except Killed:
                assert kill is not None
        kept = {key: value for key, value in before.items() if key not in ("c0", "c1", "c3")}
        assert contents(folder) == (before if kill in (0, 1) else kept)
        assert len(calls) == 4 or kill is not None
        assert (folder / "clips-000002.tar").stat().st_mtime_ns == untouched
        with ShardWriter(folder) as writer:  # a later run finishes it, and writes over no shard
            writer.remove({"c0", "c1", "c3"})
            writer.add("new", {"latents": torch.full((1, 2), 9)}, {"n": 9})
        assert contents(folder) == {**kept, "new": 27.0}
        assert {path.name for path in folder.iterdir()} == {"index.json", *(s.shard for s in Shards(folder).samples)}


def test_a_damaged_file_costs_its_row_and_can_be_tried_again(raw: Path, models: Path, tmp_path: Path) -> None:
    args = arguments(raw, tmp_path, models, "--skip", "scenes", "faces", "quality", "sync")
    only = replace(video_row("two scenes.mp4"), id="a", start=0.0, end=1.2, fps=25.0, box=[0.0, 0, 64, 64])

    class Damaging(Inline):
        def __call__(self, work: Work, rows: Iterable[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
            for row in rows:
                row = replace(row, key=clip.sample_key(row, work["encode"])).finish(work)
                id, results = row.id, [row]
                path = tmp_path / "encoded" / f"{results[0].key}.safetensors"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"\xff" * 100)
                yield id, results

    settings, table = command.check(args), Table(tmp_path / "table.jsonl")
    digests = settings.digests()
    table.put([replace(only, done={stage: digests[stage] for stage in ("scenes", "faces")})])
    work = pipeline._Run(settings, Damaging(), table, retry=True)
    work.present = {only.source}
    work.encode()
    assert table.rows["a"].failure[:2] == ["encode", "damaged file"] and table.rows["a"].decision == "drop"
    assert not list((tmp_path / "encoded").iterdir())
    work.engine = Inline()
    work.encode()
    assert table.rows["a"].failure is None and len(Shards(tmp_path / "shards")) == 1


def test_latents_and_speech_are_those_of_the_clip(raw: Path, models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = settings_for(raw, tmp_path, models)
    second = scenes.split(video_row("two scenes.mp4"), replace(settings, skip=("faces",)))[1]
    row = replace(second, key="k", box=[96.0, 56.0, 224.0, 184.0])
    encode.encode(row, settings)
    tensors = load_file(tmp_path / "encoded" / "k.safetensors")
    assert set(tensors) == {"latents", "speech", "emotion"}  # no face was looked for
    frames, waveform = scene(2, 1.6, level=0.4)
    vae, speech, _, _ = encode._networks(str(models), "cpu")
    nearest = [frames[round(i * FPS / 30 - 1e-6)] for i in range(0, 48, 6)]
    truth = encode._latents(vae, [media.cut(frame, row.box, 64) for frame in nearest]).float()
    assert tensors["latents"].shape == (48, 4, 8, 8)
    assert float((tensors["latents"][::6].float() - truth).norm() / truth.norm()) < 0.1
    hidden = encode_audio(waveform, 16000, speech, context=None).embeddings[:48, NEIGHBOURS].flatten()
    assert float(torch.corrcoef(torch.stack([hidden, tensors["speech"].float().flatten()]))[0, 1]) > 0.97


@pytest.fixture
def cheap(raw: Path, models: Path, tmp_path: Path):
    """A function that prepares RAW_DIR without encoders; what was asked of the stages, and the rows by id."""
    ours, out = tmp_path / "raw", tmp_path / "out"
    ours.mkdir()
    (ours / "a.mp4").write_bytes((raw / "two scenes.mp4").read_bytes())

    def prepare(**more) -> tuple[list[tuple[str, str]], dict[str, Row]]:
        engine = Inline()
        settings = command.check(arguments(ours, out, models, "--skip", "faces", "quality", "sync", "encode"))
        return engine.asked, pipeline.prepare(settings, engine, **more).rows

    prepare.raw, prepare.out = ours, out
    return prepare


def test_a_renamed_folder_is_not_new_and_what_is_gone_is_said_and_pruned_when_asked(
    cheap, capsys: pytest.CaptureFixture
) -> None:
    _, rows = cheap()
    first, second = sorted(rows)
    (cheap.out / "verdicts.json").write_text(json.dumps({"verdicts": {first: "drop"}}))
    assert cheap()[1][first].decision == "drop"
    (cheap.raw / "deep").mkdir()
    (cheap.raw / "a.mp4").rename(cheap.raw / "deep" / "b.mp4")
    (cheap.raw / "a.mp4").write_bytes(b"something else")
    os.utime(cheap.raw / "deep" / "b.mp4", (0, 0))
    asked, rows = cheap()
    assert ("scenes faces", "a.mp4") in asked and len(rows) == 3
    assert {rows[id].source for id in (first, second)} == {"deep/b.mp4"} and rows[first].verdict == "drop"

    (cheap.raw / "deep" / "b.mp4").unlink()
    (cheap.raw / "a.mp4").unlink()
    assert len(cheap()[1]) == 3
    assert "1 clips of 1 sources that are gone; --prune takes them out" in capsys.readouterr().out
    assert cheap(prune=True)[1] == {} and not list((cheap.out / "clips").iterdir())
    assert "gone" not in capsys.readouterr().out


def test_a_file_of_verdicts_changes_only_the_clips_it_names(cheap, tmp_path: Path) -> None:
    first, second = sorted(cheap()[1])
    extra = tmp_path / "extra.csv"
    extra.write_text(f"id,verdict\n{first},drop\n")
    cheap(verdicts=extra)
    extra.write_text(f"id,verdict\n{second},keep\n")
    cheap(verdicts=extra)
    _, rows = cheap()
    assert (rows[first].verdict, rows[second].verdict) == ("drop", "keep")
    extra.write_text(f"id,verdict\n{first},\n")
    cheap(verdicts=extra)
    _, rows = cheap()
    assert (rows[first].verdict, rows[second].verdict) == ("", "keep")


def test_one_run_at_a_time_works_in_a_folder_and_a_killed_one_does_not_keep_others_out(cheap) -> None:
    cheap()
    lock = cheap.out / pipeline.LOCK
    assert not lock.exists()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lock.write_text(f"{other.pid} {platform.node()}")
        with pytest.raises(PrepareError, match=f"another run .pid {other.pid}. works here"):
            cheap()
        assert lock.exists()
    cheap()  # it ended
    lock.write_text("1 elsewhere")
    with pytest.raises(PrepareError, match="pid 1 on elsewhere"):
        cheap()
    lock.write_text("")  # killed between making and writing it
    cheap()
    assert not lock.exists()


PAGE_IN_NODE = r"""
const page = require("fs").readFileSync(process.argv[1], "utf-8"), saved = JSON.parse(process.argv[2]);
const [, data] = page.match(/application\/json">(.*)<\/script>/), [, code] = page.match(/<script>\n([^]*?)<\/script>/);
const node = () => ({append() {}, replaceChildren() {}, setAttribute() {}, value: "all", textContent: ""});
const nodes = {data: {textContent: data}}, buttons = [];
const createElement = tag => { const made = node(); if (tag === "button") buttons.push(made); return made };
globalThis.document = {createElement, querySelector: node, getElementById: id => nodes[id] ??= node()};
globalThis.location = {pathname: "/review.html"};
globalThis.scrollTo = () => {};
globalThis.localStorage = {getItem: key => saved[key] ?? null, setItem: (key, value) => { saved[key] = value }};
const verdicts = new Function(code + "; return verdicts")();
if (process.argv[3]) buttons[1].onclick();  // Drop, on the first clip
console.log(JSON.stringify({saved, verdicts}));
"""


def test_the_browser_remembers_what_was_judged_there_until_other_verdicts_are_read(tmp_path: Path) -> None:
    node = shutil.which("node") or pytest.skip("needs node")
    rows = [replace(video_row(n), id=n, start=0.0, end=2.0, box=[0.0, 0, 1, 1], verdict="keep") for n in ("a", "b")]

    def open_page(rows: list[Row], saved: dict, press: str = "") -> dict:
        review.write_page(tmp_path, {row.id: row for row in rows}, settings_for(tmp_path, tmp_path))
        words = [node, "-e", PAGE_IN_NODE, str(tmp_path / "review.html"), json.dumps(saved), press]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    first = open_page(rows, {}, "drop")
    assert first["verdicts"] == {"a": "drop", "b": "keep"}
    assert [json.loads(value) for value in first["saved"].values()] == [{"a": "drop"}]
    scored = [replace(row, quality=50.0) for row in rows]
    assert open_page(scored, first["saved"])["verdicts"] == {"a": "drop", "b": "keep"}
    read = [replace(rows[0], verdict="keep"), replace(rows[1], verdict="drop")]
    assert open_page(read, first["saved"])["verdicts"] == {"a": "keep", "b": "drop"}


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs signal.alarm")
def test_a_worker_whose_parent_is_gone_ends_by_itself(
    raw: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = command.check(arguments(raw, tmp_path, models, "--skip", "sync", "encode"))
    row = replace(video_row("two scenes.mp4"), start=1.4, end=2.6, fps=25.0, box=[96.0, 56.0, 224.0, 184.0])
    monkeypatch.setenv("SLEEP_ON_DARK", "1")
    worker = Worker(tmp_path / "log")
    worker._start()
    request = {
        "work": {"quality": "x"},
        "row": row.to_json(),
        "settings": asdict(settings),
        "limit": -4.5,
    }  # 5 s are added
    worker._process.stdin.write(json.dumps(request).encode() + b"\n")
    worker._process.stdin.flush()
    try:
        assert worker._process.wait(timeout=50) == -signal.SIGALRM
    finally:
        worker.close()


def test_another_gpu_gets_another_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    first = engines._own_worker(str(tmp_path))
    assert engines._own_worker(str(tmp_path)) is first
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert engines._own_worker(str(tmp_path)) is not first


def test_an_absent_package_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prepare.settings.find_spec", lambda name: None)
    missing = " ".join(settings_for(tmp_path, tmp_path).missing())
    assert 'pyiqa: pip install "comfyui-memo[metrics]"' in missing
    assert 'scenedetect: pip install "comfyui-memo[training]"' in missing


def test_what_ended_in_an_error_is_run_again_only_when_asked(
    raw: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = ("--skip", "faces", "sync", "encode")
    monkeypatch.setenv("FAIL_ON_DARK", "1")
    rows, _ = run(raw, tmp_path, models, *skip)
    bright, dark = rows["two scenes.mp4"]
    assert dark.cause == "error" and "out of memory" in dark.detail and bright.cause != "error"
    monkeypatch.delenv("FAIL_ON_DARK")
    assert run(raw, tmp_path, models, *skip)[1] == []
    engine = Inline()
    table = pipeline.prepare(command.check(arguments(raw, tmp_path, models, *skip)), engine, retry=True)
    assert engine.asked == [("quality", "two scenes.mp4")] and table.rows[dark.id].quality > 0


def test_what_is_missing_is_said_at_once_before_any_work(raw: Path, tmp_path: Path) -> None:
    args = arguments(raw, tmp_path / "out", tmp_path / "empty", "--scorer", Settings.scorer)
    with pytest.raises(PrepareError) as caught:
        command.check(args)
    for word in (
        "scrfd_10g_bnkps.onnx",
        quality.HYPERIQA,
        "syncnet_v2.model",
        "vae/config.json",
        "emotion2vec/model.pt",
    ):
        assert word in str(caught.value)
    assert "--skip sync" in str(caught.value) and "memo_core download" in str(caught.value)
    assert not (tmp_path / "out").exists()
    command.check(arguments(raw, tmp_path / "out", tmp_path / "empty", "--skip", "faces", "quality", "sync", "encode"))


def test_a_worker_that_dies_or_hangs_costs_one_row_and_can_be_tried_again(
    raw: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(raw, tmp_path, models, "--skip", "sync", "encode")
    settings = command.check(args)
    clips = scenes.split(video_row("two scenes.mp4"), replace(settings, skip=("faces",)))
    rows = [replace(row, box=[96.0, 56.0, 224.0, 184.0]) for row in clips]
    monkeypatch.setenv("CRASH_ON_DARK", "1")
    with Local(tmp_path, 1, limit=60) as engine:
        results = dict(engine({"quality": "x"}, [rows[1], rows[0]], settings))
    (dead,), (alive,) = results[rows[1].id], results[rows[0].id]
    assert dead.failure[:2] == ["quality", "worker died"] and dead.error
    assert alive.failure is None and alive.quality > 0
    monkeypatch.delenv("CRASH_ON_DARK")
    monkeypatch.setenv("SLEEP_ON_DARK", "1")
    with Local(tmp_path, 1, limit=4) as engine:
        ((_, (late,)),) = engine({"quality": "x"}, [rows[1]], settings)
    assert late.failure[:2] == ["quality", "time limit"] and late.error


@pytest.mark.slow
def test_processes_and_ray_give_the_same_rows(
    raw: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "ray[data]"')
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: minutes on a busy machine
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    tables = []
    for name in ("local", "ray"):
        out = tmp_path / name
        settings = command.check(arguments(raw, out, models, "--min-quality", "30", "--skip", "sync", "encode"))
        small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        with Local(out, 1, 60) if name == "local" else OnRay(out, 60, **small) as engine:
            tables.append(pipeline.prepare(settings, engine).rows)
    assert len(tables[0]) == 6 and tables[0] == tables[1]
    assert {row.cause for row in tables[0].values()} >= {"", "low quality", "several faces", "cannot be read"}


@pytest.mark.slow
def test_what_ray_loses_costs_its_rows(
    raw: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "ray[data]"')
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    rows = [replace(video_row(name), id=name) for name in ("nobody.mp4", "edge.mp4")]
    with OnRay(tmp_path / "no such folder", 60, **small) as engine:  # its workers cannot begin there
        results = dict(engine({"scenes": "x"}, rows, settings_for(raw, tmp_path, models)))
    assert len(results) == 2
    assert all(row.failure[1] == "worker died" and row.error for (row,) in results.values())


def test_the_picture_counts_every_row_once(tmp_path: Path) -> None:
    rows = [replace(video_row("a"), id=str(i)) for i in range(10)]
    rows[0] = rows[0].fail("scenes", "no sound", "x")
    rows[1] = rows[1].fail("faces", "no face", "x")
    rows[2] = replace(rows[2], quality=1.0)
    rows[3] = replace(rows[3], verdict="drop")
    settings = settings_for(tmp_path, tmp_path)
    found = picture.Funnel(decide(row, settings) for row in rows)
    assert found.total == 10 and [left for _, left, _ in found.steps] == [9, 8, 7, 7, 6, 6]
    assert picture.draw_funnel(found, settings).size == (1200, 520)
    assert "no face" in picture.describe_funnel(found, settings)
