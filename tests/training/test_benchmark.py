"""The paper's benchmark on drawn heads: clips are chosen, made again by any system, and measured; kills do no harm."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import wave
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import FIXTURES
from made_videos import talk, write_video
from safetensors.torch import load_file, save_file
from test_crop import Spotter, run_command, scene

from memo_core import devices
from memo_core.checkpoint.digest import base_digest
from memo_core.cli import main as memo
from memo_core.errors import VideoError
from memo_core.nets.weights import WEIGHTS
from training.evaluation.clips import choose_clips
from training.evaluation.crop import portrait_crop
from training.evaluation.metric import Tools
from training.evaluation.videos import frames_at

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
NAMES = [f"id0000{person}/video{clip}/00001" for person in (1, 2) for clip in (1, 2)]
COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people with two clips each, laid out as VoxCeleb2 is."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(NAMES):
        talk(folder / f"{name}.mp4", seed, 0.4)
    return folder


def run_benchmark(videos: Path, out: Path, *more: object) -> None:
    measures = ("--metrics", "psnr,ssim", "--people", 2, "--clips", 2, "--size", 128, "--crop", "none")
    run_command("benchmark", videos, out, *measures, *more)


# --- Which clips --------------------------------------------------------------------------------------------------


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_clips_of_a_folder_are_chosen_by_their_names_alone(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        touch(*(tmp_path / folder / f"id{p}/v{c % 2}/{c}.mp4" for p in range(9) for c in range(6)))
    touch(tmp_path / "there/few/v/1.mp4", tmp_path / "there/id0/notes.txt", tmp_path / "there/stray.mp4")
    chosen = choose_clips(tmp_path / "here", 4, 3)
    names = [clip.name for clip in chosen]
    assert names == [clip.name for clip in choose_clips(tmp_path / "there", 4, 3)]
    people = {name.split("/")[0] for name in names}
    assert len(people) == 4 and len(set(names)) == 12 and people != {f"id{p}" for p in range(4)}
    # Fewer clips of fewer people are some of them.
    assert {clip.name for clip in choose_clips(tmp_path / "here", 3, 2)} < set(names)
    assert chosen[0].source == tmp_path / "here" / f"{names[0]}.mp4"
    with pytest.raises(VideoError, match=r"46 people with 3 clips each were asked for, and .* has 9, of 9 folders"):
        choose_clips(tmp_path / "here", 46, 3)


def test_a_list_is_taken_whole(tmp_path: Path) -> None:
    touch(tmp_path / "lists/a/1.mp4", tmp_path / "far/b/c/2.mp4")
    path = tmp_path / "lists/ood.txt"
    path.write_text(f"# one and another\na/1.mp4\n\n{tmp_path}/far/b/c/2.mp4  # far\n")
    assert [(clip.name, clip.source) for clip in choose_clips(path)] == [
        ("a/1", tmp_path / "lists/a/1.mp4"),
        ("b/c/2", tmp_path / "far/b/c/2.mp4"),
    ]
    for text, said in (
        ("", "names no video"),
        ("a/1.mp4\na/1.mkv", "would both be a/1"),
        ("../far/b/c/2.mp4", "without .."),
    ):
        path.write_text(text)
        with pytest.raises(VideoError, match=said):
            choose_clips(path)


# --- All of it ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memo_on_two_people_and_another_system_beside_it(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    run_benchmark(videos, out, "--steps", 2)
    report = json.loads((out / "memo/report/report.json").read_text())
    assert [video["name"] for video in report["videos"]] == NAMES
    assert all(video["frames"] == 10 and video["fps"] == 25 for video in report["videos"])  # 0.4 s
    assert report["measures"]["ssim"]["videos"] == 4 and report["measures"]["ssim"]["value"] > 0.5
    assert report["settings"]["crop"] == "given" and "SSIM" in capsys.readouterr().out

    # The default generator is `memo generate`.
    given = out / "inputs" / NAMES[0]
    words = [f"{given}.png", f"{given}.wav", "-o", str(tmp_path / "own.mp4"), "--steps", "2", "--crop", "none"]
    assert memo(["generate", *words, "--no-store"]) == 0
    made = list(frames_at(out / f"memo/generated/{NAMES[0]}.mp4", 30))
    own = list(frames_at(tmp_path / "own.mp4", 30))
    assert len(made) == len(own) == 12 and all((a == b).all() for a, b in zip(made, own, strict=True))

    # Another system sees the same pictures and voices, and stands beside it. This one copies what is real.
    (tmp_path / "copying.py").write_text(
        "import pathlib, shutil\n"
        "def copy(portrait, voice, output):\n"
        f"    name = portrait.relative_to({str(out / 'inputs')!r}).with_suffix('.mp4')\n"
        f"    shutil.copy({str(videos)!r} / name, output)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run_benchmark(videos, out, "--system", "real", "--generator", "copying:copy")
    rows = [line.split("|") for line in (out / "systems.md").read_text().splitlines()]
    assert [row[1].strip() for row in rows[2:]] == ["memo", "real"] and "SSIM" in rows[0][4 - 1]
    assert float(rows[3][3]) == pytest.approx(1, abs=1e-3) or float(rows[3][4]) == 100

    with pytest.raises(SystemExit, match="begun with steps 2, not 3; give another --system"):
        run_benchmark(videos, out, "--steps", 3)
    with pytest.raises(SystemExit, match="begun with clips of 4 names, not of 2 names; give that, or another OUT"):
        run_command("benchmark", videos, out, "--people", 1, "--clips", 2, "--size", 128, "--crop", "none")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One that was shown faces with little room around them."""
    folder = shutil.copytree(FIXTURES / "memo_tiny", tmp_path / "checkpoint")
    path = folder / "diffusion_net/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_margin": 0.05}))
    return folder


