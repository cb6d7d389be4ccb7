"""The `memo` command, run as users run it, on the small checkpoint."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import ROOT, thinned
from PIL import Image

from memo_core import MemoryState
from memo_core.cli import _prepare_allocator, build_parser, main
from memo_core.cli import generate as cli_generate
from memo_core.cli.generate import _command, _store, _write
from memo_core.errors import MemoError
from memo_core.sampling import clip as sampling
from memo_core.sampling.noise import window_noise
from memo_core.sampling.settings import PRESETS
from memo_core.video.read import probe, read_video
from memo_core.video.write import VideoWriter

pytestmark = pytest.mark.usefixtures("counted_once")
SECONDS = 0.8  # of the voice: 24 frames, a window and a half


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with face.png and voice.wav."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 70, 3), np.uint8)).save("face.png")
    _write_voice("voice.wav", SECONDS)
    return tmp_path


def _write_voice(path: str, seconds: float) -> None:
    time = np.arange(round(seconds * 16000)) / 16000
    samples = 0.4 * np.sin(2 * np.pi * 220 * time) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))
    with wave.open(path, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


@pytest.fixture
def generate(memo_tiny: Path):
    """Runs `memo generate face.png voice.wav` with a small size and few steps; gives the exit code."""

    def run(*more: str, voice: str = "voice.wav") -> int:
        small = ["--checkpoint", str(memo_tiny), "--size", "64", "--steps", "1", "--device", "cpu"]
        return main(["generate", "face.png", voice, *small, *more])

    return run


def _frames(path: str) -> np.ndarray:
    return np.stack(list(read_video(path)[1]))


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_second_run_renders_nothing(here, generate, capsys):
    assert generate("-o", "first.mp4") == 0 and "from the store" not in capsys.readouterr().out
    assert generate("-o", "second.mp4") == 0
    assert "2 of 2 windows from the store" in capsys.readouterr().out
    assert np.array_equal(_frames("second.mp4"), _frames("first.mp4"))
    assert generate("-o", "third.mp4", "--no-store") == 0 and "from the store" not in capsys.readouterr().out
    assert generate("-o", "fourth.mp4", "--store", "mine") == 0 and list(Path("mine").rglob("*.safetensors"))


def test_generate_makes_a_video_with_the_sound_of_the_voice_and_says_that_it_is_made_by_ai(here, generate, capsys):
    assert generate("--seed", "7", "--size", "128x64", "--emotion", "happy") == 0
    assert sorted(os.listdir()) == ["face.png", "voice.mp4", "voice.wav"]
    about = probe("voice.mp4")
    assert (about.frames, about.width, about.height, about.fps) == (24, 128, 64, 30)
    assert about.duration == pytest.approx(SECONDS, abs=1 / 30)
    assert about.audio_duration == pytest.approx(SECONDS, abs=1 / 30)
    statement = about.metadata["description"]
    assert "made by AI" in statement and "memo_tiny" in statement and "seed 7" in statement
    assert "24 frames" in capsys.readouterr().out


def test_a_draft_takes_few_steps_and_its_video_says_so(here, generate):
    short = ("--duration", "0.3", "--emotion", "null")
    assert generate(*short, "--steps", "30", "--speed", "draft", "-o", "draft.mp4") == 0
    draft = probe("draft.mp4").metadata
    assert draft["speed"] == "draft" and draft["steps"] == str(PRESETS["draft"].max_steps)
    assert generate(*short, "--speed", "exact", "-o", "exact.mp4") == 0
    assert "speed" not in probe("exact.mp4").metadata


def test_a_video_says_how_it_was_rendered_where_the_checkpoint_decides(here, generate, memo_tiny):
    """Not what was asked for: it has learnt its guidance, and brings its noise levels."""
    shutil.copytree(memo_tiny, "own")
    config = Path("own", "diffusion_net", "config.json")
    own = {"noise_levels": [1.0, 0.6, 0.0], "guidance_embedded": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    asked = ("--steps", "9", "--guidance", "3", "--duration", "0.1", "--emotion", "null")
    assert generate(*asked, "--checkpoint", "own", "-o", "own.mp4") == 0
    about = probe("own.mp4").metadata
    assert (about["steps"], about["guidance"]) == ("2", "1.0")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_named(name):
    args = build_parser().parse_args(["generate", "a", "b", "--speed", name])
    assert args.speed == name


def test_a_span_of_the_voice_gets_its_own_stretch_of_sound(here, generate):
    with wave.open("voice.wav", "rb") as file:
        half = file.readframes(6400)
    with wave.open("late.wav", "wb") as file:  # 0.4 s of silence, then sound
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(len(half)) + half)
    from memo_core.inputs.sound import load_audio

    loudness = []
    for start in ("0", "0.5"):
        span = ("--start", start, "--duration", "0.2")
        assert generate(*span, "--emotion", "null", "-o", "span.mp4", voice="late.wav") == 0
        assert probe("span.mp4").frames == 6
        loudness.append(float(load_audio("span.mp4")[0].abs().max()))
    assert loudness[0] < 0.01 and loudness[1] > 0.1


def test_a_video_longer_than_the_voice_ends_with_it(here, generate):
    assert generate("--start", "0.5", "--duration", "9", "--emotion", "null") == 0
    assert probe("voice.mp4").frames == 24 - 15


def test_going_on_from_a_saved_memory_equals_one_run(here, generate):
    assert generate("-o", "whole.mp4", "--memory-out", "whole.memory") == 0
    cut = f"{16 / 30:.6f}"
    assert generate("-o", "first.mp4", "--duration", cut, "--memory-out", "first.memory") == 0
    going_on = ("--start", cut, "--memory-in", "first.memory", "--memory-out", "rest.memory")
    assert generate("-o", "rest.mp4", *going_on) == 0
    states = [MemoryState.load(f"{name}.memory") for name in ("whole", "rest")]
    assert states[0].digest == states[1].digest  # the frames that were made are in it, bit by bit
    whole, rest = _frames("whole.mp4"), _frames("rest.mp4")
    assert len(whole) == 24 and len(rest) == 8
    # Each file's encoder loses a little of its own; another noise would be far away.
    assert np.abs(whole[16:].astype(int) - rest).mean() < 4
    assert np.abs(whole[:8].astype(int) - rest).mean() > 8


def test_horizon_limits_what_is_remembered(here, generate):
    assert generate("--horizon", "1", "--memory-out", "short.memory", "--emotion", "null") == 0
    assert len(MemoryState.load("short.memory").entries) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "steps"),
        (["--seed", "-1"], "seed"),
        (["--guidance", "nan"], "guidance"),
        (["--emotion", "hungry"], "hungry"),
        (["--size", "100"], "64"),
        (["--start", "5"], "lasts 0.80 s"),
        (["--device", "toaster"], "toaster"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--memory-in", "nothing.memory"], "nothing.memory"),
        (["--memory-in", "face.png"], "face.png"),
        (["--memory-out", "nowhere/state"], "nowhere"),
        (["-o", "nowhere/out.mp4"], "nowhere"),
        (["-o", "out.avi"], ".mp4"),
        (["-o", "voice.wav"], "replace voice.wav"),
        (["--separate-vocals"], "Kim_Vocal_2.onnx"),
    ],
    ids=lambda value: value[0] + "=" + value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_line_and_leaves_no_file(here, generate, capsys, more, said):
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert generate(*more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memo: error: ") and said in error
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


@pytest.mark.parametrize(
    ("portrait", "voice", "said"),
    [
        ("none.png", "voice.wav", "none.png"),
        ("voice.wav", "voice.wav", "not a picture"),
        ("face.png", "face.png", "audio"),
        ("face.png", "none.wav", "none.wav"),
    ],
)
def test_a_portrait_or_voice_that_is_none_is_named(here, memo_tiny, capsys, portrait, voice, said):
    assert main(["generate", portrait, voice, "--checkpoint", str(memo_tiny), "-o", "out.mp4"]) == 1
    assert said in capsys.readouterr().err
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", "a", "b", "--size", "big"],
        ["generate", "a", "b", "--start", "-1"],
        ["generate", "a", "b", "--duration", "0"],
        ["generate", "a", "b", "--horizon", "0"],
        ["generate", "a", "b", "--speed", "fast"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("memo") and "--help)" in said and said.count("\n") == 1, "one line, that says where to look"


def test_an_existing_video_stays_when_the_new_one_fails(here, generate, monkeypatch):
    Path("out.mp4").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "out.mp4")

    monkeypatch.setattr("memo_core.video.write.VideoWriter._encode_frames", full)
    assert generate("-o", "out.mp4", "--emotion", "null") == 1
    assert sorted(os.listdir()) == ["face.png", "out.mp4", "voice.wav"]
    assert Path("out.mp4").read_bytes() == b"old"


def _interrupt_when(
    here: Path, memo_tiny: Path, *more: str, finished_windows: int, by: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Runs `memo generate` in a process that gets a signal while it samples the window after so many finished ones."""
    # The process says when it starts a window: then, and only then, it is interrupted from outside.
    program = f"""
import signal, sys, time
from memo_core import cli
from memo_core.sampling import clip as sampling
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
count = 0
sample = sampling.sample_window
def announce(*args, **kwargs):
    global count
    count += 1
    if count > {finished_windows}:
        print("sampling", flush=True)
        time.sleep(60)
    return sample(*args, **kwargs)
sampling.sample_window = announce
sys.exit(cli.main(sys.argv[1:]))
"""
    argv = ["generate", "face.png", "voice.wav", "--checkpoint", str(memo_tiny), "--size", "64", "--steps", "1", *more]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == "sampling\n", said + process.stderr.read()
        process.send_signal(by)
        out, err = process.communicate()
    finally:
        guard.cancel()
        process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@pytest.mark.parametrize(
    "by",
    thinned([signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)], fast=[signal.SIGINT]),
    ids=["ctrl-c", "stopped", "closed"],
)
def test_an_interrupt_leaves_a_video_that_plays_and_the_command_that_goes_on(
    here, generate, memo_tiny, by, monkeypatch
):
    """The frames of both videos are, before the encoder, those of one run. After it they differ a little, because the
    second video begins with a picture of its own."""
    encoded: list[np.ndarray] = []
    write_frames = VideoWriter.write_frames
    monkeypatch.setattr(
        VideoWriter, "write_frames", lambda self, frames, **_: (encoded.append(frames), write_frames(self, frames))[1]
    )
    ended = _interrupt_when(here, memo_tiny, "-o", "a b.mp4", "--seed", "5", finished_windows=1, by=by)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    about = probe("a b.mp4")
    assert about.frames == len(_frames("a b.mp4")) == 16
    assert about.audio_duration == pytest.approx(16 / 30, abs=1 / 30)
    words = shlex.split(ended.stderr.strip().splitlines()[-1].split("To go on: ")[1])
    assert words[0] == "memo"
    assert main([*words[1:], "--no-store"]) == 0
    rest, second = words[words.index("--output") + 1], np.concatenate(encoded)
    assert _frames(rest).shape[0] == len(second) == 8
    encoded.clear()
    assert generate("-o", "whole.mp4", "--seed", "5", "--no-store") == 0
    assert np.array_equal(np.concatenate(encoded)[16:], second)
    assert np.abs(_frames("whole.mp4")[16:].astype(int) - _frames(rest)).mean() < 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_the_next_run_removes_what_a_killed_one_left_and_says_so(here, generate, memo_tiny, caplog):
    _interrupt_when(here, memo_tiny, "-o", "out.mp4", finished_windows=1, by=signal.SIGKILL)
    (left,) = here.glob(".out.mp4.*.part")
    assert generate("-o", "other.mp4") == 0 and left.exists()
    assert generate("-o", "out.mp4") == 0 and not left.exists()
    assert f"removed {left.name}, which a run that was killed had left" in caplog.text


