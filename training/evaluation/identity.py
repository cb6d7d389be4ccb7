"""Does the person stay the person? F-SIM."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .metric import FACE_FILES, Measure, Metric, Reading, Tools, mean_reading
from .videos import Chunk, Pair


class FSim(Metric):
    measures = (
        Measure(
            "f-sim",
            "F-SIM",
            "higher",
            "cosine of the ArcFace embeddings (glintr100, Deng et al. 2019) of each generated frame and of the "
            "reference, the first real frame that shows a face; a frame without a face counts 0 (F-SIM of Tian et al. "
            "2024, EMO)",
        ),
    )
    files, packages = FACE_FILES, ("onnxruntime",)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._analyzer = tools.analyzer

    def start(self, pair: Pair) -> None:
        self._times: list[float] = []
        self._embeddings: list[NDArray[np.float32] | None] = []
        self._reference: NDArray[np.float32] | None = None
        self._generated, self._real = self.tools.tracks.of_pair(pair)

    def update(self, chunk: Chunk) -> None:
        for i in chunk.chosen(self.tools.every):
            time = chunk.times[i]
            if self._reference is None and (face := self._real.at(time)) is not None:
                self._reference = self._analyzer.embed(_pixels(chunk.real[i]), face)
            face = self._generated.at(time)
            embedding = None if face is None else self._analyzer.embed(_pixels(chunk.generated[i]), face)
            self._times.append(time)
            self._embeddings.append(embedding)

    def finish(self) -> dict[str, Reading]:
        if self._reference is None:
            return {"f-sim": Reading(None, note="no face was found in the real video")}
        cosines = [0.0 if found is None else cosine(found, self._reference) for found in self._embeddings]
        faceless = sum(found is None for found in self._embeddings)
        note = f"no face in {faceless} of {len(cosines)} frames" if faceless else ""
        return {"f-sim": mean_reading(self._times, cosines, note)}


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """0 where one is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _pixels(frame) -> NDArray[np.uint8]:
    """[3, H, W] -> [H, W, 3]."""
    return frame.permute(1, 2, 0).contiguous().numpy()
