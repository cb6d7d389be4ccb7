"""Measures that compare what all generated and all real videos look like: FID, FVD, E-FID.

torchmetrics and torch-fidelity have the distance, too, by eigenvalues of a product of covariances that is not
symmetric: with fewer samples than dimensions, as is usual here, that gives values below zero. Hence an own one.
"""

from __future__ import annotations

import io
import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memo_core.errors import CheckpointError
from memo_core.nets.weights import read_tensors

from .faces import FaceTrack
from .metric import FACE_3D, FACE_3D_POINTS, FACE_FILES, I3D, INCEPTION, Measure, Metric, Reading, Tools
from .videos import Chunk, Pair

CLIP = 16  # frames of a sample of FVD
I3D_SIZE = 224
FACE_3D_SIZE, FACE_3D_SCALE, EXPRESSION = 224, 102.0, slice(80, 144)


@dataclass
class Moments:
    """Count, mean [D] and scatter [D, D] (sum of outer products of what is left of the mean) of samples, in float64."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, samples: NDArray[np.floating]) -> Moments:
        """Of samples [N, D], N from 1."""
        samples = np.asarray(samples, np.float64)
        mean = samples.mean(0)
        return cls(len(samples), mean, (samples - mean).T @ (samples - mean))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together (Chan et al. 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two normal distributions (Dowson and Landau 1982).

    The last trace is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric, so that covariances without full rank
    do no harm.

    Raises:
        ValueError: fewer than 2 samples on one side, or values that are not finite.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"{a.count} generated and {b.count} real samples; a Fréchet distance needs 2 of each")
    ours, theirs = a.scatter / (a.count - 1), b.scatter / (b.count - 1)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("the features are not finite; are the weights damaged?")
    values, vectors = np.linalg.eigh(ours)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    product = root @ theirs @ root
    shared = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    apart = a.mean - b.mean
    return max(0.0, float(apart @ apart + np.trace(ours) + np.trace(theirs) - 2 * shared))


class _Frechet(Metric):
    """Collects features of both sides; subclasses compute them. Nothing of a pair that fails is kept."""

    what = "frames"

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._all: list[Moments | None] = [None, None]
        self._pair: list[Moments | None] = [None, None]

    def start(self, pair: Pair) -> None:
        self._pair = [None, None]

    def add(self, side: int, features: NDArray[np.floating] | Tensor) -> None:
        """Features [N, D] of side 0, generated, or 1, real."""
        if len(features):
            new = Moments.of(features.cpu().numpy() if isinstance(features, Tensor) else features)
            old = self._pair[side]
            self._pair[side] = new if old is None else old + new

    def finish(self) -> dict[str, Reading]:
        for side, new in enumerate(self._pair):
            old = self._all[side]
            self._all[side] = old if new is None else new if old is None else old + new
        return {}

    def total(self) -> dict[str, Reading]:
        name = self.measures[0].name
        ours, theirs = self._all
        if ours is None or theirs is None:
            return {name: Reading(None, note=f"there were no {self.what} to compare")}
        try:
            distance = frechet_distance(ours, theirs)
        except ValueError as error:
            return {name: Reading(None, note=str(error))}
        note = f"{ours.count} and {theirs.count} {self.what}"
        if min(ours.count, theirs.count) <= len(ours.mean):
            note += f", few for {len(ours.mean)} features: too high, and comparable only at the same number"
        return {name: Reading(distance, note=note)}


class Fid(_Frechet):
    measures = (Measure("fid", "FID", "lower", "Fréchet distance of Inception v3 features (Heusel et al. 2017)"),)
    files, packages = (INCEPTION,), ("torch_fidelity",)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._net = load_inception(tools).to(tools.device)

    @torch.inference_mode()
    def update(self, chunk: Chunk) -> None:
        chosen = chunk.chosen(self.tools.every)
        for side, frames in enumerate((chunk.generated, chunk.real)):
            if chosen:
                self.add(side, self._net(frames[chosen].to(self.tools.device))[0])


def load_inception(tools: Tools) -> Any:
    """torch-fidelity's network, which resizes as the original does. CheckpointError for a damaged file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tools.need(INCEPTION)
    safe = io.BytesIO()  # it unpickles what it is given, so it is given tensors only
    torch.save(read_tensors(path), safe)
    safe.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit Inception v3: {error}") from error


class Sample:
    """Which items of a stream, whose length is not known, belong to a random sample of them (Vitter 1985, algorithm R).

    Args:
        size: of the sample; None takes all.
        seed: the same one draws the same items.
    """

    def __init__(self, size: int | None, seed: str) -> None:
        self._size, self._seen, self._random = size, 0, random.Random(seed)

    def place(self) -> int | None:
        """Where in the sample the next item goes, in place of what is there; None: it does not belong."""
        self._seen += 1
        if self._size is None or self._seen <= self._size:
            return self._seen - 1
        place = self._random.randrange(self._seen)
        return place if place < self._size else None


