"""Finds, loads and saves checkpoints in the released folder layout.

    reference_net/ diffusion_net/ image_proj/ audio_proj/   config.json, diffusion_pytorch_model.safetensors
    vae/                                                    AutoencoderKL as diffusers saves it
    wav2vec2/                                               Wav2Vec2Model as transformers saves it
    emotion2vec/                                            model.pt, config.yaml
    misc/audio_emotion_classifier/                          the emotion head
    misc/face_analysis/models/, misc/vocal_separator/       ONNX files, optional
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError
from .nets.config import NetConfig
from .nets.diffusion_net import DiffusionNet
from .nets.projections import AudioProjection, ImageProjection
from .nets.reference_net import ReferenceNet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMBEDDED = ("toon",)  # checkpoints that ship with the program, loaded by name
FACE_MODELS = "misc/face_analysis/models"
EMOTION_HEAD = "misc/audio_emotion_classifier"
VOCAL_SEPARATOR = "misc/vocal_separator/Kim_Vocal_2.onnx"


@dataclass(kw_only=True)
class Networks:
    """Everything a checkpoint holds, ready to run, on one device and of one dtype."""

    reference_net: ReferenceNet
    diffusion_net: DiffusionNet
    image_proj: ImageProjection
    audio_proj: AudioProjection
    vae: AutoencoderKL
    speech_encoder: SpeechEncoder
    emotion_encoder: Emotion2Vec
    emotion_head: EmotionHead
    folder: Path
    digest: str  # identifies the four MEMO networks and the VAE, whatever the dtype they run in
    sample_size: int  # latent height and width of training
    face_models: Path = field(init=False)

    def __post_init__(self) -> None:
        self.face_models = self.folder / FACE_MODELS


def assets() -> Path:
    """Folder of the embedded checkpoint, portrait and voice."""
    here = Path(__file__).resolve().parent
    inside, beside = here / "assets", here.parent / "assets"  # installed as a wheel, or run from a checkout
    return inside if inside.is_dir() else beside


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """Folder of a checkpoint given by path or by the name of an embedded one.

    Raises:
        CheckpointError: there is no such folder, or required files are missing; names them.
    """
    folder = assets() / checkpoint if str(checkpoint) in EMBEDDED else Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {str(checkpoint)!r}: give a folder in the released layout, or one of {', '.join(EMBEDDED)}"
        )
    required = [f"{net}/{name}" for net in ("reference_net", "diffusion_net", "image_proj", "audio_proj") for name in
                ("config.json", WEIGHTS)]
    required += ["vae/config.json", f"vae/{WEIGHTS}", "wav2vec2/config.json", "emotion2vec/model.pt",
                 f"{EMOTION_HEAD}/{WEIGHTS}"]
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(required)} files: {', '.join(missing[:10])}. "
            f"`memo download {folder}` fetches the released weights"
        )
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, memory-mapped."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def check_keys(name: str, weights: dict[str, Tensor], module: nn.Module) -> None:
    """Raises CheckpointError that lists the first ten missing, extra or misshapen keys."""
    wanted = module.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in weights]
    problems += [f"extra {key}" for key in weights if key not in wanted]
    problems += [
        f"{key} is {list(weights[key].shape)}, should be {list(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{name}: {len(problems)} keys do not fit the network: {'; '.join(problems[:10])}{more}")


def load_module(
    path: Path, build: Callable[[dict[str, Tensor]], nn.Module], dtype: torch.dtype, device: torch.device | str
) -> tuple[nn.Module, str]:
    """Builds a network for the weights in `path` and fills it, strictly; returns it with a digest of the weights."""
    weights = read_weights(path)
    with torch.device("meta"):
        module = build(weights)
    check_keys(str(path.parent.name), weights, module)
    digest = weights_digest(weights)
    module.load_state_dict({k: v.to(device, dtype) for k, v in weights.items()}, assign=True)
    return module.eval().requires_grad_(False), digest


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Names, shapes and 32 values of every tensor, hashed: tells checkpoints apart without reading gigabytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].flatten()
        sample = flat[:: max(1, flat.numel() // 32)].float()
        digest.update(f"{name}{tuple(weights[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def load(
    checkpoint: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ops: Any = nn
) -> Networks:
    """Loads a checkpoint in the released layout.

    Args:
        checkpoint: folder, or the name of an embedded checkpoint.
        device, dtype: where and in what precision the networks run. The speech and emotion encoders stay in fp32, as released.
        ops: namespace of layer classes for the MEMO networks.

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen, or a setting is not supported.
    """
    from diffusers import AutoencoderKL
    from diffusers.utils import logging as diffusers_logging

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

    folder = find(checkpoint)

    def net(name: str, build: Callable[[dict[str, Tensor]], nn.Module]) -> tuple[Any, str]:
        return load_module(folder / name / WEIGHTS, build, dtype, device)

    def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in weights.items()}

    config = {name: NetConfig.from_json(read_json(folder / name / "config.json")) for name in ("reference_net", "diffusion_net")}
    reference_net, digest_r = net("reference_net", lambda _: ReferenceNet(config["reference_net"], ops))
    diffusion_net, digest_d = net("diffusion_net", lambda _: DiffusionNet(config["diffusion_net"], ops))
    image_proj, digest_i = net("image_proj", lambda weights: ImageProjection.from_shapes(shapes(weights), ops))
    audio_proj, digest_a = net("audio_proj", lambda weights: AudioProjection.from_shapes(shapes(weights), ops))

    vae_config = read_json(folder / "vae" / "config.json")
    vae_weights = _current_vae_keys(read_weights(folder / "vae" / WEIGHTS))
    diffusers_logging.set_verbosity_error()
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(vae_config)
    check_keys("vae", vae_weights, vae)
    vae.load_state_dict({k: v.to(device, dtype) for k, v in vae_weights.items()}, assign=True)

    digests = "".join([digest_r, digest_d, digest_i, digest_a, weights_digest(vae_weights)])
    return Networks(
        reference_net=reference_net,
        diffusion_net=diffusion_net,
        image_proj=image_proj,
        audio_proj=audio_proj,
        vae=vae.eval().requires_grad_(False),
        speech_encoder=SpeechEncoder.from_pretrained(folder / "wav2vec2", dtype=torch.float32, device=device),
        emotion_encoder=Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device),
        emotion_head=EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device),
        folder=folder,
        digest=hashlib.sha256(digests.encode()).hexdigest()[:16],
        sample_size=read_json(folder / "diffusion_net" / "config.json").get("sample_size") or 64,
    )


# Stable Diffusion's VAE was saved before diffusers renamed the layers of its attention block.
_VAE_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _current_vae_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        if ".mid_block.attentions." in key:
            for old, new in _VAE_RENAMED.items():
                key = key.replace(old, new)
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[key] = tensor
    return renamed


def save_module(folder: Path, module: nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Writes config.json and the weights as the released layout has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file({k: v.detach().to(dtype).contiguous() for k, v in module.state_dict().items()}, folder / WEIGHTS,
              metadata={"format": "pt"})
