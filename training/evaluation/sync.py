"""Do the lips move with the voice? Sync-C and Sync-D."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from memo_core.audio import load_audio, prepare_waveform
from memo_core.errors import AudioError, VideoError

from ..syncnet import CHUNK, FILE, FPS, FRAMES, RATE, SIZE, SyncNet, SyncScore, best_shift, face_region
from .faces import FaceTrack, cut
from .metric import FACE_FILES, Measure, Metric, Reading, Tools
from .videos import Pair, frames_at, stack

OUTSIDE = 110  # gray beyond the frame, as published
SMOOTH = 13  # frames over which the median of the box is taken, as published


class Sync(Metric):
    measures = tuple(
        Measure(name, title, better, f"{what} (Chung and Zisserman 2016; {other} of Prajwal et al. 2020)")
        for name, title, better, what, other in (
            ("sync-c", "Sync-C", "higher", "SyncNet's confidence that sound and lips fit at the best shift", "LSE-C"),
            ("sync-d", "Sync-D", "lower", "distance of SyncNet's features of sound and lips at that shift", "LSE-D"),
        )
    )
    files, packages = (*FACE_FILES, FILE), ("onnxruntime", "scipy")

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._net = SyncNet.load(tools.need(FILE)).to(tools.device)
        tools.analyzer

    def start(self, pair: Pair) -> None:
        self._paths = (pair.generated, pair.real)

    def finish(self) -> dict[str, Reading]:
        scores, problems = [], []
        for path, which in zip(self._paths, ("generated", "real"), strict=True):
            try:
                scores.append(score_video(self._net, path, self.tools.tracks.of(path)))
            except (AudioError, VideoError, ValueError) as error:
                scores.append(None)
                problems.append(f"{which}: {error}")
        ours, theirs = scores
        notes = problems + ([] if ours is None else [f"the picture comes {ours.offset} frames after the sound"])
        return {
            name: Reading(*(None if score is None else getattr(score, part) for score in scores), note="; ".join(notes))
            for name, part in (("sync-c", "confidence"), ("sync-d", "distance"))
        }


def score_video(net: SyncNet, path: Path, track: FaceTrack) -> SyncScore:
    """Sync of a video's face with its own sound, at 25 fps, streamed.

    Raises AudioError without sound, VideoError for a damaged file or without a face, ValueError if it is too short.
    """
    waveform = prepare_waveform(*load_audio(path))
    if not track.found.any():
        raise VideoError("no face was found")
    sounding = len(waveform) * FPS // RATE
    length = int(np.ceil((track.times[-1] + 1) * FPS)) + SMOOTH
    boxes = np.array([track.box_at(i / FPS) for i in range(length)])
    reach = np.pad(boxes, ((SMOOTH // 2, SMOOTH // 2), (0, 0)), mode="edge")
    boxes = np.median(np.lib.stride_tricks.sliding_window_view(reach, SMOOTH, axis=0), axis=-1)

    features, faces, frames = [], [], 0
    for frame in frames_at(path, FPS):
        if frames == sounding:
            break
        faces.append(cut(frame, face_region(boxes[min(frames, length - 1)]), SIZE, OUTSIDE))
        frames += 1
        if len(faces) == CHUNK + FRAMES - 1:
            features.append(net.embed_faces(stack(faces)))
            faces = faces[CHUNK:]  # the last 4 begin windows that are still to come
    if frames <= FRAMES:
        raise ValueError(f"{frames} frames at {FPS} fps with sound; at least {FRAMES + 1} are needed")
    if len(faces) >= FRAMES:
        features.append(net.embed_faces(stack(faces)))
    count = frames - FRAMES  # one window less than would fit, as published
    return best_shift(torch.cat(features)[:count], net.embed_sound(waveform, count))