class Fvd(_Frechet):
    measures = (
        Measure(
            "fvd",
            "FVD",
            "lower",
            f"Fréchet distance of I3D features of clips of {CLIP} frames that do not overlap, all of them or so many "
            "drawn from each video (Unterthiner et al. 2018; network and input as in StyleGAN-V; "
            f"{I3D} is TorchScript, a program that was run)",
        ),
    )
    files, what = (I3D,), f"clips of {CLIP} frames"

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        path = tools.need(I3D)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but it is what the file was published as
                self._net = torch.jit.load(str(path), map_location=tools.device).eval()
        except Exception as error:  # it raises many kinds
            raise CheckpointError(f"{path} is no TorchScript file: {error}") from error

    def start(self, pair: Pair) -> None:
        super().start(pair)
        self._waiting: list[list[Tensor]] = [[], []]
        # The name as seed: the same clips on both sides, and of every system that is measured.
        self._samples = [Sample(self.tools.clips_per_video, pair.name) for _ in range(2)]
        self._found: list[dict[int, Tensor]] = [{}, {}]

    @torch.inference_mode()
    def update(self, chunk: Chunk) -> None:
        for side, frames in enumerate((chunk.generated, chunk.real)):
            small = F.interpolate(frames.float(), (I3D_SIZE, I3D_SIZE), mode="bilinear")
            self._waiting[side] += list(small)
            while len(self._waiting[side]) >= CLIP:
                clip, self._waiting[side] = self._waiting[side][:CLIP], self._waiting[side][CLIP:]
                place = self._samples[side].place()
                if place is not None:
                    video = torch.stack(clip, 1)[None].to(self.tools.device)  # [1, 3, 16, 224, 224] in [0, 255]
                    features = self._net(video, rescale=True, resize=True, return_features=True)
                    self._found[side][place] = features.float().cpu()

    def finish(self) -> dict[str, Reading]:
        for side, found in enumerate(self._found):
            for features in found.values():
                self.add(side, features)
        return super().finish()


class EFid(_Frechet):
    measures = (
        Measure(
            "e-fid",
            "E-FID",
            "lower",
            "Fréchet distance of the 64 expression coefficients of a 3D face model (Tian et al. 2024, EMO; network of "
            "Deng et al. 2019)",
        ),
    )
    files, packages, what = (*FACE_FILES, FACE_3D, FACE_3D_POINTS), ("onnxruntime", "scipy"), "faces"

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._session = tools.session(FACE_3D)
        self._points = load_standard_points(tools)
        _ = tools.analyzer  # says now what is missing

    def start(self, pair: Pair) -> None:
        super().start(pair)
        self._tracks = self.tools.tracks.of_pair(pair)

    def update(self, chunk: Chunk) -> None:
        for side, frames in enumerate((chunk.generated, chunk.real)):
            self.add(side, self._expressions(frames, chunk, self._tracks[side]))

    def _expressions(self, frames: Tensor, chunk: Chunk, track: FaceTrack) -> NDArray[np.float32]:
        """[N, 64] of the frames with a face."""
        found = []
        for i in chunk.chosen(self.tools.every):
            face = track.at(chunk.times[i])
            picture = None if face is None else align_3d(frames[i], face.keypoints, self._points)
            if picture is not None:
                name = self._session.get_inputs()[0].name
                found.append(self._session.run(None, {name: picture})[0].reshape(-1)[EXPRESSION])
        return np.array(found, np.float32).reshape(len(found), -1)


def load_standard_points(tools: Tools) -> NDArray[np.float64]:
    """Eyes, nose and mouth corners of the standard 3D face, [5, 3], from its 68 points."""
    from scipy.io import loadmat

    path = tools.need(FACE_3D_POINTS)
    try:
        points = np.asarray(loadmat(path)["lm"], np.float64)
        nose, a, b, c, d, left, right = points[[30, 36, 39, 42, 45, 48, 54]]
    except Exception as error:  # hostile files raise many kinds
        raise CheckpointError(f"{path} holds no 68 points [68, 3] named lm: {error}") from error
    return np.stack([(a + b) / 2, (c + d) / 2, nose, left, right])


def align_3d(
    frame: Tensor, keypoints: NDArray[np.floating], standard: NDArray[np.float64]
) -> NDArray[np.float32] | None:
    """A frame uint8 [3, H, W] cut out as the network of Deng et al. wants it: [1, 3, 224, 224] in [0, 1].

    None where the keypoints [5, 2] lie so that there is no face to cut out.
    """
    from PIL import Image

    height, width = frame.shape[1:]
    up = np.column_stack([keypoints[:, 0], height - 1 - keypoints[:, 1]])
    # Scaled orthographic projection, by least squares: x and y are affine in the standard face's points.
    affine, *_ = np.linalg.lstsq(np.column_stack([standard, np.ones(5)]), up, rcond=None)
    scale = (np.linalg.norm(affine[:3, 0]) + np.linalg.norm(affine[:3, 1])) / 2
    x, y = affine[3, 0], height - affine[3, 1]
    half = FACE_3D_SIZE / 2 * scale / FACE_3D_SCALE
    if not 4 <= half <= 4 * max(height, width) or not (-width < x < 2 * width and -height < y < 2 * height):
        return None
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    part = picture.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    part = part.resize((FACE_3D_SIZE, FACE_3D_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(part, np.float32).transpose(2, 0, 1)[None] / 255
