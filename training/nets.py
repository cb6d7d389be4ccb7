"""The four networks that training changes: built, read and written in the released layout, and their parts."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.checkpoint.save import save_weights
from memo_core.errors import CheckpointError
from memo_core.inputs.speech import NEIGHBOURS
from memo_core.nets.config import NetConfig, require_layers
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.module import LayerModule
from memo_core.nets.projections import AudioProjection, ImageProjection
from memo_core.nets.reference_net import ReferenceNet
from memo_core.nets.weights import WEIGHTS, check_fit, load_strict, on_meta, read_json, read_tensors

from .config import PARTS

NETS = ("reference_net", "diffusion_net", "image_proj", "audio_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the networks; the two configurations are config.json files in the released form."""

    reference_net: dict[str, Any]
    diffusion_net: dict[str, Any]
    face_embedding: int = 512
    face_tokens: int = 4
    audio_tokens: int = 32
    audio_hidden: int = 512
    speech_layers: int = 12
    speech_dim: int = 768


_LEVELS = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
RELEASED = Sizes(
    reference_net={
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        **_LEVELS,
    },
    diffusion_net={
        "_class_name": "UNet3DConditionModel",
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
        "audio_attention_dim": 768,
        "emo_drop_rate": 0.3,
        "motion_module_kwargs": {
            "attention_block_types": ["Temporal_Self", "Temporal_Self"],
            "num_attention_heads": 8,
            "num_transformer_block": 1,
            "temporal_attention_dim_div": 1,
            "temporal_position_encoding": False,
            "temporal_position_encoding_max_len": 32,
            "zero_initialize": True,
        },
        "motion_module_resolutions": [1, 2, 4, 8],
        "use_inflated_groupnorm": True,
        **_LEVELS,
    },
)


def sizes_of(configs: dict[str, dict[str, Any]], weights: dict[str, dict[str, Tensor]]) -> Sizes:
    """Sizes of stored networks, from the settings of the two large ones and the weights of the two projections."""
    audio, image = weights["audio_proj"], weights["image_proj"]
    hidden, width = audio["proj1.weight"].shape
    return Sizes(
        reference_net=configs["reference_net"],
        # What Nets reads by itself; the defaults are those of NetConfig.
        diffusion_net={"cross_attention_dim": 768, "audio_attention_dim": 768} | configs["diffusion_net"],
        face_embedding=image["proj.weight"].shape[1],
        face_tokens=len(image["proj.weight"]) // len(image["norm.weight"]),
        audio_tokens=len(audio["proj3.weight"]) // len(audio["norm.weight"]),
        audio_hidden=hidden,
        # How the width divides into layers and channels no tensor tells; only the product counts.
        speech_layers=1,
        speech_dim=width // (2 * NEIGHBOURS + 1),
    )


