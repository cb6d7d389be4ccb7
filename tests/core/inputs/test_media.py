"""Sound files as people have them, and as they should not be: holes, junk, joined files, playlists that name others."""

from __future__ import annotations

import os
import socket
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from memo_core.errors import AudioError, VideoError
from memo_core.inputs import recording as media
from memo_core.inputs.recording import Recording
from memo_core.inputs.sound import load_audio, prepare_waveform
from memo_core.video.read import read_video

RATE = 48000


def tone(seconds: float, rate: int = RATE, channels: int = 1, hertz: float = 440) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave.astype(np.float32)[None], channels, axis=0)


def write(
    path: Path,
    parts: list[tuple[float, np.ndarray]],
    codec: str,
    rate: int = RATE,
    picture: float = 0,
    cluster: int | None = None,
) -> Path:
    """A file whose sound consists of parts, each at its time in seconds; with so many seconds of picture. In Matroska
    `cluster` is how many milliseconds share a time."""
    options = {} if cluster is None else {"cluster_time_limit": str(cluster)}
    with av.open(f"file:{path}", "w", options=options) as file:
        video = file.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=30) if picture else None
        if video is not None:
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        layout = "stereo" if len(parts[0][1]) == 2 else "mono"
        stream = file.add_stream(codec, rate=rate, layout=layout)
        for number in range(round(picture * 30)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number % 250, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            file.mux(video.encode(frame))
        if video is not None:
            file.mux(video.encode(None))
        for time, samples in parts:
            # In pieces of 20 ms, which every codec here takes: their time stamps are kept.
            size = stream.codec_context.frame_size or 960
            converter = av.AudioResampler(stream.format, layout, rate, frame_size=size)
            whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
            whole.sample_rate, whole.time_base = rate, Fraction(1, rate)
            whole.pts = round(time * rate)
            for piece in [*converter.resample(whole), *converter.resample(None)]:
                file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return path


def loud(samples: torch.Tensor, rate: int = RATE) -> list[bool]:
    """Whether each tenth of a second is sounding."""
    return [float(part.abs().max()) > 0.05 for part in samples[0].split(rate // 10)]


# ---- what is not a recording


def test_a_file_reads_no_other_file_whatever_it_says(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.wav", [(0, tone(1))], "pcm_s16le")
    lists = {
        "voice.wav": "ffconcat version 1.0\nfile secret.wav\n",
        "absolute.mp3": f"ffconcat version 1.0\nfile {secret}\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "list.mpd": '<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation><BaseURL>secret.wav'
        "</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "stream.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AudioError, match="names other files; give the recording itself"):
            load_audio(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_what_a_list_names_is_not_opened(tmp_path: Path) -> None:
    """A pipe that was opened for reading can be opened for writing."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "voice.wav").write_text("ffconcat version 1.0\nfile pipe.wav\n")
    opened = []

    def watch() -> None:
        with pytest.raises(AudioError):
            load_audio(tmp_path / "voice.wav")
        opened.append(False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    thread.join(10)
    assert opened == [False], "it waits for the pipe"


def test_no_name_opens_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    for name in (f"http:127.0.0.1:{port}", f"tcp:127.0.0.1:{port}", f"http://127.0.0.1:{port}/a.wav"):
        with pytest.raises(AudioError, match="No such file"):
            load_audio(name)
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


@pytest.mark.parametrize("name", ["10:30.wav", "http:127.0.0.1.wav", "a%d b#?.wav", "-", "\udcff.wav"])
def test_any_name_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        os.rename(write(tmp_path / "plain.wav", [(0, tone(0.5))], "pcm_s16le"), name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this system has no such names")
    assert load_audio(name)[0].shape == (1, RATE // 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_a_pipe_does_not_make_it_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "voice.wav")
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(tmp_path / "voice.wav")


# ---- damage


def test_junk_in_the_middle_costs_what_it_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.mp3", [(0, tone(2, channels=2))], "mp3")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + os.urandom(500) + data[middle + 500 :])
    recording = Recording(path)
    assert recording.read().shape[1] / RATE == pytest.approx(2, abs=0.15)
    assert len(caplog.records) == 1 and "damaged" in caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_joined_files_of_other_rates_and_channels_are_heard_to_the_end(tmp_path: Path, order: tuple[int, int]) -> None:
    """As `cat a.mp3 b.mp3` makes them; ffmpeg gives both within a frame or two, too."""
    files = [
        write(tmp_path / "a.mp3", [(0, tone(2, 44100, 2))], "mp3", 44100),
        write(tmp_path / "b.mp3", [(0, tone(2, 22050, 1))], "mp3", 22050),
    ]
    joined = tmp_path / "joined.mp3"
    joined.write_bytes(b"".join(files[i].read_bytes() for i in order))
    samples, rate = load_audio(joined)
    assert (samples.shape[0], rate) == ((2, 44100), (1, 22050))[order[0]]
    assert samples.shape[1] / rate == pytest.approx(4, abs=0.15)
    assert 0.2 < samples[:, -rate // 2 : -rate // 4].abs().max() < 0.4, "as loud as it was written, on every channel"


# ---- time stamps


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libopus"), ("a.mkv", "pcm_s16le"), ("a.mkv", "aac")])
def test_a_hole_in_the_time_stamps_is_silence(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, [(0, tone(0.8)), (1.4, tone(0.6))], codec)
    samples, rate = load_audio(path)
    assert samples.shape[1] / rate == pytest.approx(2.0, abs=0.05)
    heard = loud(samples, rate)
    assert heard[1:7] == [True] * 6 and heard[9:13] == [False] * 4 and heard[15:19] == [True] * 4


def test_of_what_overlaps_the_first_is_heard(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [(0, tone(1.4)), (1.4, 0 * tone(1.2)), (2.6, tone(0.5))], "pcm_s16le", cluster=1)
    data = bytearray(path.read_bytes())
    place = data.find(b"\x1f\x43\xb6\x75")
    while place >= 0:  # every packet is a cluster with its own time: those from 1.4 s on come 0.6 s earlier
        time = data.index(b"\xe7\x82", place) + 2 if b"\xe7\x82" in data[place : place + 32] else None
        if time is not None and (value := int.from_bytes(data[time : time + 2], "big")) >= 1400:
            data[time : time + 2] = (value - 600).to_bytes(2, "big")
        place = data.find(b"\x1f\x43\xb6\x75", place + 4)
    path.write_bytes(data)
    samples, rate = load_audio(path)
    assert samples.shape[1] / rate == pytest.approx(2.5, abs=0.03)
    heard = loud(samples, rate)
    assert heard[:13] == [True] * 13 and not any(heard[15:19]) and all(heard[21:24])


def test_sound_that_begins_later_than_the_picture_stays_in_step(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [(0.5, tone(1))], "pcm_s16le", picture=1.5)
    samples, rate = load_audio(path)
    assert samples.shape[1] / rate == pytest.approx(1.5, abs=0.03)
    assert loud(samples, rate)[:4] == [False] * 4


def test_a_clock_that_begins_anew_is_no_overlap(tmp_path: Path) -> None:
    """Joined Ogg files: each counts from zero."""
    one = write(tmp_path / "a.ogg", [(0, tone(1))], "libopus").read_bytes()
    (tmp_path / "b.ogg").write_bytes(one + one)
    samples, rate = load_audio(tmp_path / "b.ogg")
    assert samples.shape[1] / rate >= 1.9


def test_a_wild_time_stamp_makes_no_hours_of_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [(0, tone(1)), (100_000, tone(1))], "pcm_s16le")
    with pytest.raises(AudioError, match="at most 10800 s"):
        load_audio(path)


# ---- as a stream


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_mono_equals_what_the_networks_are_given_of_the_whole(tmp_path: Path, rate: int) -> None:
    noise = np.random.default_rng(rate).uniform(-1, 1, (2, 7 * rate + 13)).astype(np.float32)
    path = write(tmp_path / "a.wav", [(0, noise)], "pcm_f32le", rate)
    recording = Recording(path)
    mono = recording.mono(16000)
    whole, read_rate = load_audio(path)
    assert torch.equal(mono, prepare_waveform(whole, read_rate))
    assert (recording.num_samples, recording.seconds) == (noise.shape[1], noise.shape[1] / rate)


def test_a_span_is_cut_from_the_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", [(0, tone(3))], "pcm_f32le")
    whole = load_audio(path)[0].numpy()
    for start, stop in ((0, 10), (1, RATE), (RATE + 7, 2 * RATE + 1), (2 * RATE, 9 * RATE)):
        assert np.array_equal(np.concatenate(list(Recording(path).span(start, stop)), axis=1), whole[:, start:stop])


def test_the_whole_is_refused_by_its_bytes_and_its_mono_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", [(0, tone(3, channels=2))], "flac")
    monkeypatch.setattr(media, "MAX_BYTES", 10**6)
    with pytest.raises(AudioError, match="make it mono at 16 kHz, or cut it"):
        load_audio(path)
    assert len(Recording(path).mono(16000)) == 48000


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    wave = tone(1)
    wave[0, 24000:24010] = np.nan
    with pytest.raises(AudioError, match=r"not finite numbers, the first at 0\.500 s"):
        Recording(write(tmp_path / "a.wav", [(0, wave)], "pcm_f32le")).mono(16000)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 16, 64])
def test_any_number_of_channels_is_read(tmp_path: Path, channels: int) -> None:
    import soundfile

    wave = np.stack([tone(0.5, 8000, hertz=200 + 10 * number)[0] for number in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    samples, rate = load_audio(tmp_path / "a.wav")
    assert rate == 8000 and np.array_equal(samples.numpy(), wave.T)


def test_a_codec_that_nobody_knows_is_named_as_that(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [(0, tone(0.5))], "pcm_s16le", picture=0.5)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"A_PCM/INT/LIT", b"A_XYZ/INT/LIT"))
    with pytest.raises(AudioError, match="coded in a way that FFmpeg does not know"):
        load_audio(path)
    path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_XYZG4/ISO/AVC"))
    with pytest.raises(VideoError, match="coded in a way that FFmpeg does not know"):
        read_video(path)
