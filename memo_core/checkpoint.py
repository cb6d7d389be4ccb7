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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import lora as adapters
from .errors import CheckpointError
from .nets.config import NetConfig
from .nets.diffusion_net import DiffusionNet
from .nets.projections import AudioProjection, ImageProjection
from .nets.reference_net import ReferenceNet
from .nets.weights import WEIGHTS, load_strict, read_json, read_tensors
from .optimise import Options, optimise

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

EMBEDDED = ("toon",)  # checkpoints that ship with the program, loaded by name
EMOTION_HEAD = "misc/audio_emotion_classifier"
VOCAL_SEPARATOR = "misc/vocal_separator/Kim_Vocal_2.onnx"  # optional
# What libraries raise for settings that contradict each other or are of the wrong kind.
_IMPOSSIBLE = (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(kw_only=True)
class Networks:
    """Everything a checkpoint holds, ready to run on one device; the speech and emotion encoders in float32."""

    reference_net: ReferenceNet
    diffusion_net: DiffusionNet
    image_proj: ImageProjection
    audio_proj: AudioProjection
    vae: AutoencoderKL
    speech_encoder: SpeechEncoder
    emotion_encoder: Emotion2Vec
    emotion_head: EmotionHead
    folder: Path
    device: torch.device  # where they run
    base_digest: str  # identifies the four MEMO networks and the VAE as saved, whatever the dtype they run in
    sample_size: int  # latent height and width of training
    adapters: tuple[tuple[str, str, float], ...] = ()  # name, digest, strength of what `lora.apply` merged
    options: Options | None = None  # what `optimise` did; None: nothing

    @property
    def in_fp8(self) -> bool:
        """Whether weights are kept rounded to 8 bits."""
        return self.options is not None and self.options.fp8_weights

    @property
    def digest(self) -> str:
        """Identifies what these networks compute: `base_digest`, or another one with every adapter and strength, and
        where weights are kept in fp8."""
        parts = [f"{digest}:{strength!r}" for _, digest, strength in self.adapters] + ["fp8 weights"] * self.in_fp8
        return _short_hash("|".join([self.base_digest, *parts])) if parts else self.base_digest

    @property
    def title(self) -> str:
        """Checkpoint, adapters, fp8 and digest, as written into videos."""
        names = [self.folder.name, *(f"{name}:{strength:g}" for name, _, strength in self.adapters)]
        return f"{' + '.join(names + ['fp8 weights'] * self.in_fp8)} ({self.digest})"

    @property
    def embedded(self) -> bool:
        """Whether this is a checkpoint that ships with the program; those know no faces, only toon heads."""
        return self.folder.resolve().parent == assets().resolve()


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
    required = [
        f"{net}/{name}"
        for net in ("reference_net", "diffusion_net", "image_proj", "audio_proj")
        for name in ("config.json", WEIGHTS)
    ]
    required += [
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "wav2vec2/config.json",
        "emotion2vec/config.yaml",
        "emotion2vec/model.pt",
        f"{EMOTION_HEAD}/{WEIGHTS}",
    ]
    missing = [name for name in required if not (folder / name).is_file()]
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {str(checkpoint)!r}: give one of {', '.join(EMBEDDED)}, or a folder in the released "
            f"layout. This fetches the released weights (13 GB): {download_command(folder)} (files: "
            f"{', '.join(missing)})"
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(required)} files: {', '.join(missing[:10])}. "
            f"This command fetches the released weights: {download_command(folder)}"
        )
    return folder


