"""The shipped workflows: run as they are, but for the number of steps, and their videos looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memo_core.inputs.sound import load_audio
from memo_core.video.read import VideoInfo, probe, read_video

from .harness import ROOT, Host, Run
from .make_workflows import FOLDER, HALF, make

STEPS = 1  # of 20: what is looked at here does not depend on them
SIDE = 128  # pixels, of the embedded checkpoint's video
VOICE, SONG = 156, 180  # frames of the two example recordings at 30 fps
FIRST = round(HALF * 30)
# Videos of each workflow, by the beginning of their name: frames, width, height.
VIDEOS = {
    "talking_portrait": {"talking_portrait": (VOICE, SIDE, SIDE)},
    "two_shots_one_memory": {"two_shots_one_memory": (VOICE, SIDE, SIDE)},
    "resume_from_saved_state": {"first_half": (FIRST, SIDE, SIDE), "second_half": (VOICE - FIRST, SIDE, SIDE)},
    "emotion_by_hand": {"emotion_by_hand": (VOICE, SIDE, SIDE)},
    "upscale_and_sharpen": {"upscale_and_sharpen": (VOICE, 2 * SIDE, 2 * SIDE)},
    "two_endings": {
        "ending_happy": (VOICE, SIDE, SIDE),
        "ending_angry": (VOICE, SIDE, SIDE),
        "two_endings": (VOICE, 2 * SIDE, SIDE),
    },
    "song": {"song": (SONG, SIDE, SIDE)},
}


@dataclass
class Video:
    """A file that a workflow saved."""

    path: Path
    info: VideoInfo
    frames: np.ndarray  # [F, H, W, 3] uint8
    sound: np.ndarray  # [T], mono, 48 kHz


def prompt_of(name: str) -> dict[str, Any]:
    """The API format, with STEPS."""
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if "steps" in node["inputs"]:
            assert node["inputs"]["steps"] == 20
            node["inputs"]["steps"] = STEPS
    return prompt


def graph_of(name: str) -> dict[str, Any]:
    """The UI format."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def run_prompt(host: Host, prompt: dict[str, Any], graph: dict[str, Any]) -> tuple[Run, dict[str, Video]]:
    """Run it as the browser does -> the run, and its saved videos by the beginning of their names."""
    run = host.wait(host.queue(prompt, extra_data={"extra_pnginfo": {"workflow": graph}}))
    assert run.status == "success", run.error
    videos = {}
    for file in run.files():
        if not file["filename"].endswith(".mp4"):
            continue
        path = host.base / file["type"] / file["subfolder"] / file["filename"]
        sound, rate = load_audio(path)
        assert rate == 48000
        frames = np.stack(list(read_video(path)[1]))
        name = re.sub(r"_\d{5}_\.mp4$", "", path.name)
        videos[name] = Video(path, probe(path), frames, sound.mean(0).numpy())
    return run, videos


@pytest.fixture(scope="module")
def results(host: Host) -> Iterator[dict[str, tuple[Run, dict[str, Video]]]]:
    """What each workflow made, run when it is first asked for."""
    host.free()  # other tests may have run the same nodes

    class Results(dict):
        def __missing__(self, name: str) -> tuple[Run, dict[str, Video]]:
            self[name] = run_prompt(host, prompt_of(name), graph_of(name))
            return self[name]

    yield Results()


