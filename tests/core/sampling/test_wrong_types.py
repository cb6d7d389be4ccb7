"""Calls from Python with values of the wrong type: the typed error, and numpy's numbers where Python's are taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.checkpoint.lora import Adapter, read
from memo_core.checkpoint.lora import apply as merge
from memo_core.errors import CheckpointError, EmotionError, MemoError, PortraitError, SamplingError
from memo_core.inputs.emotion import emotion_index
from memo_core.inputs.emotion_lines import parse_emotion_lines
from memo_core.running.options import Options
from memo_core.sampling.settings import Settings, Speed, speed_named

ODD = (None, True, "3", 3.5, [3], {}, b"3", float("nan"), 10**400, object())


def refused(call: Callable[[object], object], error: type[MemoError], but: tuple = ()) -> None:
    for value in ODD:
        if not any(value is allowed for allowed in but):
            with pytest.raises(error):
                call(value)


@pytest.mark.parametrize("name", ["steps", "guidance_scale", "seed", "emotion_per", "face_token_rows", "speed"])
def test_settings(name: str) -> None:
    allowed = {"guidance_scale": (3.5,), "face_token_rows": (None,)}
    refused(lambda value: Settings(**{name: value}), SamplingError, allowed.get(name, ()))


@pytest.mark.parametrize("name", ["max_steps", "solver", "guidance", "fp8_sums"])
def test_speed(name: str) -> None:
    refused(
        lambda value: Speed(**{name: value}), SamplingError, {"max_steps": (None,), "fp8_sums": (True,)}.get(name, ())
    )


def test_named_speeds_and_options() -> None:
    refused(speed_named, SamplingError)
    for name in Options.__slots__:
        refused(lambda value: Options(**{name: value}), CheckpointError, (True, None))
    with pytest.raises(CheckpointError):
        Options(compile=None)


def test_numpy_numbers_are_taken() -> None:
    settings = Settings(steps=np.int64(3), seed=np.uint64(2**63), guidance_scale=np.float32(2))
    assert settings == Settings(steps=3, seed=2**63, guidance_scale=2.0)
    assert [type(value) for value in (settings.steps, settings.seed, settings.guidance_scale)] == [int, int, float]
    assert Speed(max_steps=np.int32(3), guidance=np.array([0.0, 0.5])) == Speed(max_steps=3, guidance=(0.0, 0.5))
    assert emotion_index(np.int64(3)) == 3
    track = EmotionTrack.constant("happy", np.int64(30), np.float32(30)).with_label(np.float64(0), np.int64(1), "sad")
    assert track.fit(np.float64(15), np.int32(15)).num_frames == 15


def test_emotion_tracks() -> None:
    track = EmotionTrack.constant("happy", 30)
    tensors = (track.labels, track.probabilities, track.segment_starts)
    for place in range(3):
        refused(lambda v: EmotionTrack(*tensors[:place], v, *tensors[place + 1 :], 30), EmotionError)
    refused(lambda value: EmotionTrack(*tensors, value), EmotionError, (3.5,))
    refused(lambda value: EmotionTrack(*tensors, 30, value), EmotionError, (None,))
    refused(lambda value: EmotionTrack.constant(value, 3), EmotionError)
    refused(lambda value: EmotionTrack.constant("sad", value), EmotionError)
    refused(lambda value: EmotionTrack.constant("sad", 3, value), EmotionError, (3.5,))
    refused(lambda value: track.with_label(value, 1.0, "sad"), EmotionError)
    refused(lambda value: track.with_label(0.0, value, "sad"), EmotionError)
    refused(lambda value: track.with_label(0.0, 1.0, value), EmotionError)
    refused(lambda value: track.with_label(0.0, 1.0, "sad", value), EmotionError)
    refused(lambda value: track.edited(value), EmotionError)
    refused(parse_emotion_lines, EmotionError)
    refused(lambda value: track.fit(value, 3), EmotionError, (3.5,))
    refused(lambda value: track.fit(30, value), EmotionError)
    refused(lambda value: track.conditioning(value, "window"), EmotionError)
    refused(lambda value: track.conditioning(torch.arange(3), value), EmotionError)
    with pytest.raises(EmotionError):
        EmotionTrack(torch.zeros(3), *tensors[1:], 30)


def test_references() -> None:
    parts = (torch.zeros(3, 64, 64), torch.zeros(1, 4, 8, 8), torch.zeros(1, 512))
    assert Reference(*parts, np.int64(2)).faces_found == 2
    for place in range(3):
        refused(lambda value: Reference(*parts[:place], value, *parts[place + 1 :]), PortraitError)
    refused(lambda value: Reference(*parts, value), PortraitError, (None,))
    for wrong in (torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64), torch.zeros(3)):
        with pytest.raises(PortraitError):
            Reference(wrong, *parts[1:])


def test_the_pipeline(pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack) -> None:
    assert pipe.job(small, track, start=np.int64(3), num_frames=np.int32(5)).num_frames == 5
    refused(lambda value: pipe.job(value, track), SamplingError)
    refused(lambda value: pipe.job(small, value), SamplingError)
    refused(lambda value: pipe.job(small, track, value), SamplingError, (None,))
    refused(lambda value: pipe.job(small, track, None, value), SamplingError, (None,))
    refused(lambda value: pipe.job(small, track, start=value), SamplingError)
    refused(lambda value: pipe.job(small, track, num_frames=value), SamplingError, (None,))
    refused(lambda value: pipe.job(small, track, noise=value), SamplingError, (None,))
    with pytest.raises(SamplingError, match="unknown settings stesp"):
        pipe.job(small, track, stesp=3)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(SamplingError, match="noise"):
            pipe.job(small, track, num_frames=16, noise=torch.zeros(1, 4, 16, 8, 8).to(dtype))
    job = pipe.job(small, track, num_frames=16)
    refused(lambda value: pipe.sample_windows(value), SamplingError)
    refused(lambda value: pipe.count_stored(value, None), SamplingError)
    refused(lambda value: pipe.plan(value), SamplingError)
    refused(lambda value: pipe.collect(value, []), SamplingError)
    refused(lambda value: pipe.sample_windows(job, store=value), SamplingError, (None,))
    refused(lambda value: pipe.sample_windows(job, on_progress=value), SamplingError, (None,))
    refused(lambda value: pipe.sample_windows(job, should_stop=value), SamplingError, (None,))
    refused(lambda value: pipe.sample_windows(job, plan=value), SamplingError, (None,))
    refused(lambda value: pipe.decode(value), SamplingError)
    refused(lambda value: pipe.encode_reference(small.pixels, value), PortraitError, (None,))
    wave = torch.zeros(16000)
    wave[::7] = 0.5
    refused(lambda value: pipe.detect_emotion(wave, 16000, value), EmotionError)
    refused(lambda value: pipe.detect_emotion(wave, 16000, 16, value), EmotionError, (3.5, None))
    refused(lambda value: pipe.detect_emotion(wave, 16000, 16, 30, value), EmotionError, (3.5,))
    refused(lambda value: pipe.detect_emotion(wave, 16000, 16, 30, 1.0, value), EmotionError, (3.5,))


def test_adapters(pipe: MemoPipeline, tmp_path) -> None:
    adapter = Adapter(modules={})
    refused(read, CheckpointError)
    refused(lambda value: merge(pipe.nets, value), CheckpointError)
    refused(lambda value: merge(pipe.nets, adapter, value), CheckpointError, (3.5,))
    refused(lambda value: adapter.save(value), CheckpointError)
    refused(lambda value: adapter.save(tmp_path / "x", value), CheckpointError)
    refused(lambda value: MemoPipeline.from_pretrained("toon", lora=value), CheckpointError, (ODD[5],))
    refused(lambda value: MemoPipeline.from_pretrained("toon", options=value), CheckpointError, (None,))
    refused(MemoPipeline.from_pretrained, CheckpointError)


def test_an_empty_memory_is_still_one(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    assert pipe.job(small, track, memory=MemoryState.empty(np.int64(2))).memory.horizon == 2
