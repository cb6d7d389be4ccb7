"""What the stages can be told, the model files they need, and the digest that says when a stage has to run again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.encoders.face import CUDA_PROVIDER, DETECTOR, EMBEDDER, FOLDER

from .rows import STAGES

HYPERIQA = "HyperIQA-resnet50-koniq10k-c96c41b1.pth"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a stage reads besides its row. Paths are absolute; lengths in seconds.

    scale is one number, or a pair between which `scale_of` draws. max_offset is in frames at 25 fps: 5 are 0.2 s, a
    little more than broadcasters let pass (ITU-R BT.1359: sound 0.09 s early to 0.185 s late). What lies further apart
    was not made to be in step, or SyncNet is mistaken.
    """

    raw: str
    out: str
    models: str
    skip: tuple[str, ...] = ()
    scene_threshold: float = 3.0  # PySceneDetect's own: change of a picture relative to those around it
    min_seconds: float = 3.0  # a window, 48 past frames and SyncNet's 30 offsets fit
    max_seconds: float = 30.0
    max_hours: float = 4.0
    max_pixels: int = 8192 * 4320
    min_fps: float = 29.0  # what is slower would be brought to 30 by repeating pictures
    max_repeated: float = 0.1  # 25 fps made 30 are 0.17; people who sit still for a while stay below
    detect_fps: float = 5.0
    scale: float | tuple[float, float] = 1.1
    min_face: float = 256.0  # pixels of the square in the source: no more than doubled at 512
    size: int = 512
    fps: float = 30.0
    min_quality: float = 40.0
    min_confidence: float = 5.0
    max_offset: int = 5
    scorer: str = "training.prepare.quality:hyperiqa"
    device: str = "cpu"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        scale = values["scale"]
        return cls(**{**values, "skip": tuple(values["skip"]), "scale": scale if _is_one(scale) else tuple(scale)})

    def scale_of(self, id: str) -> float:
        """The crop's scale for a clip: the one there is, or drawn evenly between two by the clip's id."""
        if _is_one(self.scale):
            return self.scale
        low, high = self.scale
        drawn = int(hashlib.sha256(f"scale\0{id}".encode()).hexdigest()[:12], 16) / 16**12
        return round(low + (high - low) * drawn, 4)

    def uses_gpu(self, stages: Iterable[str]) -> bool:
        """Whether any of these stages computes on a GPU."""
        if not self.device.startswith("cuda"):
            return False
        skipped = set(self.skip)
        return any(
            stage in ("quality", "sync", "encode") or (stage == "faces" and finds_faces_on_gpu())
            for stage in stages
            if stage not in skipped
        )

    def digests(self) -> dict[str, str]:
        """One digest for each stage: of its settings and model files, and of the stages whose results it reads."""
        values = asdict(self)
        own = {
            stage: [
                {name: values[name] for name in names} | _CONSTANT.get(stage, {}),
                stage in self.skip,
                [] if stage in self.skip else [_file_digest(path) for path in self.files(stage) if path.is_file()],
            ]
            for stage, names in _READS.items()
        }
        reads = {"scenes": ("scenes",), **{s: ("scenes", "faces", s) for s in STAGES[1:]}}
        return {stage: _digest([own[name] for name in reads[stage]]) for stage in STAGES}

    def files(self, stage: str) -> list[Path]:
        """Model files of a stage, whether they are there or not."""
        # Not at the top: Ray's workers import this module, and only their own worker processes need torch.
        from memo_core.nets.weights import WEIGHTS

        from .. import syncnet

        models = Path(self.models)
        if stage == "faces":
            return [models / FOLDER / name for name in (DETECTOR, EMBEDDER)]
        if stage == "quality" and self.scorer == type(self).scorer:
            return [find_model(models, HYPERIQA)]
        if stage == "sync":
            return [find_model(models, syncnet.FILE)]
        if stage == "encode":
            names = ("vae/config.json", f"vae/{WEIGHTS}", "wav2vec2/config.json", "wav2vec2/model.safetensors")
            names += ("emotion2vec/config.yaml", "emotion2vec/model.pt", f"{EMOTION_HEAD}/{WEIGHTS}")
            return [models / name for name in names]
        return []

    def encoders(self) -> dict[str, str]:
        """Digests of the networks that made the shards' tensors, and the size and rate they were made at."""
        vae, speech, emotion = self.files("encode")[1], self.files("encode")[3], self.files("encode")[5:]
        return {
            "vae": _file_digest(vae),
            "wav2vec2": _file_digest(speech),
            "emotion": _digest([_file_digest(path) for path in emotion]),
            "frames": f"{self.size} px, {self.fps:g} fps",
        }

    def missing(self) -> list[str]:
        """Model files and packages that the stages which are not skipped lack, and how to get each."""
        from .. import syncnet

        download = f"{Path(sys.executable).name} -m memo_core download {self.models}"
        how = {
            "faces": f"`{download} --only face`",
            "quality": "from chaofengc/IQA-PyTorch-Weights on the Hugging Face hub, anywhere below the models folder",
            "sync": f"from {syncnet.SOURCE}, anywhere below the models folder",
            "encode": f"`{download} --only memo vae wav2vec2 emotion2vec`",
        }
        missing = []
        for stage in STAGES:
            if stage in self.skip:
                continue
            for path in self.files(stage):
                if not path.is_file():
                    missing.append(f"{path}: {how[stage]}; or --skip {stage}")
            packages = _PACKAGES.get(stage, ())
            if stage == "quality" and self.scorer != type(self).scorer:
                packages = ()
            for package in packages:
                extra = "metrics" if package == "pyiqa" else "training"
                if find_spec(package) is None:
                    missing.append(f'package {package}: pip install "comfyui-memo[{extra}]"; or --skip {stage}')
        if find_spec("matplotlib") is None:
            missing.append('package matplotlib: pip install "comfyui-memo[training]"')
        return missing


# Settings that change what a stage finds. Thresholds are not among them: they only change the decision.
_READS = {
    "scenes": ("scene_threshold", "min_seconds", "max_seconds", "max_hours", "max_pixels"),
    "faces": ("detect_fps", "scale"),
    "quality": ("scorer", "size"),
    "sync": (),
    "encode": ("size", "fps"),
}
# Once settings of a stage: without them, tables that were begun then would be measured again.
_CONSTANT = {"scenes": {"min_fps": 15.0}}
_PACKAGES = {"scenes": ("scenedetect", "cv2"), "faces": ("onnxruntime",), "quality": ("pyiqa",)}


def _is_one(scale: Any) -> bool:
    return isinstance(scale, (int, float))


def finds_faces_on_gpu() -> bool:
    """Whether onnxruntime is there with its CUDA provider."""
    if find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return CUDA_PROVIDER in onnxruntime.get_available_providers()


def find_model(models: Path, name: str) -> Path:
    """The file of this name anywhere below the models folder; directly in it where there is none."""
    return next((path for path in sorted(models.rglob(name)) if path.is_file()), models / name)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache
def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()[:16]
