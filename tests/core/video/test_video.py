"""Streaming MP4: what is written is what is read, at any size and rate, in constant memory, and never half a file."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import FIXTURES, ROOT

from memo_core.errors import VideoError
from memo_core.video.read import probe, read_video
from memo_core.video.write import VideoWriter


def coloured_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Four flat colours, red green blue grey, and a white column that moves two pixels a frame."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2] = 255, 0, 0
    frames[:, : height // 2, width // 2 :] = 0, 255, 0
    frames[:, height // 2 :, : width // 2] = 0, 0, 255
    frames[:, height // 2 :, width // 2 :] = 128, 128, 128
    for index, frame in enumerate(frames):
        frame[:, (2 * index) % width :][:, :4] = 255
    return frames


def tone(seconds: float, rate: int, hertz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def decoded_sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as file:
        rate = file.streams.audio[0].rate
        return np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], 1), rate


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets writing fail once a file has `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_frames_come_back_with_their_colours_and_their_order(tmp_path: Path) -> None:
    frames = coloured_frames(20)
    with VideoWriter(tmp_path / "a.mp4", 96, 64, 30) as writer:
        writer.write_frames(frames[0])
        writer.write_frames(torch.from_numpy(frames[1:]))
    info, decoded = read_video(tmp_path / "a.mp4")
    read = np.stack(list(decoded))
    assert (info.frames, info.width, info.height, info.fps, info.audio_duration) == (20, 96, 64, 30.0, None)
    assert read.shape == frames.shape and read.dtype == np.uint8
    corners = np.s_[:, [8, 8, 56, 56], [40, 88, 40, 88]]  # the column has not come there in frames 6 to 16
    assert np.abs(read[corners][6:16].astype(int) - frames[corners][6:16]).max() <= 6
    columns = read.astype(int).sum((1, 3)).argmax(1)
    assert all(abs(column - 2 * index) <= 3 for index, column in enumerate(columns))


@pytest.mark.parametrize(("fps", "count"), [(30, 37), (25, 10), (29.97, 31), (60, 7)])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000])
@pytest.mark.parametrize("sound_seconds", [0.1, 5.0])
def test_picture_and_sound_last_equally_long(
    tmp_path: Path, fps: float, count: int, rate: int, sound_seconds: float
) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 64, 64, fps, rate) as writer:
        writer.write_audio(tone(sound_seconds, rate))
        writer.write_frames(np.zeros((count, 64, 64, 3), np.uint8))
    info = probe(path)
    assert info.frames == count and info.fps == pytest.approx(fps)
    assert info.duration == pytest.approx(count / fps, abs=1e-3)
    assert info.audio_duration == pytest.approx(count / fps, abs=3e-3)
    sound, decoded_rate = decoded_sound(path)
    assert -0.003 <= sound.shape[1] / decoded_rate - count / fps < 0.024  # decoders give whole packets of 1024 samples


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_sound_keeps_its_place_in_time(tmp_path: Path, rate: int) -> None:
    clicks = np.zeros((2, 2 * rate), np.float32)
    clicks[0, rate // 2 : rate // 2 + rate // 100] = 0.8
    clicks[1, 3 * rate // 2 : 3 * rate // 2 + rate // 100] = 0.8
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 30, rate) as writer:
        for second in range(2):
            writer.write_frames(np.zeros((30, 64, 64, 3), np.uint8))
            writer.write_audio(clicks[:, second * rate : (second + 1) * rate])
    sound, decoded_rate = decoded_sound(tmp_path / "a.mp4")
    onsets = [np.flatnonzero(np.abs(channel) > 0.3)[0] / decoded_rate for channel in sound]
    assert onsets == pytest.approx([0.5, 1.5], abs=0.003)  # left first, right second


def test_one_channel_plays_on_both_sides_and_more_than_two_are_averaged(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 30, 48000) as writer:
        writer.write_frames(np.zeros((60, 64, 64, 3), np.uint8))
        writer.write_audio(torch.from_numpy(tone(1, 48000)))
        writer.write_audio(np.stack([tone(1, 48000), tone(1, 48000), np.zeros(48000, np.float32)]))
    sound, _ = decoded_sound(tmp_path / "a.mp4")
    np.testing.assert_allclose(sound[0], sound[1], atol=5e-3)
    assert np.abs(sound[0, 12000:36000]).max() == pytest.approx(0.5, abs=0.03)
    assert np.abs(sound[0, 60000:84000]).max() == pytest.approx(0.5 * 2 / 3, abs=0.03)


def test_packets_of_sound_and_picture_alternate_even_if_all_sound_came_first(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 64, 64, 30, 16000) as writer:
        writer.write_audio(tone(20, 16000))
        writer.write_frames(coloured_frames(600, 64, 64))
    with av.open(str(path)) as file:
        packets = sorted(
            (packet.pos, packet.stream.type, float(packet.dts * packet.time_base))
            for packet in file.demux()
            if packet.dts is not None
        )
    latest = {"video": 0.0, "audio": 0.0}
    for _, kind, time in packets:
        latest[kind] = time
        assert abs(latest["video"] - latest["audio"]) < 1.5  # in file order, neither runs ahead
    with path.open("rb") as file:
        head = file.read(4096)
    assert head.index(b"moov") < 64  # the index is in front, so that players start before they have everything


def test_metadata_says_in_words_that_ai_made_it_and_keeps_a_workflow(tmp_path: Path) -> None:
    workflow = {"nodes": [{"id": index, "text": "ä" * 100} for index in range(500)]}
    metadata = {"model": "toon", "seed": 42, "workflow": workflow, "comment": "my own words"}
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 30, metadata=metadata) as writer:
        writer.write_frames(coloured_frames(2, 64, 64))
    tags = probe(tmp_path / "a.mp4").metadata
    for word in ("made by AI", "model toon", "seed 42"):
        assert word in tags["description"]
    assert tags["comment"] == "my own words" and tags["seed"] == "42"
    assert json.loads(tags["workflow"]) == workflow
    with VideoWriter(tmp_path / "b.mp4", 64, 64, 30) as writer:
        writer.write_frames(coloured_frames(2, 64, 64))
    assert "made by AI" in probe(tmp_path / "b.mp4").metadata["comment"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((511, 512), r"511x512.*510x512 or 512x512"),
        ((513, 255), r"512x254 or 512x256 or 514x254 or 514x256"),
        ((1, 64), "2 to 16384"),
        ((64, 20000), "2 to 16384"),
    ],
)
def test_sizes_h264_cannot_have_are_refused_with_the_nearest(
    tmp_path: Path, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(VideoError, match=message):
        VideoWriter(tmp_path / "a.mp4", *size, 30)
    assert list(tmp_path.iterdir()) == []


def test_small_and_oblong_sizes_work(tmp_path: Path) -> None:
    for width, height in ((2, 2), (16, 2), (34, 66), (512, 64)):
        with VideoWriter(tmp_path / "a.mp4", width, height, 30) as writer:
            writer.write_frames(np.full((3, height, width, 3), 200, np.uint8))
        info, frames = read_video(tmp_path / "a.mp4")
        assert (info.width, info.height) == (width, height)
        assert np.abs(np.stack(list(frames)).astype(int) - 200).max() <= 3


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for fps in (0, -1, float("nan"), 2000):
        with pytest.raises(VideoError, match="fps"):
            VideoWriter(path, 64, 64, fps)
    with pytest.raises(VideoError, match="sample_rate is 0"):
        VideoWriter(path, 64, 64, 30, 0)
    with pytest.raises(VideoError, match=r"a\.avi.*\.mp4"):
        VideoWriter(tmp_path / "a.avi", 64, 64, 30)
    with pytest.raises(VideoError, match="there is no folder"):
        VideoWriter(tmp_path / "none" / "a.mp4", 64, 64, 30)
    with VideoWriter(path, 64, 64, 30, 16000) as writer:
        for wrong in (np.zeros((64, 64, 3)), np.zeros((64, 65, 3), np.uint8), np.zeros((1, 1, 64, 64, 3), np.uint8)):
            with pytest.raises(VideoError, match=r"allowed is uint8 \[N, 64, 64, 3\]"):
                writer.write_frames(wrong)
        for wrong in (np.zeros(100, np.int16), np.zeros((1, 1, 100), np.float32), np.zeros((0, 100), np.float32)):
            with pytest.raises(VideoError, match="allowed is float"):
                writer.write_audio(wrong)
        with pytest.raises(VideoError, match="NaN"):
            writer.write_audio(np.array([0.0, np.nan], np.float32))
        writer.write_frames(coloured_frames(1, 64, 64))
    with pytest.raises(VideoError, match="already closed"):
        writer.write_frames(coloured_frames(1, 64, 64))
    with VideoWriter(path, 64, 64, 30) as silent, pytest.raises(VideoError, match="without a sample_rate"):
        silent.write_frames(coloured_frames(1, 64, 64))
        silent.write_audio(tone(1, 16000))


def test_an_exception_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 64, 64, 30) as writer:
        writer.write_frames(coloured_frames(5, 64, 64))
        raise RuntimeError("stop")
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_no_frames_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frames"), VideoWriter(tmp_path / "a.mp4", 64, 64, 30, 16000) as writer:
        writer.write_audio(tone(1, 16000))
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 30) as writer:
        assert writer.finish(partial=True) is None
    assert list(tmp_path.iterdir()) == []


def test_partial_finish_after_an_exception_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(RuntimeError), VideoWriter(path, 64, 64, 30, 16000) as writer:
        try:
            writer.write_audio(tone(10, 16000))
            writer.write_frames(coloured_frames(23, 64, 64))
            raise RuntimeError("stop")
        except RuntimeError:
            assert writer.finish(partial=True) == path
            raise
    info, frames = read_video(path)
    assert info.frames == len(list(frames)) == 23
    assert info.audio_duration == pytest.approx(23 / 30, abs=0.003)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_encoding_leaves_every_frame_so_far_playable(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import signal, sys, numpy as np
        from memo_core.video.write import VideoWriter
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
        noise = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), dtype=np.uint8)
        with VideoWriter(sys.argv[1], 256, 256, 30, 16000) as writer:
            try:
                print("writing", flush=True)
                while True:
                    writer.write_frames(noise)
            except KeyboardInterrupt:
                writer.finish(partial=True)
                print(writer.frames_written)
    """)
    path = tmp_path / "a.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        written = int(process.communicate(timeout=60)[0])
    finally:
        process.kill()
    info, frames = read_video(path)
    assert info.frames == written == sum(1 for _ in frames) and written > 0
    assert info.audio_duration == pytest.approx(written / 30, abs=0.003)


