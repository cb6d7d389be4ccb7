"""Sound, videos, pictures and command lines from strangers, 500 (`make test`: 100) kinds of damage each: typed errors,
and soon."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
from common import examples
from fuzzing import assert_no_foreign, damaged
from PIL import Image

from memo_core.checkpoint import download
from memo_core.cli import main
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.errors import AudioError, CheckpointError, MemoError, PortraitError, VideoError
from memo_core.inputs.pictures import open_picture
from memo_core.inputs.portrait import prepare_portrait
from memo_core.inputs.recording import Recording
from memo_core.pipeline import MemoPipeline
from memo_core.video.read import read_video

RUNS = examples(500, fast=100)
SOUNDS = {"wav": "pcm_s16le", "mp3": "mp3", "flac": "flac", "ogg": "opus", "m4a": "aac", "webm": "opus", "mkv": "ac3"}
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "EPS", "PPM", "TGA", "ICO", "DDS", "SGI", "IM", "XBM")


def sound_file(path: Path, codec: str) -> bytes:
    wave = (np.sin(np.arange(14400) / 20) * 9000).astype(np.int16)[None]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=48000, layout="mono")
        converter = av.AudioResampler(stream.format, "mono", 48000, frame_size=stream.codec_context.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
        frame.sample_rate = 48000
        for piece in [*converter.resample(frame), *converter.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return path.read_bytes()


def video_file(path: Path, codec: str) -> bytes:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=30)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for number in range(6):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 48, 3), 40 * number, np.uint8), "rgb24")))
        file.mux(stream.encode(None))
    return path.read_bytes()


def test_sound(tmp_path: Path) -> None:
    whole = [sound_file(tmp_path / f"whole.{kind}", codec) for kind, codec in SOUNDS.items()]
    names = [f"voice.{kind}" for kind in SOUNDS]
    heard = 0
    for seed in range(RUNS):
        rng = random.Random(seed)
        path = tmp_path / rng.choice(names)
        path.write_bytes(damaged(rng.choice(whole), rng))
        heard += assert_no_foreign(lambda: Recording(path).mono(16000), AudioError)
    assert RUNS // 4 < heard < RUNS  # where something can be heard, it is


def test_videos(tmp_path: Path) -> None:
    whole = [video_file(tmp_path / name, codec) for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx"))]
    for seed in range(RUNS):
        rng = random.Random(seed)
        path = tmp_path / rng.choice(("b.mp4", "b.webm"))
        path.write_bytes(damaged(rng.choice(whole), rng))
        assert_no_foreign(lambda: list(read_video(path)[1]), VideoError)


def test_pictures(tmp_path: Path) -> None:
    Image.init()
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (24, 20, 4), np.uint8))
    whole = []
    for kind in PICTURES:
        if kind not in Image.SAVE:
            continue
        mode = {"GIF": "P", "XBM": "1", "EPS": "RGB", "JPEG": "RGB", "PPM": "RGB", "SGI": "RGB", "IM": "RGB"}.get(kind)
        path = tmp_path / "whole"
        pixels.convert(mode or "RGBA").save(path, kind)
        whole.append(path.read_bytes())
    seen = 0
    for seed in range(RUNS):
        rng = random.Random(seed)
        path = tmp_path / "portrait.png"
        path.write_bytes(damaged(rng.choice(whole), rng))
        seen += assert_no_foreign(lambda: prepare_portrait(open_picture(path), 64), PortraitError)
    assert RUNS // 10 < seen < RUNS


WORDS = (
    *("generate", "emotion", "info", "sheet", "download", "toon", "released", "voice.wav", "portrait.png", "absent"),
    *("--start", "--duration", "--size", "--steps", "--guidance", "--seed", "--budget", "--checkpoint", "--device"),
    *("--dtype", "--lora", "--emotion", "--crop", "--face", "--context", "--horizon", "--store", "--no-store", "-o"),
    *("--memory-in", "--memory-out", "--frames", "--columns", "--only", "--speed", "--separate-vocals", "--help"),
    *("1", "0", "-1", "1e308", "-1e308", "nan", "inf", "64", "65536", "63", "1e-320", "9" * 400, "64x64", "x", "64x"),
    *("~nobody/x", "~", "", ".", "..", "/", "/dev/null", "a\0b", "\ud800", "\udcff.mp4", "10:30.mp4", "http:127.0.0.1"),
    *("meta", "mps", "xpu", "cuda", "cuda:7", "cpu:3", "vulkan", "bfloat16", "happy", "detect", "local", "whole"),
    *("x" * 300 + ".mp4", "out.mp4", "out.png", "out.xyz", ":", "a:b", "a:1e400", "voice.wav:1", "memo", "%s", "{}"),
)


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each run ends where networks would be loaded or the network be asked."""

    def end(*_: object, **__: object) -> None:
        raise CheckpointError("nothing is loaded here")

    monkeypatch.setattr(MemoPipeline, "from_pretrained", end)
    monkeypatch.setattr(Emotion2Vec, "from_pretrained", end)
    monkeypatch.setattr("memo_core.checkpoint.load.load", end)
    monkeypatch.setattr(download, "download", end)
    monkeypatch.chdir(tmp_path)
    sound_file(tmp_path / "voice.wav", "pcm_s16le")
    Image.new("RGB", (64, 64)).save("portrait.png")
    for seed in range(RUNS):
        rng = random.Random(seed)
        words = {
            0: [],
            1: ["generate", "portrait.png", "voice.wav"],
            2: ["emotion", "voice.wav"],
            3: [rng.choice(("info", "sheet", "generate", "emotion", "download"))],
        }[rng.randrange(4)]
        words = words + [rng.choice(WORDS) for _ in range(rng.randrange(5))]
        try:
            assert_no_foreign(lambda: main(words), MemoError, seconds=10)
        except AssertionError as error:
            raise AssertionError(f"{shlex.join(words)!r}: {error}") from error
        said = capsys.readouterr().err.splitlines()
        warned = [line for line in said if not line.startswith("memo: error: ")]
        assert len(said) - len(warned) <= 1 and len(said) <= 2 and "Traceback" not in "".join(said), words
