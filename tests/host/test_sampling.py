"""Sampling in a real host: the memory on a wire, the store, kill -9, edits, interrupts, impossible requests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from memo_core.sampling.settings import PRESETS

from .graphs import QUICK, Graph, pictures, preflights, refused, run, video, write_speech, write_wav
from .harness import Host


def talk(file: str, **clip: object) -> tuple[Graph, str, str]:
    """One clip of a file: graph, the sampling node, the node that saves the video."""
    graph = Graph()
    model = graph.model()
    node = graph.clip(model, graph.reference(model), graph.voice(model, file), **clip)
    return graph, node, graph.save([node, 0])


def last(host: Host) -> tuple[int, int, int]:
    return preflights(host)[-1]


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_a_video_has_exactly_the_frames_of_its_audio(host: Host) -> None:
    write_speech(host, "ten.wav", 10.0)
    graph, _, save = talk("ten.wav")
    frames, sound, rate, fps = video(host, run(host, graph), save)
    assert frames.shape == (300, 64, 64, 3) and fps == 30
    assert sound.shape[1] / rate == pytest.approx(10.0, abs=0.03) and np.abs(sound).max() > 0.05
    assert frames.std(axis=0).max() > 5, "the head has to move"


def test_a_span_brings_its_own_sound(host: Host) -> None:
    """Half of a file is silent: the clip of that half is too."""
    samples = write_speech(host, "half.wav", 4.0)
    samples = samples.copy()
    samples[32000:] = 0
    write_wav(host, "half.wav", samples)
    for start, loud in ((0.0, True), (2.5, False)):
        graph, node, save = talk("half.wav", start=start, duration=1.0)
        frames, sound, rate, _ = video(host, run(host, graph), save)
        assert len(frames) == 30 and sound.shape[1] / rate == pytest.approx(1.0, abs=0.03)
        assert (np.abs(sound).max() > 0.05) == loud


def wired(file: str) -> tuple[Graph, list[str], list[str], str]:
    """The file in three clips: graph, sampling nodes, nodes that save their frames, node that saves the video."""
    graph = Graph()
    model = graph.model()
    reference, voice = graph.reference(model), graph.voice(model, file)
    first = graph.clip(model, reference, voice, duration=32 / 30)
    second = graph.clip(model, reference, voice, duration=48 / 30, start=[first, 2], memory=[first, 1])
    third = graph.clip(model, reference, voice, start=[second, 2], memory=[second, 1])
    clips = [first, second, third]
    return graph, clips, [graph.pictures([clip, 0]) for clip in clips], graph.save(*([clip, 0] for clip in clips))


def test_one_clip_and_three_wired_ones_give_identical_frames(fresh_host: Callable[..., Host]) -> None:
    """Law *split*; with the store off, so that both are really sampled."""
    host = fresh_host(env={"MEMO_STORE": "off"})
    write_speech(host, "split.wav", 3.7)
    graph, clip, _ = talk("split.wav")
    save = graph.pictures([clip, 0])
    expected = pictures(host, run(host, graph), save)
    graph, _, saved, video_node = wired("split.wav")
    done = run(host, graph)
    assert np.array_equal(np.concatenate([pictures(host, done, node) for node in saved]), expected)
    assert len(video(host, done, video_node)[0]) == 111
    assert all(stored == 0 for _, _, stored in preflights(host))


def test_nodes_that_sample_the_same_span_share_its_windows(host: Host) -> None:
    write_speech(host, "share.wav", 3.7)
    run(host, talk("share.wav")[0])
    before = len(preflights(host))
    run(host, wired("share.wav")[0])
    assert preflights(host)[before:] == [(32, 2, 2), (48, 3, 3), (31, 2, 2)]


def test_without_the_memory_wire_the_second_clip_is_another_one(host: Host) -> None:
    write_speech(host, "wire.wav", 2.0)
    results = []
    for memory in (True, False):
        graph = Graph()
        model = graph.model()
        reference, voice = graph.reference(model), graph.voice(model, "wire.wav")
        first = graph.clip(model, reference, voice, duration=16 / 30)
        more = {"memory": [first, 1]} if memory else {}
        second = graph.clip(model, reference, voice, start=[first, 2], **more)
        save = graph.pictures([second, 0])
        results.append(pictures(host, run(host, graph), save))
    assert not np.array_equal(*results)


def test_changing_the_third_clip_runs_the_third_clip(host: Host) -> None:
    write_speech(host, "three.wav", 1.6)

    def graph(seed: int) -> tuple[Graph, list[str]]:
        graph = Graph()
        model = graph.model()
        reference, voice = graph.reference(model), graph.voice(model, "three.wav")
        nodes = [graph.clip(model, reference, voice, duration=16 / 30)]
        for number in range(2):
            wires = {"start": [nodes[-1], 2], "memory": [nodes[-1], 1], "seed": seed if number else 42}
            nodes.append(graph.clip(model, reference, voice, duration=16 / 30, **wires))
        graph.save(*([node, 0] for node in nodes))
        return graph, nodes

    first, _ = graph(42)
    run(host, first)
    second, nodes = graph(7)
    done = run(host, second)
    assert nodes[2] in done.executed and not {nodes[0], nodes[1]} & set(done.executed)


def test_progress_counts_windows_and_steps_and_shows_frames(host: Host) -> None:
    write_speech(host, "progress.wav", 1.0)
    graph, node, _ = talk("progress.wav", steps=3, seed=5)
    done = run(host, graph)
    bar = [(progress.value, progress.max) for progress in done.progress if progress.node == node]
    assert {most for _, most in bar} == {6} and {value for value, _ in bar} >= {1, 2, 3, 4, 5, 6}
    assert [name for _, name, _ in done.previews].count(node) == 2


def test_speed_is_a_choice_and_none_is_exact(host: Host) -> None:
    """Graphs from before there was the choice lack the input."""
    write_speech(host, "speed.wav", 0.5)
    graph, clip, _ = talk("speed.wav", steps=9, guidance=2.0, seed=91)
    save = graph.pictures([clip, 0])
    made, said, steps = {}, {}, {}
    for speed in (None, "exact", "balanced", "draft"):
        if speed is not None:
            graph[clip]["inputs"]["speed"] = speed
        done = run(host, graph)
        made[speed] = pictures(host, done, save)
        steps[speed] = {progress.max for progress in done.progress if progress.node == clip}
        said[speed] = [line for line in host.log().splitlines() if "frames in" in line][-1]
    assert np.array_equal(made["exact"], made[None]) and "1 of them in the store" in said["exact"]
    for speed in ("balanced", "draft"):
        assert not np.array_equal(made[speed], made[None]) and "0 of them in the store" in said[speed]
    draft = PRESETS["draft"].max_steps
    assert steps[None] == steps["exact"] == {9} and steps["draft"] == {draft}
    graph[clip]["inputs"] |= {"speed": "exact", "seed": 92}
    run(host, graph)
    again = [line for line in host.log().splitlines() if "frames in" in line][-1]
    assert "time not known" in said["draft"] and "about" in again, "each has an estimate of its own"


def test_the_one_node_knows_speeds_too(host: Host) -> None:
    write_speech(host, "speed.wav", 0.5)
    graph = Graph()
    sound, picture = graph.add("LoadAudio", audio="speed.wav"), graph.add("MEMO_Example", speech="voice")
    inputs = {"model": graph.model(), "image": [picture, 0], "audio": [sound, 0], "emotion": "none"}
    talking = graph.add("MEMO_TalkingVideo", **inputs, **(QUICK | {"steps": 9}), speed="draft")
    graph.add("SaveVideo", video=[talking, 0], filename_prefix="memo/speed", format="auto", codec="auto")
    most = {progress.max for progress in run(host, graph).progress if progress.node == talking}
    assert PRESETS["draft"].max_steps in most and 9 not in most, "some of them are the writing's"


# --- The store --------------------------------------------------------------------------------------------------------


def test_a_second_run_takes_all_from_the_store(host: Host) -> None:
    write_speech(host, "again.wav", 1.5)
    graph, clip, _ = talk("again.wav", seed=8)
    save = graph.pictures([clip, 0])
    expected = pictures(host, run(host, graph), save)
    host.free()  # the host forgets what its nodes gave
    assert np.array_equal(pictures(host, run(host, graph), save), expected) and last(host) == (45, 3, 3)


def test_sigkill_loses_no_finished_window(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host()
    write_speech(host, "long.wav", 6.0)
    graph, node, _ = talk("long.wav", steps=2)
    running = host.queue(graph)
    host.wait_event("progress", running, node=node, value=9)  # in the fifth window
    host.kill()
    host.restart()
    run(host, graph)
    frames, windows, stored = last(host)
    assert (frames, windows) == (180, 12) and 4 <= stored <= 5, "what was finished is not computed again"


def test_editing_the_end_of_the_sound_renders_the_end(host: Host) -> None:
    samples = write_speech(host, "edit.wav", 6.0)
    run(host, talk("edit.wav")[0])
    edited = samples.copy()
    edited[-32000:] = np.roll(samples, 5000)[-32000:]  # the last two seconds
    write_wav(host, "edited.wav", edited)
    run(host, talk("edited.wav")[0])
    # The change is at 4 s; features hear 0.6 s ahead: windows up to frame 102 stay.
    assert last(host) == (180, 12, 6)


def test_editing_the_emotion_of_the_end_renders_the_end(host: Host) -> None:
    write_speech(host, "feeling.wav", 4.0)

    def graph(lines: str) -> Graph:
        graph = Graph()
        model = graph.model()
        voice = graph.voice(model, "feeling.wav")
        heard = graph.add("MEMO_DetectAudioEmotion", model=model, audio=voice, sensitivity=1.0, smoothing=0.0)
        emotion = graph.add("MEMO_EditEmotion", emotion=[heard, 0], lines=lines)
        clip = graph.clip(model, graph.reference(model), voice, emotion=[emotion, 0])
        graph.save([clip, 0])
        return graph

    run(host, graph("0-end happy"))
    run(host, graph("0-end happy\n3.2-end angry"))
    assert last(host) == (120, 8, 6)
    run(host, graph("0-end happy\n3.2-end angry 0.5"))
    assert last(host) == (120, 8, 6)


def test_a_damaged_window_is_reported_once_and_made_anew(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host()
    write_speech(host, "damage.wav", 1.5)
    graph, clip, _ = talk("damage.wav")
    save = graph.pictures([clip, 0])
    expected = pictures(host, run(host, graph), save)
    entries = sorted((host.base / "user" / "memo" / "windows").rglob("*.safetensors"))
    assert len(entries) == 3
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-100])
    host.restart()
    assert np.array_equal(pictures(host, run(host, graph), save), expected) and last(host) == (45, 3, 0)
    reported = re.findall(r"a stored window is damaged", host.log())
    assert len(reported) == 3
    host.free()
    run(host, graph)
    assert last(host) == (45, 3, 3)


def test_a_store_that_cannot_be_written_is_one_warning(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host(env={"MEMO_STORE": "/dev/full/windows"})
    write_speech(host, "full.wav", 1.5)
    graph, _, save = talk("full.wav")
    frames, *_ = video(host, run(host, graph), save)
    assert len(frames) == 45
    assert len(re.findall("no longer kept", host.log())) == 1


# --- Stopping ---------------------------------------------------------------------------------------------------------


def test_an_interrupt_stops_within_a_step_and_keeps_finished_windows(host: Host) -> None:
    write_speech(host, "stop.wav", 5.0)
    graph, node, _ = talk("stop.wav", steps=4, seed=99)
    running = host.queue(graph)
    host.wait_event("progress", running, node=node, value=9)  # the first step of the third window
    host.interrupt()
    done = host.wait(running)
    assert done.status == "interrupted"
    assert max(progress.value for progress in done.progress if progress.node == node) <= 12
    run(host, graph)
    assert last(host)[2] in (2, 3)


BREAKING = {
    "__init__.py": """