@pytest.mark.parametrize("size", [0, 2000, 30_000])
def test_full_disk_is_an_error_and_leaves_no_broken_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    for partial in (False, True):
        refused = pytest.raises(VideoError, match="cannot write")
        with largest_file(size), refused, VideoWriter(path, 64, 64, 30, 16000) as writer:
            writer.write_frames(noise)
            writer.finish(partial=partial)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(VideoError, match="it is a folder"):
        VideoWriter(tmp_path / "a.mp4", 64, 64, 30)


def test_without_any_h264_encoder_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for available in ({"aac", "mpeg4"}, {"h264_cuvid"}, {"libx264rgb"}):  # none; only decodes; lacks yuv420p
        monkeypatch.setattr(av, "codecs_available", available)
        with pytest.raises(VideoError, match="no H.264 encoder.*pip install av"):
            VideoWriter(tmp_path / "a.mp4", 64, 64, 30)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_video_errors(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"none\.mp4"):
        probe(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(VideoError, match=r"text\.mp4"):
        read_video(tmp_path / "text.mp4")
    speech = FIXTURES / "memo_tiny" / "speech.wav"
    with pytest.raises(VideoError, match="holds no video"):
        probe(speech)


@pytest.mark.slow
def test_eighteen_thousand_frames_cost_no_memory(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import resource, sys, numpy as np
        from memo_core.video.write import VideoWriter
        frames = np.repeat(np.arange(30, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3) * 8
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
        with VideoWriter(sys.argv[1], 32, 32, 30, 16000) as writer:
            for second in range(600):
                writer.write_audio(np.zeros(16000, np.float32))
                writer.write_frames(frames)
                if second == 3:
                    before = peak()
        print(peak() - before)
    """)
    path = tmp_path / "a.mp4"
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    info = probe(path)
    assert info.frames == 18_000 and info.audio_duration == pytest.approx(600, abs=0.003)
    assert float(result.stdout) < 100


# ---- files of others


def film(path: Path, seconds: float = 2.0, codec: str = "libx264", **options: str) -> Path:
    """A video whose picture is darker on its left and lights up with time."""
    with av.open(f"file:{path}", "w", options=options) as file:
        stream = file.add_stream(codec, rate=30, options={"g": "30"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(round(seconds * 30)):
            pixels = np.full((48, 64, 3), 100 + number, np.uint8)
            pixels[:, :32] = 20
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode(None))
    return path


def turned(path: Path, quarter_turns: int) -> Path:
    """Writes into an MP4's track header that it is to be shown turned so many times clockwise, as telephones do."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 4 * 2 + 4 * 2
    a, b = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns]
    numbers = (a, b, 0, -b, a, 0, 0, 0, 1)
    units = (2**16, 2**16, 2**30) * 3
    packed = b"".join((number * unit).to_bytes(4, "big", signed=True) for number, unit in zip(numbers, units))
    data[matrix : matrix + 36] = packed
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_video_filmed_sideways_stands_upright(tmp_path: Path, quarter_turns: int) -> None:
    about, frames = read_video(turned(film(tmp_path / "a.mp4"), quarter_turns))
    frame = next(frames)
    assert frame.shape == ((48, 64, 3), (64, 48, 3))[quarter_turns % 2]
    assert (about.height, about.width) == frame.shape[:2]
    dark = np.rot90(np.pad(np.zeros((48, 32)), ((0, 0), (0, 32)), constant_values=1), -quarter_turns)
    assert ((frame[..., 0] > 60) == (dark > 0)).mean() > 0.95


@pytest.mark.parametrize("between_packets", [True, False])
def test_half_a_video_is_refused(tmp_path: Path, between_packets: bool) -> None:
    path = film(tmp_path / "a.mp4", movflags="faststart")
    with av.open(str(path)) as file:
        places = sorted(packet.pos for packet in file.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: places[36] + (0 if between_packets else 3)])
    assert probe(path).frames == 60
    # Cut between two packets, nothing but the length tells.
    with pytest.raises(
        VideoError, match=r"incomplete: it ends at 1\..* of 2\.00 s" if between_packets else "cannot read"
    ):
        list(read_video(path)[1])


def test_a_video_that_lists_frames_it_does_not_show_is_whole(tmp_path: Path) -> None:
    """What was cut without coding anew: an edit list that skips the beginning."""
    whole, cut = film(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    data = bytearray(whole.read_bytes())
    place = data.index(b"elst") + 4 + 4 + 4
    duration = int.from_bytes(data[place : place + 4], "big")
    media_time = int.from_bytes(data[place + 4 : place + 8], "big")
    scale = int.from_bytes(data[(mdhd := data.index(b"mdhd") + 4 + 12) : mdhd + 4], "big")
    data[place : place + 4] = (duration // 2).to_bytes(4, "big")
    data[place + 4 : place + 8] = (media_time + scale).to_bytes(4, "big")  # one second later
    cut.write_bytes(data)
    _, frames = read_video(cut)
    shown = list(frames)
    assert 25 <= len(shown) <= 35 and shown[0][0, -1, 0] > 120


def test_packets_without_a_picture_make_a_video_no_shorter(tmp_path: Path) -> None:
    """VP8 has frames that are never shown; and here the sound goes on after the picture."""
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as file:
        picture, sound = file.add_stream("libvpx", rate=30), file.add_stream("libopus", rate=48000, layout="mono")
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        picture.options = {"auto-alt-ref": "1", "lag-in-frames": "16"}
        for number in range(60):
            pixels = np.full((48, 64, 3), 4 * number, np.uint8)
            file.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(picture.encode(None))
        for number in range(200):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), "flt", "mono")
            frame.sample_rate, frame.pts = 48000, 960 * number
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    assert 58 <= len(list(read_video(path)[1])) <= 60


@pytest.mark.parametrize(
    ("path", "more"),
    [(3, {}), (None, {}), ("\ud800.mp4", {}), ("x" * 300 + ".mp4", {}), ("a.mp4", {"fps": "x"})],
    ids=str,
)
def test_what_cannot_be_written_is_a_typed_error(tmp_path: Path, monkeypatch, path, more) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError):
        VideoWriter(path, **{"width": 16, "height": 16, "fps": 30} | more)
    VideoWriter("whole.mp4", 16, 16, 30, 48000.0).discard()