def download_command(folder: Path) -> str:
    """What to type to fetch the released weights into `folder`, in any shell and wherever this package lies."""
    words = [sys.executable, str(Path(__file__).resolve().with_name("__main__.py")), "download", str(folder.absolute())]
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Names, shapes and 32 to 63 values of every tensor, hashed: tells checkpoints apart without reading gigabytes.

    Equal for the same values in another number format; a change that spares all the values read goes unnoticed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].flatten()
        sample = flat[:: max(1, flat.numel() // 32)].float()
        digest.update(f"{name}{tuple(weights[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _net_digest(folder: Path, weights: dict[str, Tensor]) -> str:
    settings = read_json(folder / "config.json")  # what has no trace in the weights: heads, epsilons, scales
    told = {key: settings[key] for key in sorted(settings) if not key.startswith("_")}
    return weights_digest(weights) + json.dumps(told)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def base_digest(checkpoint: str | os.PathLike[str]) -> str:
    """`Networks.base_digest` of a checkpoint, without building its networks; CheckpointError as from `load`."""
    folder = find(checkpoint)
    digests = [
        _net_digest(folder / name, read_tensors(folder / name / WEIGHTS))
        for name in ("reference_net", "diffusion_net", "image_proj", "audio_proj")
    ]
    vae = _current_vae_keys(read_tensors(folder / "vae" / WEIGHTS))
    return _short_hash("".join([*digests, _net_digest(folder / "vae", vae)]))


def load(
    checkpoint: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: Any = nn,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    options: Options | None = None,
) -> Networks:
    """Loads a checkpoint in the released layout.

    Args:
        checkpoint: folder, or the name of an embedded checkpoint.
        device, dtype: where and in what precision the networks run. The speech and emotion encoders stay in fp32, as
            released.
        ops: namespace of layer classes for the MEMO networks.
        lora: adapters to merge, each a file and its strength (`lora.apply`).
        options: how the networks compute (`optimise.optimise`); None leaves them as they were saved, to be trained,
            changed or saved again.

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen, or a setting is not supported; an adapter
            cannot be read or does not fit; an option does not fit the device or the layer classes.
    """
    from diffusers import AutoencoderKL

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

    folder = find(checkpoint)
    wanted = [(adapters.read(file), strength) for file, strength in lora]  # before the networks, which take long
    digests: list[str] = []

    def net(
        name: str,
        build: Callable[[dict[str, Tensor]], nn.Module],
        rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    ) -> Any:
        path = folder / name / WEIGHTS
        weights = rename(read_tensors(path))
        try:
            with torch.device("meta"):
                module = build(weights)
        except CheckpointError:
            raise
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}, which gives the network's size") from error
        except _IMPOSSIBLE as error:
            raise CheckpointError(f"no network fits {path} and the config.json beside it: {error}") from error
        load_strict(module, {key: tensor.to(device, dtype) for key, tensor in weights.items()}, path)
        digests.append(_net_digest(folder / name, weights))
        return module.eval().requires_grad_(False)

    def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in weights.items()}

    reference_config, diffusion_config = (_net_config(folder / name) for name in ("reference_net", "diffusion_net"))
    reference_net = net("reference_net", lambda _: ReferenceNet(reference_config, ops))
    diffusion_net = net("diffusion_net", lambda _: DiffusionNet(diffusion_config, ops))
    image_proj = net("image_proj", lambda weights: ImageProjection.from_shapes(shapes(weights), ops))
    audio_proj = net("audio_proj", lambda weights: AudioProjection.from_shapes(shapes(weights), ops))
    vae_config = read_json(folder / "vae" / "config.json")
    vae = net("vae", lambda _: AutoencoderKL.from_config(vae_config), _current_vae_keys)

    try:
        speech_encoder = SpeechEncoder.from_pretrained(folder / "wav2vec2", dtype=torch.float32, device=device)
        emotion_encoder = Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device)
        emotion_head = EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device)
    except CheckpointError:
        raise
    except _IMPOSSIBLE as error:
        raise CheckpointError(f"{folder}: wav2vec2, emotion2vec or {EMOTION_HEAD} cannot be built: {error}") from error
    nets = Networks(
        reference_net=reference_net,
        diffusion_net=diffusion_net,
        image_proj=image_proj,
        audio_proj=audio_proj,
        vae=vae,
        speech_encoder=speech_encoder,
        emotion_encoder=emotion_encoder,
        emotion_head=emotion_head,
        folder=folder,
        device=torch.device(device),
        base_digest=_short_hash("".join(digests)),
        sample_size=read_json(folder / "diffusion_net" / "config.json").get("sample_size") or 64,
    )
    for adapter, strength in wanted:
        adapters.apply(nets, adapter, strength)
    if options is not None:
        optimise(nets, options)
    return nets


def _net_config(folder: Path) -> NetConfig:
    path = folder / "config.json"
    try:
        return NetConfig.from_json(read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a MEMO network: {error!r}") from error


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
    save_weights(folder, module.state_dict(), config, dtype)


def save_weights(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> None:
    """As `save_module`, of weights by name. Files are replaced, never written into: others may be linked to them."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "unfinished.tmp"
    temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")
    save_file(
        {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()},
        temporary,
        metadata={"format": "pt"},
    )
    os.replace(temporary, folder / WEIGHTS)