import torch
real, calls = torch.nn.functional.scaled_dot_product_attention, 0

def broken(*args, **kwargs):
    global calls
    calls += 1
    if calls == 200:
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")
    return real(*args, **kwargs)

torch.nn.functional.scaled_dot_product_attention = broken
NODE_CLASS_MAPPINGS = {}
"""
}


def test_out_of_memory_is_tried_again_with_less(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host(packs={"zz-out-of-memory": BREAKING})
    write_speech(host, "memory.wav", 2.0)
    graph, clip, _ = talk("memory.wav", steps=2, guidance=3.5)
    save = graph.pictures([clip, 0])
    frames = pictures(host, run(host, graph), save)
    assert len(frames) == 60 and host.log().count("out of memory: once more") == 1
    # And the frames are those of a run that met no such trouble, up to rounding.
    other = fresh_host()
    write_speech(other, "memory.wav", 2.0)
    assert np.abs(frames.astype(int) - pictures(other, run(other, graph), save)).max() <= 1


SMALL_MACHINE = {
    "__init__.py": """
import comfy.model_management as host
host.get_total_memory = lambda dev=None, torch_total_too=False: (2**28, 2**28) if torch_total_too else 2**28
NODE_CLASS_MAPPINGS = {}
"""
}


def test_what_cannot_fit_is_refused_with_what_would(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host(packs={"zz-small": SMALL_MACHINE})
    write_speech(host, "large.wav", 1.0)
    graph = Graph()
    model = graph.model()
    clip = graph.clip(model, graph.reference(model, size=1024), graph.voice(model, "large.wav"))
    graph.save([clip, 0])
    done = host.wait(host.queue(graph))
    assert done.error is not None and done.error.node == clip
    assert "1024x1024 pixels need" in done.error.message and re.search(r"What fits: size \d+", done.error.message)


WRECKING = {
    "__init__.py": """