class Nets(nn.Module):
    """Reference Net, Diffusion Net and the two projections.

    Args:
        sizes: of the networks; `RELEASED` are those of the paper.
    """

    def __init__(self, sizes: Sizes = RELEASED):
        super().__init__()
        self.sizes = sizes
        token_dim = sizes.diffusion_net["cross_attention_dim"]
        self.reference_net = ReferenceNet(NetConfig.from_json(sizes.reference_net))
        self.diffusion_net = DiffusionNet(NetConfig.from_json(sizes.diffusion_net))
        self.image_proj = ImageProjection(sizes.face_embedding, token_dim, sizes.face_tokens)
        self.audio_proj = AudioProjection(
            (2 * NEIGHBOURS + 1) * sizes.speech_layers * sizes.speech_dim,
            sizes.audio_hidden,
            sizes.diffusion_net["audio_attention_dim"],
            sizes.audio_tokens,
        )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Nets:
        """The networks of a checkpoint in the released layout, in float32, ready to learn.

        Raises:
            CheckpointError: files or keys are missing, extra or misshapen.
        """
        folder = Path(folder)
        weights = {name: read_tensors(folder / name / WEIGHTS) for name in NETS}
        configs = {name: read_json(folder / name / "config.json") for name in ("reference_net", "diffusion_net")}
        for name, config in configs.items():
            layers = NetConfig.from_json(config).layers(memory=name == "diffusion_net")
            require_layers(layers, len(weights[name]), folder / name / "config.json")
        nets = on_meta(lambda: cls(sizes_of(configs, weights)), folder)
        for name in NETS:
            check_fit(getattr(nets, name), weights[name], folder / name / WEIGHTS)
            floats = {key: value.float() for key, value in weights.pop(name).items()}
            load_strict(getattr(nets, name), floats, folder / name / WEIGHTS)
        return nets

    @property
    def window(self) -> int:
        """Frames that are denoised together."""
        return self.diffusion_net.config.window

    def crop_to(self, scale: float) -> None:
        """Lets the networks' checkpoints say how wide the squares are that they learn from, in sides of the face: so
        are portraits cut then.
        """
        margin = round(max(0.0, (scale - 1) / 2), 4)
        self.sizes = replace(self.sizes, diffusion_net=self.sizes.diffusion_net | {"crop_margin": margin})

    def play_at(self, fps: int) -> None:
        """Lets the networks' checkpoints say how many frames a second they learn from: so are videos sampled then."""
        self.sizes = replace(self.sizes, diffusion_net=self.sizes.diffusion_net | {"fps": fps})

    @property
    def diffusion_config(self) -> dict[str, Any]:
        """What checkpoints say of the Diffusion Net. In training each row's face tokens are its own; the released code
        mixes them, and so would sampling.
        """
        return self.sizes.diffusion_net | {"face_token_rows": "grouped"}

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, values: dict[str, Tensor] | None = None) -> None:
        """Writes the four networks in the released layout; `values` replaces parameters by name."""
        state = self.state_dict() if values is None else values
        configs = {
            "reference_net": self.sizes.reference_net,
            "diffusion_net": self.diffusion_config,
            "image_proj": {"_class_name": "ImageProjModel"},
            "audio_proj": {"_class_name": "AudioProjModel"},
        }
        for name in NETS:
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            save_weights(folder / name, own, configs[name], dtype)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the paper's figure 2 that they belong to (`config.PARTS`)."""
        parts: dict[str, list[nn.Parameter]] = {name: [] for name in PARTS}
        parts["reference"] += self.reference_net.parameters()
        parts["face"] += self.image_proj.parameters()
        parts["audio"] += self.audio_proj.parameters()
        modules = self.diffusion_net.layer_modules()
        own = {id(parameter): module.part for module in modules for parameter in module.parameters()}
        for parameter in self.diffusion_net.parameters():
            parts[own.get(id(parameter), "backbone")].append(parameter)
        return parts


@torch.no_grad()
def silence_new_modules(nets: nn.Module) -> list[str]:
    """Sets the last projection of audio and memory modules to zero: what stands before them passes them unchanged.

    Returns:
        Names of these parameters.
    """
    silent = []
    for prefix, module in nets.diffusion_net.named_modules():
        if isinstance(module, LayerModule) and module.begins_silent:
            for name, parameter in module.named_parameters():
                if "proj_out" in name.split("."):
                    nn.init.zeros_(parameter)
                    silent.append(f"diffusion_net.{prefix}.{name}")
    return silent


@torch.no_grad()
def begin_from_nothing(nets: Nets) -> None:
    """A start without Stable Diffusion from which small networks can grow.

    Both nets begin with equal weights and with queries equal to keys, so that a place in the video attends first to
    places like it in the portrait; new modules and the output begin silent.
    """
    own = nets.diffusion_net.state_dict()
    shared = {key: value for key, value in own.items() if key in nets.reference_net.state_dict()}
    nets.reference_net.load_state_dict(shared, strict=False)
    for net in (nets.diffusion_net, nets.reference_net):
        for name, module in net.named_modules():
            if name.endswith("attn1") and ".attentions." in name:
                module.to_q.weight.mul_(1.7)
                module.to_k.weight.copy_(module.to_q.weight)
    silence_new_modules(nets)
    nn.init.zeros_(nets.diffusion_net.conv_out.weight)
    nn.init.zeros_(nets.diffusion_net.conv_out.bias)


def checkpoint_gradients(nets: nn.Module) -> None:
    """Keeps no activations inside residual blocks and the modules beside them; the backward pass computes them again,
    and with them what temporal modules remember (`objectives.flow.memory_of_modules`).
    """
    for module in nets.modules():
        if getattr(module, "recomputed", False):
            module.forward = functools.partial(_recomputed, module.forward)


def _recomputed(forward: Any, *inputs: Any) -> Any:
    return recompute(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def check_encoders(folder: Path) -> None:
    """CheckpointError where `folder` lacks what a checkpoint needs besides the networks that training changes."""
    needed = ("vae/config.json", "wav2vec2/config.json", "emotion2vec/model.pt", f"{EMOTION_HEAD}/{WEIGHTS}")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: give a checkpoint in the released layout")


def link_encoders(source: Path, folder: Path) -> None:
    """Gives `folder` the parts of a checkpoint that training leaves alone: VAE, speech and emotion encoders, misc.

    As links to the same data where the file system allows it, so that they take no room.
    """
    for part in ("vae", "wav2vec2", "emotion2vec", "misc"):
        shutil.copytree(source / part, folder / part, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
