"""What a measure is, where the files of networks are looked for, and what is missing."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from memo_core.encoders.face import DETECTOR, EMBEDDER, FOLDER, FaceAnalyzer
from memo_core.errors import CheckpointError

from .. import syncnet

if TYPE_CHECKING:
    from .faces import FaceTracks
    from .videos import Chunk, Pair

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
I3D = "i3d_torchscript.pt"
ALEXNET = "alexnet-owt-7be5be79.pth"
LANDMARKS_2D, LANDMARKS_3D = "2d106det.onnx", "1k3d68.onnx"
FACE_3D, FACE_3D_POINTS = "deep3d.onnx", "similarity_Lm3D_all.mat"
_WITH_MEMO = "released with MEMO: `memo download` fetches it into misc/face_analysis/models"
_BESIDE_MEMO = (
    "misc/face_analysis/models of the repository memoavatar/memo on the Hugging Face hub; `memo download` leaves it out"
)
SOURCES = {  # file name -> where to get it
    DETECTOR: _WITH_MEMO,
    EMBEDDER: _WITH_MEMO,
    LANDMARKS_2D: _BESIDE_MEMO,
    LANDMARKS_3D: _BESIDE_MEMO,
    syncnet.FILE: syncnet.SOURCE,
    INCEPTION: f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}",
    I3D: "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (github.com/universome/fvd-comparison)"
    "; a TorchScript file is a program that runs when it is loaded, so it is only looked for in the --weights you name",
    ALEXNET: f"https://download.pytorch.org/models/{ALEXNET}",
    FACE_3D: "exported from net_recon of github.com/sicxu/Deep3DFaceRecon_pytorch, input [N, 3, 224, 224], output "
    "[N, 257]: torch.onnx.export(net_recon, torch.zeros(1, 3, 224, 224), 'deep3d.onnx', dynamic_axes=...)",
    FACE_3D_POINTS: "the BFM folder of github.com/sicxu/Deep3DFaceRecon_pytorch",
}


@dataclass(frozen=True)
class Measure:
    """One column of the report.

    name: as on the command line. better: which direction is good, or "" where it should be as in real videos.
    definition: how it is computed, and the source.
    """

    name: str
    title: str
    better: Literal["higher", "lower", ""]
    definition: str


@dataclass(frozen=True)
class Reading:
    """A measure of one video, or of all.

    value: None where it could not be taken; `note` then says why. real: the same of the real video, where that has a
    meaning. times, curve: over time, in seconds, [K].
    """

    value: float | None
    real: float | None = None
    times: NDArray[np.float64] | None = None
    curve: NDArray[np.float64] | None = None
    note: str = ""


@dataclass
class Tools:
    """What measures share.

    weights: folder of network files (None: ./weights); also looked into are its misc/face_analysis/models, as MEMO is
        released, and torch hub's cache. PROGRAMS are looked for only in a folder that was given.
    every: networks that look at single frames look at every n-th.
    fps: both videos are read at this rate; None: at the generated one's.
    clips_per_video: of FVD, drawn from those of a video; None takes all.
    """

    weights: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    every: int = 1
    fps: float | None = None
    clips_per_video: int | None = None

    def find(self, name: str) -> Path | None:
        """The file of this name, or None."""
        if name in PROGRAMS:
            folders = [] if self.weights is None else [self.weights]
        else:
            given = self.weights or Path("weights")
            folders = [given, given / FOLDER, Path(torch.hub.get_dir()) / "checkpoints"]
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def need(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise CheckpointError(f"missing: {name}, get it from {SOURCES[name]}")
        return path

    @cached_property
    def analyzer(self) -> FaceAnalyzer:
        """Raises CheckpointError where the files are absent, damaged, or not in one folder."""
        folder = self.need(DETECTOR).parent
        analyzer = FaceAnalyzer.from_folder(folder)
        if analyzer is None:
            raise CheckpointError(f"{EMBEDDER} is not beside {folder / DETECTOR}; put both into one folder")
        return analyzer

    @cached_property
    def tracks(self) -> FaceTracks:
        from .faces import FaceTracks

        return FaceTracks(self.analyzer, self.every)

    def session(self, name: str) -> Any:
        """An onnxruntime session; CheckpointError where the file is absent or damaged."""
        import onnxruntime

        path = self.need(name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise CheckpointError(f"cannot load {path}: {error}. Delete and get it again") from error


PROGRAMS = frozenset((I3D,))
FACE_FILES = (DETECTOR, EMBEDDER)


class Metric:
    """A network or formula that gives one or more measures.

    It is made once, which loads its files (CheckpointError where they are damaged). Then for each pair of videos:
    `start`, `update` with each chunk, `finish`. In the end `total`, for measures of all videos together.
    """

    measures: ClassVar[tuple[Measure, ...]]
    files: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()  # import names

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def start(self, pair: Pair) -> None:
        """A new pair begins; what a pair that was not finished left behind is forgotten."""

    def update(self, chunk: Chunk) -> None:
        """The next frames."""

    def finish(self) -> dict[str, Reading]:
        """Readings of the pair by measure; empty if it has only totals."""
        return {}

    def total(self) -> dict[str, Reading] | None:
        """Readings of all finished pairs together; None where the mean over videos is meant."""
        return None

    @classmethod
    def missing(cls, tools: Tools) -> list[str]:
        """What has to be fetched first, in words."""
        names = {"torch_fidelity": "torch-fidelity"}
        extras = dict.fromkeys(("lpips", "pyiqa", "torch_fidelity", "torchvision"), "metrics")
        lines = [f"missing: {name}, get it from {SOURCES[name]}" for name in cls.files if tools.find(name) is None]
        return lines + [
            f"missing: the package {names.get(name, name)}, get it by pip install "
            f'"comfyui-memo[{extras.get(name, "training")}]" '
            f"or pip install {names.get(name, name)}"
            for name in cls.packages
            if importlib.util.find_spec(name) is None
        ]


def mean_reading(times: list[float], values: list[float], note: str = "") -> Reading:
    """The mean of a curve; without values, None."""
    if not values:
        return Reading(None, note=note or "nothing was measured")
    return Reading(float(np.mean(values)), None, np.array(times), np.array(values), note)
