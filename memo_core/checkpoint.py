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
from torch import Tensor, nn

from . import lora as adapters
from . import precision, waiting
from .checks import number, shown
from .errors import CheckpointError
from .files import replace_whole
from .nets.config import NetConfig, require_layers, settings_like
from .nets.diffusion_net import DiffusionNet
from .nets.projections import AudioProjection, ImageProjection
from .nets.reference_net import ReferenceNet
from .nets.weights import WEIGHTS, check_fit, load_strict, on_meta, read_json, read_tensors
from .optimise import Options, optimise
from .tensorfile import save_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

EMBEDDED = ("toon",)  # checkpoints that ship with the program, loaded by name
EMOTION_HEAD = "misc/audio_emotion_classifier"
VOCAL_SEPARATOR = "misc/vocal_separator/Kim_Vocal_2.onnx"  # optional
_NETS = ("reference_net", "diffusion_net", "image_proj", "audio_proj")
# What the VAE's pictures depend on, with the values of diffusers' AutoencoderKL.
_VAE_SETTINGS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


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
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is a folder or one of {', '.join(EMBEDDED)}, received {shown(checkpoint)}")
    try:
        folder = assets() / checkpoint if str(checkpoint) in EMBEDDED else Path(checkpoint).expanduser()
    except (RuntimeError, TypeError) as error:  # ~nobody; a path of bytes
        raise CheckpointError(f"no checkpoint at {shown(checkpoint)}: {error}") from error
    required = [f"{net}/{name}" for net in _NETS for name in ("config.json", WEIGHTS)]
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
    try:
        digests = [_net_digest(folder / name, read_tensors(folder / name / WEIGHTS)) for name in _NETS]
        vae = _current_vae_keys(read_tensors(folder / "vae" / WEIGHTS))
        return _short_hash("".join([*digests, _net_digest(folder / "vae", vae)]))
    except (RuntimeError, TypeError) as error:  # numbers that torch cannot compute with
        raise CheckpointError(f"{folder} holds weights that cannot be read: {error}") from error


def load(
    checkpoint: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: Any = nn,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    options: Options | None = None,
    large_nets_wait: bool = False,
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
        large_nets_wait: on a device with memory of its own the Reference Net and the Diffusion Net stay in host memory
            until something is sampled (`waiting.enter` brings them).

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen, or a setting is not supported; an adapter
            cannot be read or does not fit; an option does not fit the device or the layer classes.
    """
    from diffusers import AutoencoderKL

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead
    from .nets.speech_encoder import SpeechEncoder

    device, dtype = _check_place(device, dtype)
    if options is not None and not isinstance(options, Options):
        raise CheckpointError(f"options must be None or an Options, received {shown(options)}")
    for pair in lora:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or number(pair[1]) is None:
            raise CheckpointError(f"an adapter is given as a file and a finite strength, received {shown(pair)}")
    folder = find(checkpoint)
    wanted = [(adapters.read(file), strength) for file, strength in lora]  # before the networks, which take long
    digests: list[str] = []

    def net(
        name: str,
        build: Callable[[dict[str, Tensor]], nn.Module],
        layers: int = 0,
        rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    ) -> Any:
        path = folder / name / WEIGHTS
        weights = rename(read_tensors(path))
        require_layers(layers, len(weights), folder / name / "config.json")
        module = on_meta(lambda: build(weights), path)
        check_fit(module, weights, path)
        # The two large nets come to a device when they are to sample: what listens and looks before has more room.
        waits = large_nets_wait and name in ("reference_net", "diffusion_net") and device.type not in ("cpu", "meta")
        where = torch.device("cpu") if waits else device
        placed = {key: tensor.to(where, precision.of_weight(name, key, dtype)) for key, tensor in weights.items()}
        load_strict(module, placed, path)
        digests.append(_net_digest(folder / name, weights))
        return module.eval().requires_grad_(False)

    def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in weights.items()}

    # All that takes no time before what does.
    sample_size = _sample_size(folder / "diffusion_net" / "config.json")
    vae_settings = _vae_settings(folder / "vae" / "config.json")
    reference_config, diffusion_config = (_net_config(folder / name) for name in ("reference_net", "diffusion_net"))
    reference_net = net("reference_net", lambda _: ReferenceNet(reference_config, ops), reference_config.layers(False))
    diffusion_net = net("diffusion_net", lambda _: DiffusionNet(diffusion_config, ops), diffusion_config.layers(True))
    image_proj = net("image_proj", lambda weights: ImageProjection.from_shapes(shapes(weights), ops))
    audio_proj = net("audio_proj", lambda weights: AudioProjection.from_shapes(shapes(weights), ops))
    vae_layers = 2 * len(vae_settings["block_out_channels"]) * vae_settings["layers_per_block"]
    vae = net("vae", lambda _: AutoencoderKL(**vae_settings), vae_layers, _current_vae_keys)

    speech_encoder = SpeechEncoder.from_pretrained(folder / "wav2vec2", dtype=torch.float32, device=device)
    emotion_encoder = Emotion2Vec.from_pretrained(folder / "emotion2vec").to(device)
    emotion_head = EmotionHead.from_pretrained(folder / EMOTION_HEAD).to(device)
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
        sample_size=sample_size,
    )
    for adapter, strength in wanted:
        adapters.apply(nets, adapter, strength)
    if options is not None:
        optimise(nets, options)
    if large_nets_wait and device.type not in ("cpu", "meta"):
        for large in (reference_net, diffusion_net):
            waiting.wait(large)
    return nets


def _check_place(device: torch.device | str, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"device must be a device of torch's, received {shown(device)}: {error}") from error
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if dtype not in floats:
        raise CheckpointError(f"dtype must be one of {', '.join(map(str, floats))}, received {shown(dtype)}")
    return place, dtype


def _net_config(folder: Path) -> NetConfig:
    path = folder / "config.json"
    settings = read_json(path)
    try:
        config = NetConfig.from_json(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    if (config.in_channels, config.out_channels) != (4, 4):
        raise CheckpointError(f"{path}: latents have 4 channels, not {config.in_channels} and {config.out_channels}")
    return config


def _sample_size(path: Path) -> int:
    settings = {name: value for name, value in read_json(path).items() if value}  # none, or none worth the name
    return settings_like(settings, {"sample_size": 64}, path)["sample_size"]


def _vae_settings(path: Path) -> dict[str, Any]:
    settings = settings_like(read_json(path), _VAE_SETTINGS, path)
    channels = [settings[name] for name in ("in_channels", "latent_channels", "out_channels")]
    if channels != [3, 4, 3]:
        raise CheckpointError(f"{path}: pictures have 3 channels and latents 4, received {channels}")
    if not settings["scaling_factor"]:
        raise CheckpointError(f"{path}: scaling_factor must be above 0, received 0")
    return settings


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
    with replace_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