def unlike(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference in levels of 255."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


# --- All of them ------------------------------------------------------------------------------------------------------


def test_the_files_are_what_their_description_makes(host: Host) -> None:
    """Otherwise: python -m tests.host.make_workflows"""
    made = make(host.object_info())
    stale = [name for name, text in made.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    assert stale == []
    assert {str(path.relative_to(FOLDER).as_posix()) for path in FOLDER.rglob("*.json")} == made.keys()
    assert set(VIDEOS) == {path.stem for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("name", VIDEOS)
def test_it_runs_and_every_node_does_something(results: dict, name: str) -> None:
    run, videos = results[name]
    assert set(run.executed) | set(run.cached) == set(prompt_of(name))
    assert videos.keys() == VIDEOS[name].keys()


@pytest.mark.parametrize("name", VIDEOS)
def test_its_videos_have_the_frames_size_and_duration_of_their_sound(results: dict, name: str) -> None:
    for prefix, video in results[name][1].items():
        frames, width, height = VIDEOS[name][prefix]
        assert (video.info.frames, video.info.width, video.info.height) == (frames, width, height), prefix
        assert video.frames.shape == (frames, height, width, 3)
        assert video.info.fps == 30
        assert video.info.duration == pytest.approx(frames / 30, abs=1e-3)
        assert video.info.audio_duration == pytest.approx(frames / 30, abs=1 / 30)


@pytest.mark.parametrize("name", VIDEOS)
def test_its_videos_move_and_are_heard(results: dict, name: str) -> None:
    for prefix, video in results[name][1].items():
        assert np.sqrt((video.sound**2).mean()) > 0.01, prefix
        changes = [unlike(a, b) for a, b in zip(video.frames, video.frames[1:])]
        assert np.median(changes) > 0.2, prefix


@pytest.mark.parametrize("name", VIDEOS)
def test_its_videos_bring_the_workflow_with_them(results: dict, name: str) -> None:
    for video in results[name][1].values():
        assert json.loads(video.info.metadata["workflow"]) == graph_of(name)
        prompt = json.loads(video.info.metadata["prompt"])
        for node in prompt.values():
            node.pop("is_changed", None)  # a note of the host's
        assert prompt == prompt_of(name)


# --- Each of them -----------------------------------------------------------------------------------------------------


def test_two_shots_show_two_emotions(results: dict) -> None:
    """The beginner's workflow is the same but for the emotion, which was heard."""
    (edited,), (heard,) = (results[name][1].values() for name in ("two_shots_one_memory", "talking_portrait"))
    assert unlike(edited.frames[FIRST:], heard.frames[FIRST:]) > 1


def in_store(host: Host, log_before: int) -> list[tuple[int, int]]:
    """Of each clip sampled since then: windows, and windows that were in the store."""
    lines = re.findall(r"in (\d+) windows, (\d+) of them in the store", host.log()[log_before:])
    return [(int(windows), int(stored)) for windows, stored in lines]


def test_a_saved_state_resumes_as_if_never_stopped(host: Host, results: dict) -> None:
    """Its second run, with the file chosen: what it renders is what an uninterrupted clip consists of."""
    name = "resume_from_saved_state"
    _, begun = results[name]
    choices = host.object_info()["MEMO_MemoryState"]["input"]["required"]["file"][1]["options"]
    state = next(choice for choice in choices if choice.startswith("memo/first_half_"))
    prompt = prompt_of(name)
    nodes = {node["_meta"]["title"]: number for number, node in prompt.items()}
    assert prompt[nodes["Memory State"]]["inputs"]["file"] == "empty"
    prompt[nodes["Memory State"]]["inputs"]["file"] = state
    before = len(host.log())
    _, resumed = run_prompt(host, prompt, graph_of(name))
    assert sum(windows - stored for windows, stored in in_store(host, before)) <= 5  # the second half alone
    assert unlike(resumed["second_half"].frames, begun["second_half"].frames) > 0.2

    whole = {number: prompt[number] for number in ancestors(prompt, nodes["First half"])}
    whole[nodes["First half"]]["inputs"]["duration"] = 0
    memory = [nodes["First half"], 1]
    whole["look"] = {"class_type": "MEMO_InspectMemoryState", "inputs": {"memory": memory}}
    before = len(host.log())
    run_prompt(host, whole, {})
    assert in_store(host, before) == [(10, 10)]


def ancestors(prompt: dict[str, Any], number: str) -> set[str]:
    """The node and all that it needs."""
    links = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
    return {number}.union(*(ancestors(prompt, link) for link in links))


def test_upscaled_frames_are_the_clip_s_own(results: dict) -> None:
    (large,), (small,) = (results[name][1].values() for name in ("upscale_and_sharpen", "talking_portrait"))
    shrunk = large.frames.reshape(VOICE, SIDE, 2, SIDE, 2, 3).mean((2, 4))
    assert unlike(shrunk, small.frames) < 6


def test_two_endings_share_their_beginning_and_stand_side_by_side(results: dict) -> None:
    _, videos = results["two_endings"]
    happy, angry, both = (videos[name].frames for name in ("ending_happy", "ending_angry", "two_endings"))
    ahead = 40  # frames: the encoder looks so far ahead, and spends its bits accordingly
    assert unlike(happy[: FIRST - ahead], angry[: FIRST - ahead]) < 0.1
    assert unlike(happy[FIRST:], angry[FIRST:]) > 1
    assert unlike(both[:, :, :SIDE], happy) < 6 and unlike(both[:, :, SIDE:], angry) < 6
    assert unlike(both[FIRST:, :, :SIDE], happy[FIRST:]) < unlike(both[FIRST:, :, SIDE:], happy[FIRST:])


def test_the_song_is_heard_with_its_music(results: dict) -> None:
    (video,) = results["song"][1].values()
    song, rate = load_audio(ROOT / "assets" / "song.flac")
    assert rate == 16000
    loudness = [np.sqrt((sound**2).mean()) for sound in (video.sound, song.mean(0).numpy())]
    assert loudness[0] == pytest.approx(loudness[1], rel=0.1)