import sys
from torch import nn

def wreck():
    for name, module in list(sys.modules.items()):
        if name.endswith("memo_core.sampling.clip"):
            module.decode_latents = lambda vae, latents, *_, **how: latents.new_full(
                (latents.shape[1], 3, 8 * latents.shape[2], 8 * latents.shape[3]), 0.5)

class Wreck:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MEMO_MODEL",), "run", "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MEMO_MODEL",)}}
    def run(self, model):
        wreck()
        return (model,)

NODE_CLASS_MAPPINGS = {"Wreck": Wreck}
"""
}


def test_a_collapsed_clip_ends_where_it_collapsed(fresh_host: Callable[..., Host]) -> None:
    """Frames that turn plain grey end the clip after two windows, if asked for."""
    host = fresh_host(packs={"zz-wreck": WRECKING})
    write_speech(host, "collapse.wav", 3.0)
    graph = Graph()
    model = graph.model()
    reference = graph.reference(model)
    model = [graph.add("Wreck", model=model), 0]
    voice = graph.voice(model, "collapse.wav")
    clip = graph.clip(model, reference, voice, stop_on_collapse=True)
    save = graph.save([clip, 0])
    frames, *_ = video(host, run(host, graph), save)
    assert len(frames) == 32 and "stopped at 1.07 s: the clip has collapsed" in host.log()


# --- What is said before the first step -------------------------------------------------------------------------------


def test_a_preflight_line_says_what_is_to_come(host: Host) -> None:
    write_speech(host, "line.wav", 10.0)
    graph, _, _ = talk("line.wav", duration=1.0, seed=1234)
    run(host, graph)
    line = [line for line in host.log().splitlines() if "frames in" in line][-1]
    assert re.search(
        r"1\.00 s: 30 frames in 2 windows, 0 of them in the store; (about \d+ s|time not known).*; "
        r"RAM \d+\.\d GB needed, \d+\.\d free; faces found: not looked for, there are no face models",
        line,
    ), line


def test_a_clip_that_begins_after_the_end_says_so(host: Host) -> None:
    write_speech(host, "short.wav", 1.0)
    graph, node, _ = talk("short.wav", start=5.0)
    done = host.wait(host.queue(graph))
    assert done.error.node == node and "start is 5 s, but the recording ends at 1.00 s" in done.error.message


# --- States -----------------------------------------------------------------------------------------------------------


def test_a_saved_state_continues_on_another_day(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host(env={"MEMO_STORE": "off"})
    write_speech(host, "day.wav", 3.2)
    graph, clip, _ = talk("day.wav")
    save = graph.pictures([clip, 0])
    expected = pictures(host, run(host, graph), save)

    graph, node, _ = talk("day.wav", duration=1.6)
    graph.add("MEMO_SaveMemoryState", memory=[node, 1], filename_prefix="memo/half")
    run(host, graph)
    host.restart()
    assert "memo/half_00001_.safetensors [output]" in json.dumps(host.object_info()["MEMO_MemoryState"])
    graph = Graph()
    model = graph.model()
    state = graph.add("MEMO_MemoryState", file="memo/half_00001_.safetensors [output]", horizon=0, silence=0.0)
    voice = graph.voice(model, "day.wav")
    clip = graph.clip(model, graph.reference(model), voice, start=1.6, memory=[state, 0])
    save = graph.pictures([clip, 0])
    assert np.array_equal(pictures(host, run(host, graph), save), expected[48:])


def test_another_portrait_does_not_take_the_memory_of_this_one(host: Host) -> None:
    write_speech(host, "other.wav", 1.0)
    graph = Graph()
    model = graph.model()
    voice = graph.voice(model, "other.wav")
    first = graph.clip(model, graph.reference(model), voice)
    second = graph.clip(model, graph.reference(model, crop="none", size=128), voice, memory=[first, 1])
    graph.save([second, 0])
    done = host.wait(host.queue(graph))
    assert done.error.node == second and "belongs to reference" in done.error.message


# --- One node ---------------------------------------------------------------------------------------------------------


def test_one_node_does_what_its_parts_do(host: Host) -> None:
    example = {"class_type": "MEMO_Example", "inputs": {"speech": "voice"}}
    graph = Graph({"1": example})
    model = graph.model()
    inputs = {"model": model, "image": ["1", 0], "audio": ["1", 1], "emotion": "sad", **QUICK}
    talking = graph.add("MEMO_TalkingVideo", **inputs)
    save = graph.add("SaveVideo", video=[talking, 0], filename_prefix="memo/one", format="auto", codec="auto")
    state = graph.add("MEMO_InspectMemoryState", memory=[talking, 1])
    done = run(host, graph)
    frames, sound, rate, fps = video(host, done, save)
    assert frames.shape == (156, 128, 128, 3) and sound.shape[1] / rate == pytest.approx(5.2, abs=0.03)
    assert done.files(state)
    graph = Graph({"1": example})
    model = graph.model()
    voice = [
        graph.add(
            "MEMO_EncodeAudio",
            **{"model": model, "audio": ["1", 1], "fps": 30.0, "context": "local"},
            separate_vocals="off",
            silence_gate=False,
        ),
        0,
    ]
    heard = graph.add("MEMO_DetectAudioEmotion", model=model, audio=voice, sensitivity=1.0, smoothing=0.0)
    emotion = graph.add("MEMO_EditEmotion", emotion=[heard, 0], lines="0-end sad")
    clip = graph.clip(model, graph.reference(model, size=0), voice, emotion=[emotion, 0])
    save = graph.save([clip, 0])
    parts, *_ = video(host, run(host, graph), save)
    assert np.array_equal(parts, frames) and last(host) == (156, 10, 10)


def test_a_failed_video_makes_nothing_run_again(host: Host) -> None:
    write_speech(host, "fails.wav", 0.5)
    graph, clip, _ = talk("fails.wav")
    run(host, graph)
    more = Graph(graph)  # the same, and a video that is stopped while it is written
    many = more.add("EmptyImage", width=256, height=256, batch_size=1000, color=0)
    more.save([many, 0])
    running = host.queue(more)
    host.wait_event("progress", running)
    host.interrupt()
    assert host.wait(running).status == "interrupted"
    assert run(host, graph).executed == []


def test_a_vanished_temporary_video_is_made_again(host: Host) -> None:
    write_speech(host, "gone.wav", 1.0)
    graph, _, save = talk("gone.wav", seed=77)
    run(host, graph)
    for path in (host.base / "temp").glob("memo_*.mp4"):
        path.unlink()
    graph[save]["inputs"]["filename_prefix"] = "memo/once_more"  # so that saving runs, and asks for the video
    frames, *_ = video(host, run(host, graph), save)
    assert len(frames) == 30


# --- Queue and memory -------------------------------------------------------------------------------------------------


def test_bad_values_are_refused_before_anything_runs(host: Host) -> None:
    write_speech(host, "refuse.wav", 1.0)
    for name, value in {"steps": 0, "guidance": 0.5, "seed": -1, "start": -1.0}.items():
        graph, node, _ = talk("refuse.wav", **{name: value})
        assert name in refused(host, graph, node)