@pytest.mark.parametrize("size", [64, 96, 128])
def test_equal_frames_give_equal_files(tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(size)
    still = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((size // 8, size // 8, 1))).astype(np.uint8)
    frames = np.stack([np.roll(still, 2 * i, axis=1) for i in range(48)])
    frames += rng.integers(0, 9, frames.shape).astype(np.uint8)
    files = set()
    for number in range(6):
        with VideoWriter(tmp_path / f"{number}.mp4", size, size, 30, 16000, {"seed": 1}) as writer:
            writer.write_audio(np.sin(np.arange(25600) / 9).astype(np.float32))
            writer.write_frames(frames)
        files.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("name", ["10:30.mp4", "http:127.0.0.1.mp4", "a b#?%d.mp4"])
def test_a_video_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 16, 16, 30) as writer:
        writer.write_frames(np.zeros((2, 16, 16, 3), np.uint8))
    assert os.listdir() == [name] and probe(name).frames == 2


def test_sound_is_taken_from_an_iterator_as_the_picture_goes_on(tmp_path: Path) -> None:
    taken = []

    def pieces():
        for number in range(10):
            taken.append(number)
            yield np.full((1, 1600), 0.1 * number, np.float32)

    with VideoWriter(tmp_path / "a.mp4", 16, 16, 10, 16000) as writer:
        writer.write_audio(pieces())
        writer.write_frames(np.zeros((3, 16, 16, 3), np.uint8))
        assert taken == [0, 1, 2]
        writer.write_frames(np.zeros((7, 16, 16, 3), np.uint8))
    assert probe(tmp_path / "a.mp4").audio_duration == pytest.approx(1, abs=0.05)

    def bad():
        yield np.full((1, 1600), np.nan, np.float32)

    writer = VideoWriter(tmp_path / "b.mp4", 16, 16, 10, 16000)
    writer.write_audio(bad())
    with pytest.raises(VideoError, match="NaN"):
        writer.write_frames(np.zeros((3, 16, 16, 3), np.uint8))
    writer.discard()
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_file_that_cannot_be_begun_is_an_error_twice_and_no_crash(tmp_path: Path) -> None:
    """FFmpeg dies of a header that it could not write, if it is asked to go on. In a process of its own."""
    code = """
        import os, sys
        import numpy as np
        from memo_core.errors import VideoError
        from memo_core.files import Unfinished
        from memo_core.video.write import VideoWriter
        writer = VideoWriter(sys.argv[1], 64, 64, 30, 16000)
        os.remove(writer._unfinished.temporary)
        writer._file.close()
        writer._unfinished.temporary.symlink_to("/dev/full")
        writer._run(lambda: writer._start({}))
        writer.write_audio(np.zeros(64000, np.float32))
        for step in (lambda: writer.write_frames(np.random.default_rng(0).integers(0, 255, (120, 64, 64, 3), np.uint8)),
                     lambda: writer.finish(partial=True)):
            try:
                step()
            except VideoError as error:
                print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.mp4")], cwd=ROOT, capture_output=True, text=True
    )
    said = result.stdout.splitlines()
    assert result.returncode == 0 and said, (result.returncode, result.stderr[-500:])
    assert all(line.endswith("a.mp4: No space left on device") for line in said), said
    assert os.listdir(tmp_path) == []