@pytest.mark.slow
def test_equal_runs_give_equal_files(here, generate):
    for name in ("a.mp4", "b.mp4"):
        assert generate("-o", name, "--no-store") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize("name", thinned(["10:30.mp4", "http:127.0.0.1.mp4"], fast=["http:127.0.0.1.mp4"]))
def test_a_colon_in_a_name_is_no_address(here, generate, name):
    os.rename("voice.wav", "10:30.wav")
    assert generate("-o", name, voice="10:30.wav") == 0
    assert probe(name).frames == 24


@pytest.mark.parametrize("samples", [319_999, 320_001, 160, 8533, 8534, 16000 + 1])
def test_videos_are_as_long_as_their_sound_to_the_sample(here, generate, samples, monkeypatch):
    """As many frames as the recording spans, whatever its rate."""
    from memo_core.inputs.speech import count_frames

    seen: list[int] = []

    def counted(args: object, end: int, *_: object) -> None:
        seen.append(end)
        raise MemoError("nothing has to be rendered")

    monkeypatch.setattr(cli_generate, "_span", counted)
    for rate in (16000, 44100, 48000, 22050):
        count = round(samples * rate / 16000)
        with wave.open("v.wav", "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(bytes(4 * count))
        assert generate("-o", "o.mp4", voice="v.wav") == 1
        assert seen.pop() == count_frames(count, rate, 30)


@pytest.mark.parametrize("older", [False, True])
def test_an_error_keeps_what_is_finished(here, generate, monkeypatch, capsys, older):
    noise = window_noise

    def broken(seed: int, first_frame: int, shape: tuple[int, ...]):
        if first_frame:
            raise MemoError("the card caught fire")
        return noise(seed, first_frame, shape)

    monkeypatch.setattr(sampling, "window_noise", broken)
    if older:
        Path("out.mp4").write_bytes(b"old")
    assert generate("-o", "out.mp4") == 1
    said = capsys.readouterr().err
    assert "To go on: memo generate" in said and said.rstrip().endswith("memo: error: the card caught fire")
    kept = "out-partial.mp4" if older else "out.mp4"
    assert len(_frames(kept)) == 16 and (not older or Path("out.mp4").read_bytes() == b"old")
    assert MemoryState.load(kept.replace(".mp4", ".memory.safetensors")).windows == 1


@pytest.mark.slow
def test_ctrl_c_before_the_first_window_leaves_no_file(here, memo_tiny):
    ended = _interrupt_when(here, memo_tiny, finished_windows=0)
    assert ended.returncode == 130
    assert "no file was written" in ended.stderr
    assert sorted(os.listdir()) == ["face.png", "voice.wav"]


def test_the_command_to_go_on_keeps_every_choice():
    given = (
        "generate 'my face.png' v.wav --steps 7 --guidance 2.0 --size 128x64 --context whole --separate-vocals "
        "--crop none --face 1 --start 1.5 --duration 4 --emotion sad --dtype float16 --device cpu --output o.mp4 "
        "--speed draft "
        "--lora 'my face.safetensors' --lora b.safetensors:-0.35"
    )
    args = build_parser().parse_args(shlex.split(given))
    again = build_parser().parse_args(shlex.split(_command(args, {}))[1:])
    assert vars(again) == vars(args)


# --- emotion, info, sheet, download -----------------------------------------------------------------------------------


def test_emotion_prints_spans_that_fill_the_voice_and_draws_them(here, memo_tiny, capsys):
    _write_voice("long.wav", 3.5)
    assert main(["emotion", "long.wav", "--checkpoint", str(memo_tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:-1]]
    assert rows[0][0] == "0.00" and rows[-1][2] == "3.50"
    assert all(later[0] == earlier[2] for earlier, later in zip(rows, rows[1:]))
    from memo_core import EMOTIONS

    assert all(row[4] in EMOTIONS and 0 < float(row[5]) <= 1 for row in rows)
    assert lines[-1] == "long.emotion.png"
    assert Image.open("long.emotion.png").size == (1200, 440)


def test_info_describes_a_checkpoint(memo_tiny, capsys):
    assert main(["info", str(memo_tiny)]) == 0
    out = capsys.readouterr().out
    from memo_core import MemoPipeline

    nets = MemoPipeline.from_pretrained(memo_tiny).nets
    assert nets.digest in out
    assert f"{sum(p.numel() for p in nets.diffusion_net.parameters()):,}" in out
    assert "missing      misc/vocal_separator/Kim_Vocal_2.onnx" in out


def test_info_describes_a_memory_state(here, generate, capsys):
    assert generate("--emotion", "null", "--memory-out", "state.memory") == 0
    capsys.readouterr()
    assert main(["info", "state.memory"]) == 0
    assert capsys.readouterr().out == MemoryState.load("state.memory").inspect() + "\n"


def test_info_names_what_a_checkpoint_lacks(here, memo_tiny, capsys):
    shutil.copytree(memo_tiny, "broken")
    Path("broken/vae/config.json").unlink()
    assert main(["info", "broken"]) == 1
    assert "vae/config.json" in capsys.readouterr().err


def test_sheet_shows_evenly_spaced_frames(here, capsys):
    from memo_core.video.write import VideoWriter

    with VideoWriter("v.mp4", 64, 32, 30) as writer:
        for level in range(0, 240, 4):
            writer.write_frames(np.full((32, 64, 3), level, np.uint8))
    assert main(["sheet", "v.mp4", "-o", "s.png", "--frames", "6", "--columns", "3"]) == 0
    picture = np.asarray(Image.open("s.png")).astype(int)
    assert picture.shape == (2 * 52, 3 * 64, 3)
    levels = [picture[row * 52 + 16, column * 64 + 32, 0] for row in (0, 1) for column in range(3)]
    assert np.abs(np.diff(levels) - 40).max() <= 3 and 12 <= levels[0] <= 28


def test_a_sheet_of_half_a_video_is_no_sheet(here, capsys):
    with VideoWriter("whole.mp4", 64, 64, 30) as writer:
        writer.write_frames(np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), np.uint8))
    data = Path("whole.mp4").read_bytes()
    Path("half.mp4").write_bytes(data[: len(data) * 7 // 10])
    assert main(["sheet", "half.mp4"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("memo: error: ") and "half.mp4" in said and said.count("\n") == 1
    assert not Path("half.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_a_pipe_in_place_of_any_file_is_one_line(here, memo_tiny, capsys):
    os.mkfifo("pipe")
    for argv in (
        ["generate", "pipe", "voice.wav"],
        ["generate", "face.png", "pipe"],
        ["generate", "face.png", "voice.wav", "--memory-in", "pipe"],
        ["emotion", "pipe", "--checkpoint", str(memo_tiny)],
        ["sheet", "pipe"],
        ["info", "pipe"],
    ):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("memo: error: ") and said.count("\n") == 1, argv


def test_download_without_network_shows_licences_and_says_which_file_goes_where(here, capsys, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    address = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody listens there
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)
    assert main(["download", "weights", "--only", "face", "vae"]) == 1
    out, error = capsys.readouterr()
    assert "NOT for commercial use" in out and "MIT" in out
    assert str(here / "weights" / "vae" / "diffusion_pytorch_model.safetensors") in error
    assert str(here / "weights" / "misc" / "face_analysis" / "models" / "glintr100.onnx") in error
    assert "wav2vec2" not in error
    assert main(["download", "weights", "--only", "feet"]) == 1


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_package_imports_nothing_heavy_until_asked_also_inside_another(tmp_path):
    (tmp_path / "custom_pack").mkdir()
    (tmp_path / "custom_pack" / "__init__.py").touch()
    shutil.copytree(ROOT / "memo_core", tmp_path / "custom_pack" / "memo_core")
    program = (
        "import sys, custom_pack.memo_core as memo, custom_pack.memo_core.cli\n"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'librosa', 'av', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(getattr(memo, name) is not None for name in memo.__all__)\n"
        "assert memo.MemoPipeline.__module__ == 'custom_pack.memo_core.pipeline'\n"
        "assert 'memo_core' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        check=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )


def test_the_version_is_that_of_the_package(capsys):
    import memo_core

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memo {memo_core.__version__}\n"


def test_every_folder_of_modules_is_packed():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.setuptools]\npackages = ")[2]
    listed = ast.literal_eval(settings.partition("]")[0] + "]")
    folders = {path.parent for path in (ROOT / "memo_core").rglob("*.py")}
    assert {".".join(path.relative_to(ROOT).parts) for path in folders} | {"memo_core.assets"} == set(listed)


@pytest.mark.parametrize("how", [["-m", "memo_core"], ["-I", "memo_core/__main__.py"]], ids=["module", "file"])
def test_the_command_runs_without_being_installed(how: list[str]):
    """As inside ComfyUI; -I is what a portable Python is like, which looks into no folder by itself."""
    done = subprocess.run([sys.executable, *how, "info", "/nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{ROOT / 'memo_core' / '__main__.py'} download /nowhere" in done.stderr


def test_inside_comfyui_the_store_is_comfyuis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the nodes have made the command finds, and the other way round."""
    monkeypatch.delenv("MEMO_STORE")
    file = Path("memo_core", "cli", "generate.py")
    monkeypatch.setattr(cli_generate, "__file__", str(tmp_path / "custom_nodes" / "memo" / file))
    assert _store(None).folder == tmp_path / "user" / "memo" / "windows"
    assert _store("mine").folder == Path("mine")
    monkeypatch.setattr(cli_generate, "__file__", str(tmp_path / "site-packages" / file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if sys.platform == "linux":
        assert _store(None).folder == tmp_path / "cache" / "memo" / "windows"


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "voice.wav.mp4", "--memory-out", "face.png"],
        ["-o", "a.mp4", "--memory-out", "voice.wav"],
        ["-o", "a.mp4", "--memory-out", "./a.mp4"],
        ["-o", "state.mp4", "--memory-in", "state.mp4"],
    ],
    ids=" ".join,
)
def test_nothing_that_is_read_or_just_made_is_written_over(here, generate, capsys, argv):
    Path("state.mp4").write_bytes(b"a state")
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert generate(*argv) == 1
    assert "would replace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.iterdir()} == before


def test_a_picture_is_no_video_to_be_replaced_by_its_sheet(here, capsys):
    before = Path("face.png").read_bytes()
    assert main(["sheet", "face.png"]) == 1
    assert "face.png would replace face.png; name another with -o" in capsys.readouterr().err
    assert Path("face.png").read_bytes() == before


@pytest.mark.parametrize("output", ["nowhere/a.mp4", "folder.mp4"])
def test_where_nothing_can_be_written_is_said_before_anything_is_read(here, capsys, output):
    Path("folder.mp4").mkdir()
    assert main(["generate", "absent.png", "absent.wav", "-o", output]) == 1
    assert f"cannot write {output}" in capsys.readouterr().err
    assert main(["emotion", "absent.wav", "-o", "a.txt"]) == 1
    assert "name a .png" in capsys.readouterr().err


def three_windows(stop_before: int | None = None) -> Iterator[SimpleNamespace]:
    for i in range(3):
        if i == stop_before:
            raise KeyboardInterrupt
        yield SimpleNamespace(memory=f"after {i}", stored=False, frames=torch.full((16, 3, 64, 64), i / 4))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("stop", [None, 0, 1, 2])
def test_the_memory_that_is_kept_is_that_of_the_last_window_in_the_file(here, beside: bool, stop: int | None) -> None:
    """Also where a window is encoded while the next one is sampled."""
    writer = VideoWriter("out.mp4", 64, 64, 30)
    memory, stopped, _ = _write(three_windows(stop), writer, "before", beside)
    done = 3 if stop is None else stop
    assert writer.frames_written == 16 * done and memory == ("before" if done == 0 else f"after {done - 1}")
    assert (stopped is None) == (stop is None)
    assert Path("out.mp4").exists() == (done > 0)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_window_that_cannot_be_encoded_beside_the_next_one_is_told(here, monkeypatch, broken: int) -> None:
    encode, count = VideoWriter._encode_frames, iter(range(9))

    def encoded(self: VideoWriter, frames: np.ndarray) -> None:
        if next(count) == broken:
            raise OSError(28, "No space left on device")
        encode(self, frames)

    monkeypatch.setattr(VideoWriter, "_encode_frames", encoded)
    with pytest.raises(MemoError, match="No space left"):
        _write(three_windows(), VideoWriter("out.mp4", 64, 64, 30), "before", beside=True)
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None)],
    ids=["by itself", "chosen"],
)
def test_torch_grows_its_pieces_of_memory_unless_told_otherwise(monkeypatch, given: dict, wanted: str | None) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _prepare_allocator()
    found = {os.environ[name] for name in names if name in os.environ}
    for name in names:
        os.environ.pop(name, None)
    assert found == ({wanted} if wanted else set(given.values()))
