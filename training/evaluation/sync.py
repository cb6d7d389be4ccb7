"""Do the lips move with the voice? Sync-C and Sync-D."""

from __future__ import annotations

import math
from pathlib import Path

from memo_core.errors import VideoError

from ..syncnet import FILE, SyncNet, SyncScore, face_regions, score_clip
from .faces import FaceTrack
from .metric import FACE_FILES, Measure, Metric, Reading, Tools
from .videos import MAX_PIXELS, Pair, read_header, video_errors


class Sync(Metric):
    measures = tuple(
        Measure(
            name,
            title,
            better,
            f"{what} (Chung and Zisserman 2016; {other} of Prajwal et al. 2020; the face is found by SCRFD, not S3FD)",
        )
        for name, title, better, what, other in (
            ("sync-c", "Sync-C", "higher", "SyncNet's confidence that sound and lips fit at the best shift", "LSE-C"),
            ("sync-d", "Sync-D", "lower", "distance of SyncNet's features of sound and lips at that shift", "LSE-D"),
        )
    )
    files, packages = (*FACE_FILES, FILE), ("onnxruntime", "scipy")

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._net = SyncNet.load(tools.need(FILE)).to(tools.device)
        _ = tools.analyzer  # says now what is missing

    def start(self, pair: Pair) -> None:
        self._paths = (pair.generated, pair.real)

    def finish(self) -> dict[str, Reading]:
        scores, problems = [], []
        seconds = min(read_header(path).duration for path in self._paths)  # as long as both are: what is compared
        for path, which in zip(self._paths, ("generated", "real"), strict=True):
            try:
                scores.append(score_video(self._net, path, self.tools.tracks.of(path), seconds))
            except ValueError as error:
                scores.append(None)
                problems.append(f"{which}: {error}")
        ours, theirs = scores
        notes = problems + ([] if ours is None else [f"the picture comes {ours.offset} frames after the sound"])
        return {
            name: Reading(*(None if score is None else getattr(score, part) for score in scores), note="; ".join(notes))
            for name, part in (("sync-c", "confidence"), ("sync-d", "distance"))
        }


def score_video(net: SyncNet, path: Path, track: FaceTrack, seconds: float | None = None) -> SyncScore:
    """Sync of a video's face with its own sound, from its beginning, in so many seconds (None: all); see `score_clip`.

    Raises VideoError for a damaged file, or without sound or face; ValueError if it is too short.
    """
    seconds = min(read_header(path).duration, math.inf if seconds is None else seconds)
    looks = track.looks[track.looks[:, 0] < seconds]
    if not len(looks):
        raise VideoError("no face was found")
    with video_errors(path):
        return score_clip(net, path, face_regions(looks, 0.0, seconds), 0.0, seconds, MAX_PIXELS)
