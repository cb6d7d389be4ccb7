"""What makes a talking video of a portrait and a voice: MEMO, a command, or a function."""

from __future__ import annotations

import importlib
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memo_core import MemoPipeline, devices
from memo_core.errors import MemoError
from memo_core.inputs.pictures import open_picture
from memo_core.inputs.recording import Recording
from memo_core.inputs.speech import count_frames
from memo_core.release import SAMPLE_RATE
from memo_core.video.clips import to_uint8
from memo_core.video.write import VideoWriter

from .videos import read_header

Generator = Callable[[Path, Path, Path], Any]
"""(portrait, voice, output): writes the video of a square picture that speaks a WAV file. Whatever it raises costs this
one video."""


def make_generator(text: str, checkpoint: str | Path, device: str, **settings: Any) -> Generator:
    """The generator that a text names.

    Args:
        text: "memo"; a command with {portrait}, {voice} and {output}, started without a shell; or MODULE:FUNCTION.
        checkpoint, device, settings: of "memo", as `MemoPipeline.job` takes them.

    Raises:
        MemoError: it names none. CheckpointError: the checkpoint cannot be loaded.
    """
    if text == "memo":
        return Memo(checkpoint, device, **settings)
    if "{output}" in text:
        return Command(text)
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MemoError(
            f"--generator is {text!r}: allowed are memo, a command with {{portrait}}, {{voice}} and {{output}} in it, "
            f"or MODULE:FUNCTION ({error})"
        ) from error


class Memo:
    """MEMO, with the emotion that it hears: the numbers of `memo generate PORTRAIT VOICE -o OUTPUT --crop none`, with
    the checkpoint loaded once for all.
    """

    def __init__(self, checkpoint: str | Path, device: str, **settings: Any) -> None:
        self._pipe = MemoPipeline.from_pretrained(checkpoint, device, devices.of(device).dtype)
        self._settings = settings

    def __call__(self, portrait: Path, voice: Path, output: Path) -> None:
        pipe, recording, picture = self._pipe, Recording(voice), open_picture(portrait)
        waveform = recording.mono(SAMPLE_RATE)
        reference = pipe.encode_reference(picture, size=picture.size[::-1])
        frames = count_frames(recording.num_samples, recording.sample_rate, pipe.nets.fps)
        audio = pipe.encode_audio(waveform, SAMPLE_RATE, num_frames=frames)
        emotion = pipe.detect_emotion(waveform, SAMPLE_RATE, audio.num_padded_frames)
        job = pipe.job(reference, audio, emotion, **self._settings)
        about = {"model": pipe.nets.title, **self._settings}
        with VideoWriter(output, *picture.size, pipe.nets.fps, recording.sample_rate, about) as writer:
            writer.write_audio(recording.blocks())
            for window in pipe.sample_windows(job):
                writer.write_frames(to_uint8(window.frames))


class Command:
    """A program that is started for each video."""

    def __init__(self, text: str) -> None:
        self._words = shlex.split(text)

    def __call__(self, portrait: Path, voice: Path, output: Path) -> None:
        values = {"portrait": portrait, "voice": voice, "output": output}
        words = []
        for word in self._words:
            for name, value in values.items():
                word = word.replace(f"{{{name}}}", str(value.absolute()))
            words.append(word)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace"
        )
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-400:]
            raise MemoError(f"{words[0]} ended with {done.returncode}: {said}")


def generate(generator: Generator, portrait: Path, voice: Path, output: Path, unfinished: Path) -> None:
    """Makes `output` whole or not at all: the generator writes `unfinished`, which is moved when it can be read.

    Raises whatever the generator does. VideoError: it made no video.
    """
    for path in (unfinished, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.unlink(missing_ok=True)
    generator(portrait, voice, unfinished)
    if not unfinished.exists():
        raise MemoError("the generator ended without an error and without a video")
    read_header(unfinished)
    unfinished.replace(output)
