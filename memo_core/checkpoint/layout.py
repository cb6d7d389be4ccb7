"""Where the files of a checkpoint lie: the released folder layout.

reference_net/ diffusion_net/ image_proj/ audio_proj/   config.json, diffusion_pytorch_model.safetensors
vae/                                                    AutoencoderKL as diffusers saves it
wav2vec2/                                               Wav2Vec2Model as transformers saves it
emotion2vec/                                            model.pt, config.yaml
misc/audio_emotion_classifier/                          the emotion head
misc/face_analysis/models/, misc/vocal_separator/       ONNX files, optional
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..checks import shown
from ..errors import CheckpointError
from ..nets.reading import WEIGHTS

EMBEDDED = ("toon",)  # checkpoints that ship with the program, loaded by name
EMOTION_HEAD = "misc/audio_emotion_classifier"
VOCAL_SEPARATOR = "misc/vocal_separator/Kim_Vocal_2.onnx"  # optional
NETS = ("reference_net", "diffusion_net", "image_proj", "audio_proj")


def assets() -> Path:
    """Folder of the embedded checkpoint, portrait and voice."""
    here = Path(__file__).resolve().parents[1]
    inside, beside = here / "assets", here.parent / "assets"  # installed as a wheel, or run from a checkout
    return inside if inside.is_dir() else beside


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """Folder of a checkpoint given by path or by the name of an embedded one.

    Raises:
        CheckpointError: there is no such folder, or required files are missing; names them.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is a folder or one of {', '.join(EMBEDDED)}, received {shown(checkpoint)}")
    try:
        folder = assets() / checkpoint if str(checkpoint) in EMBEDDED else Path(checkpoint).expanduser()
    except (RuntimeError, TypeError) as error:  # ~nobody; a path of bytes
        raise CheckpointError(f"no checkpoint at {shown(checkpoint)}: {error}") from error
    required = [f"{net}/{name}" for net in NETS for name in ("config.json", WEIGHTS)]
    required += [
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "wav2vec2/config.json",
        "emotion2vec/config.yaml",
        "emotion2vec/model.pt",
        f"{EMOTION_HEAD}/{WEIGHTS}",
    ]
    # Not Path's own questions, which fail where a folder may not be read.
    missing = [name for name in required if not os.path.isfile(folder / name)]
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"no checkpoint at {shown(str(checkpoint))}: give one of {', '.join(EMBEDDED)}, or a folder in the "
            f"released layout. This fetches the released weights (13 GB): {download_command(folder)}"
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(required)} files: {', '.join(missing[:10])}. "
            f"This command fetches the released weights: {download_command(folder)}"
        )
    return folder


def download_command(folder: Path) -> str:
    """What to type to fetch the released weights into `folder`, in any shell and wherever this package lies."""
    words = [
        sys.executable,
        str(Path(__file__).resolve().parents[1] / "__main__.py"),
        "download",
        str(folder.absolute()),
    ]
    return " ".join(f'"{word}"' if " " in word else word for word in words)
