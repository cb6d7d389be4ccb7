"""Prompts in the API format, put together node by node."""

from __future__ import annotations

import io
import json
import re
import wave
from typing import Any
from urllib.error import HTTPError

import av
import numpy as np
from PIL import Image

from .harness import ROOT, Host, Run

Link = list[Any]  # [node id, output]

# What every test samples with unless it says otherwise: as little as possible.
QUICK = {"steps": 1, "guidance": 1.0, "seed": 42}
SAMPLE = QUICK | {"start": 0.0, "duration": 0.0, "stop_on_collapse": False}
CONCAT = {"fps": 0.0, "cross_fade": 0, "sizes": "refuse"}


class Graph(dict):
    """A prompt; `add` gives the new node's id."""

    def add(self, class_type: str, **inputs: Any) -> str:
        self[name := str(len(self) + 1)] = {"class_type": class_type, "inputs": inputs}
        return name

    # The usual beginnings and ends.

    def model(self) -> Link:
        return [self.add("MEMO_LoadMEMO", checkpoint="toon", dtype="auto", attention="auto"), 0]

    def reference(self, model: Link, image: Link | None = None, size: int = 64, **inputs: Any) -> Link:
        image = image or [self.add("MEMO_Example", speech="voice"), 0]
        settings = {"size": size, "crop": "face", "margin": -1.0, "face_index": -1} | inputs
        return [self.add("MEMO_EncodeReference", model=model, image=image, **settings), 0]

    def voice(self, model: Link, file: str, **inputs: Any) -> Link:
        sound = [self.add("LoadAudio", audio=file), 0]
        settings = {"fps": 30.0, "context": "local", "separate_vocals": "off", "silence_gate": False} | inputs
        return [self.add("MEMO_EncodeAudio", model=model, audio=sound, **settings), 0]

    def clip(self, model: Link, reference: Link, audio: Link, **inputs: Any) -> str:
        return self.add("MEMO_SampleClip", model=model, reference=reference, audio=audio, **(SAMPLE | inputs))

    def save(self, *clips: Link, prefix: str = "memo/video", **inputs: Any) -> str:
        slots = {f"clip_{number}": clip for number, clip in enumerate(clips, 1)}
        video = self.add("MEMO_ConcatClips", **slots, **(CONCAT | inputs))
        return self.add("SaveVideo", video=[video, 0], filename_prefix=prefix, format="auto", codec="auto")

    def pictures(self, clip: Link) -> str:
        """Saves a clip's frames as they are; `pictures` reads them."""
        decoded = self.add("MEMO_ClipToImages", clip=clip)
        return self.add("SaveImage", images=[decoded, 0], filename_prefix="memo/frame")


def write_speech(host: Host, name: str, seconds: float, rate: int = 16000, start: float = 0.0) -> np.ndarray:
    """Writes so much of the example's voice (again from its start where that ends) into the host's input folder."""
    with wave.open(str(ROOT / "assets" / "voice.wav")) as file:
        voice = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert rate == 16000
    samples = np.resize(np.roll(voice, -round(start * rate)), round(seconds * rate))
    write_wav(host, name, samples, rate)
    return samples


def write_wav(host: Host, name: str, samples: np.ndarray, rate: int = 16000) -> None:
    with wave.open(str(host.base / "input" / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def run(host: Host, graph: Graph, timeout: float = 300, **extra: Any) -> Run:
    """Runs a graph that has to succeed."""
    done = host.wait(host.queue(graph, **extra), timeout)
    assert done.status == "success", done.error
    return done


def video(host: Host, done: Run, node: str) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Frames [F, H, W, 3], sound [channels, T], its rate, and the frame rate, of the video that a node saved."""
    data = host.view(**done.files(node)[0])
    with av.open(io.BytesIO(data)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        fps = float(file.streams.video[0].average_rate)
    with av.open(io.BytesIO(data)) as file:
        if not file.streams.audio:
            return frames, np.zeros((0, 0)), 0, fps
        sound = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
        return frames, sound, file.streams.audio[0].rate, fps


def refused(host: Host, graph: Graph, node: str) -> str:
    """What the host says of a node that it does not run; others, which show something by themselves, it may run."""
    try:
        answer = json.loads(host.post("/prompt", {"prompt": graph, "client_id": host.client_id}))
    except HTTPError as error:
        answer = json.loads(error.read())
    return " ".join(f"{error['message']}: {error['details']}" for error in answer["node_errors"][node]["errors"])


def pictures(host: Host, done: Run, node: str) -> np.ndarray:
    """Frames [F, H, W, 3] that a node saved as pictures. Not so a video's: x264 codes 64 x 64 pixels now so, now so."""
    return np.stack([np.asarray(Image.open(io.BytesIO(host.view(**file)))) for file in done.files(node)])


def preflights(host: Host) -> list[tuple[int, int, int]]:
    """(frames, windows, windows in the store) of every sampling since the host's start, from its log."""
    found = re.findall(r"(\d+) frames in (\d+) windows, (\d+) of them in the store", host.log())
    return [tuple(map(int, numbers)) for numbers in found]