def test_what_changes_the_videos_is_kept(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's margin and weights, the data set's place, and where the videos are made."""
    monkeypatch.setattr(Tools, "analyzer", Spotter())
    sound = np.sin(np.arange(16000 // 5) / 20).astype(np.float32) / 2
    first = scene(0)
    for folder in ("here", "there"):
        write_video(tmp_path / folder / "id0/v/1.mp4", [first] * 5, sound=sound)
    out = tmp_path / "out"
    few = ("--metrics", "psnr", "--people", 1, "--clips", 1, "--size", 64, "--steps", 1)

    def benchmark(*more: object, videos: str = "here") -> None:
        run_command("benchmark", tmp_path / videos, out, *few, "--checkpoint", checkpoint, *more)

    benchmark()
    kept = json.loads((out / "clips.json").read_text())
    assert kept["margin"] == 0.05 and kept["videos"] == str(tmp_path / "here")
    shown = next(frames_at(tmp_path / "here/id0/v/1.mp4", 25))
    crop = portrait_crop(shown, Spotter().detect(shown)[0], 64, 64, 0.05)
    assert crop != portrait_crop(shown, Spotter().detect(shown)[0], 64, 64)
    assert json.loads((out / "inputs/id0/v/1.json").read_text()) == asdict(crop)
    assert json.loads((out / "memo/report/report.json").read_text())["settings"]["margin"] == 0.05
    system = json.loads((out / "memo/system.json").read_text())
    assert system["weights"] == base_digest(checkpoint)
    assert (system["device"], system["dtype"]) == ("cpu", "float32")

    with pytest.raises(SystemExit, match=r"begun with videos .*here, not .*there; give that, or another OUT"):
        benchmark(videos="there")
    copying = ("--system", "real", "--generator", f"{sys.executable} -c '{COPY}' {{portrait}} {{output}}")
    with pytest.raises(SystemExit, match=r"begun with margin 0.05, not 0.35; give that, or another OUT"):
        benchmark(*copying)
    made = out / "memo/generated/id0/v/1.mp4"
    made.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(devices, "of", lambda device, of=devices.of: replace(of(device), dtype=torch.float16))
        with pytest.raises(SystemExit, match="begun with dtype float32, not float16; give another --system"):
            benchmark()
    benchmark()
    # Files from before these were kept go on, and have them from then on.
    for path, names in (("clips.json", ["videos"]), ("memo/system.json", ["weights", "device", "dtype"])):
        text = json.loads((out / path).read_text())
        (out / path).write_text(json.dumps({name: text[name] for name in text.keys() - set(names)}))
    before = made.stat().st_mtime_ns
    benchmark()
    assert made.stat().st_mtime_ns == before
    assert json.loads((out / "memo/system.json").read_text())["weights"] == base_digest(checkpoint)
    weights = checkpoint / "image_proj" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(SystemExit, match="begun with weights .*, not .*; give another --system"):
        benchmark()


def killed_at_the_third(portrait: Path, voice: Path, output: Path) -> None:
    """Writes half a video and kills its process, once two are made."""
    if len(list((output.parents[3] / "generated").rglob("*.mp4"))) == 2:
        output.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.copy(os.environ["MADE"], output)


def test_a_killed_run_goes_on_and_parts_make_their_share(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MADE", str(videos / f"{NAMES[0]}.mp4"))
    out, generator = tmp_path / "out", ("--generator", "test_benchmark:killed_at_the_third")

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("generated/**/*.mp4")}

    process = multiprocessing.get_context("fork").Process(target=run_benchmark, args=(videos, out, *generator))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    before = made()
    assert len(before) == 2 and (out / "memo/unfinished").is_dir()

    # The same generator again would kill this process: what is left is made by another of the same name.
    monkeypatch.setattr(
        sys.modules[__name__], "killed_at_the_third", lambda p, v, output: shutil.copy(os.environ["MADE"], output)
    )
    run_benchmark(videos, out, *generator, "--part", "1/2")
    assert len(made()) == 3 and not (out / "memo/report").exists()
    run_benchmark(videos, out, *generator)
    assert len(made()) == 4 and before.items() <= made().items()
    assert json.loads((out / "memo/report/report.json").read_text())["measures"]["psnr"]["videos"] == 4


def test_a_command_is_started_for_each_and_what_fails_is_told(videos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    (tmp_path / "broken.mp4").write_text("no video")
    listed.write_text(f"{videos / NAMES[0]}.mp4\nbroken.mp4\n")
    python = f"{sys.executable} -c '{COPY}'"
    options = ("--metrics", "psnr", "--size", 128, "--crop", "none", "--seconds", 0.2)
    with pytest.raises(SystemExit, match=r"1 videos could not be made\nbroken: .*cannot be read"):
        made = f"{python} {videos / NAMES[0]}.mp4 {{output}}"
        run_command("benchmark", listed, tmp_path / "out", *options, "--generator", made)
    (good, broken) = sorted(
        json.loads((tmp_path / "out/memo/report/report.json").read_text())["videos"], key=lambda row: row["reason"]
    )
    assert good["readings"]["psnr"]["value"] > 20 and "cannot be read" in broken["reason"]
    voice = tmp_path / "out/inputs" / f"{NAMES[0]}.wav"
    with wave.open(str(voice)) as file:
        assert file.getnframes() == 0.2 * file.getframerate()

    def fail(generator: str, said: str) -> None:
        with pytest.raises(SystemExit, match=said):
            run_command("benchmark", listed, tmp_path / said[:5], *options, "--generator", generator)

    fail(python + " {voice} {output}", "2 videos could not be made")  # a sound is no video
    fail(f"{sys.executable} -c 'import sys; sys.exit(\"no card\")' {{output}}", "ended with 1: no card")
    fail("nowhere:make", "allowed are memo, a command")
