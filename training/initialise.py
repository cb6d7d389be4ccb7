"""Where full-size training starts: Stable Diffusion 1.5's UNet and AnimateDiff's motion module (MEMO appendix D).

Reference Net and the Diffusion Net's spatial modules begin as Stable Diffusion's UNet, the memory modules as
AnimateDiff's temporal ones where their shapes allow; what neither has begins silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from memo_core.errors import CheckpointError
from memo_core.nets.config import NetConfig
from memo_core.nets.weights import WEIGHTS, read_json, read_tensors

from .nets import silence_new_modules

# Parts of the Diffusion Net that Stable Diffusion's UNet does not have.
AUDIO, MEMORY = ".audio_modules.", ".motion_modules."
# AnimateDiff's weights under MEMO's names, applied from first to last. Its own files name them as MEMO does, diffusers'
# MotionAdapter names them anew. Stable Diffusion's UNet needs no table: its names are those of both networks.
RENAMED = (
    (r"^module\.", ""),  # left over from data-parallel training
    (r"(\.motion_modules\.\d+)\.(?!temporal_transformer\.)", r"\1.temporal_transformer."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.norm3\.", ".ff_norm."),
    (r"\.attn1\.", ".attention_blocks.0."),
    (r"\.attn2\.", ".attention_blocks.1."),
)
# Settings that change what the weights compute and need not show in their shapes.
_SETTINGS = ("layers_per_block", "attention", "heads", "norm_num_groups", "norm_eps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of each weight, by its name in the networks (`unused`: in the file), with how many numbers it has."""

    source: str
    copied: dict[str, int] = field(default_factory=dict)
    new: dict[str, int] = field(default_factory=dict)  # not in the file; as initialised, or zero where `silent` says so
    unfitting: dict[str, int] = field(default_factory=dict)  # in the file in another shape; as `new`
    unused: dict[str, int] = field(default_factory=dict)  # in the file alone
    silent: tuple[str, ...] = ()  # those of `new` that were set to zero

    @property
    def source_lacks_middle(self) -> bool:
        """Whether a motion module left the middle block's memory as it was."""
        middle = [name for name in self.new if MEMORY in name and ".mid_block." in name]
        return bool(middle) and any(MEMORY in name for name in self.copied)

    def __str__(self) -> str:
        lines = [f"initialised from {self.source}"]
        for name in ("copied", "new", "unfitting", "unused"):
            keys: dict[str, int] = getattr(self, name)
            lines.append(f"  {name:<9} {len(keys):5} weights {sum(keys.values()) / 1e6:10.3f} M numbers")
            lines += [f"    {part}: {count}" for part, count in _parts(keys).items() if name != "copied"]
        if self.silent:
            lines.append(f"  {len(self.silent)} of the new weights are zero: their modules begin silent")
        if self.source_lacks_middle:
            lines += [
                "  no middle block, as in AnimateDiff's version 3: the memory of mid_block begins random, silent where",
                "  its last projection is zero; version 2, mm_sd_v15_v2.ckpt, has one",
            ]
        return "\n".join(lines)


def _parts(keys: Iterable[str]) -> dict[str, int]:
    """Number of weights per kind of module."""
    parts: dict[str, int] = {}
    for key in keys:
        kind = next((name.strip(".") for name in (AUDIO, MEMORY) if name in key), key.rsplit(".transformer", 1)[0])
        parts[kind] = parts.get(kind, 0) + 1
    return parts


def from_stable_diffusion(nets: nn.Module, unet: Path | str) -> Report:
    """Copies Stable Diffusion 1.5's UNet into Reference Net and the Diffusion Net's spatial modules, in place.

    Audio and memory modules stay as they are but for their last projection, which becomes zero: they begin silent. The
    cross-attention to text tokens becomes the one to face tokens, which are as wide.

    Args:
        nets: with attributes `reference_net` and `diffusion_net`; on the meta device only the report is made.
        unet: diffusers' folder `unet/` (config.json beside diffusion_pytorch_model.safetensors or .bin), or the model's
            folder that holds it.

    Raises:
        CheckpointError: the file is absent or damaged, or is another kind of UNet: settings that differ, or a spatial
            weight missing or misshapen. Nothing is changed then.
    """
    folder = Path(unet).expanduser()
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    path = _weights_file(folder, "a Stable Diffusion 1.5 UNet as diffusers saves it")
    _check_settings(folder / "config.json", nets.diffusion_net.config)
    return copy_spatial(nets, read_tensors(path), str(path))


def from_animatediff(nets: nn.Module, motion_module: Path | str) -> Report:
    """Copies AnimateDiff's temporal modules into the Diffusion Net's memory modules where shapes allow, in place.

    They differ in what they compute (softmax attention with positions; linear attention without), not in their weights.
    Take version 2: version 3 has no middle block, whose memory then begins random, as the report says.

    Args:
        nets: with an attribute `diffusion_net`.
        motion_module: `mm_sd_v15_v2.ckpt`, `v3_sd15_mm.ckpt`, either as .safetensors, or a file or folder of diffusers'
            MotionAdapter.

    Raises:
        CheckpointError: the file is absent or damaged, or none of its weights fits.
    """
    path = Path(motion_module).expanduser()
    path = _weights_file(path, "an AnimateDiff motion module") if path.is_dir() else path
    return copy_temporal(nets, read_tensors(path), str(path))


@torch.no_grad()
def copy_spatial(nets: nn.Module, weights: Mapping[str, Tensor], source: str = "Stable Diffusion") -> Report:
    """As `from_stable_diffusion`, from the UNet's state dict."""
    weights = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    own = _state(nets, "reference_net", "diffusion_net")
    spatial = {name: value for name, value in own.items() if AUDIO not in name and MEMORY not in name}
    plan = {name: name.split(".", 1)[1] for name in spatial}
    lost = [f"{theirs} {tuple(own[name].shape)}" for name, theirs in plan.items() if theirs not in weights]
    lost += [
        f"{theirs} {tuple(own[name].shape)}, found {tuple(weights[theirs].shape)}"
        for name, theirs in plan.items()
        if theirs in weights and weights[theirs].shape != own[name].shape
    ]
    if lost:
        listed = "\n  ".join(dict.fromkeys(lost[:10]))
        raise CheckpointError(
            f"{source} is not the UNet these networks start from: {len(lost)} of {len(plan)} spatial weights are "
            f"missing or misshapen; give Stable Diffusion 1.5's:\n  {listed}"
        )
    for name, theirs in plan.items():
        own[name].copy_(weights[theirs])
    silent = silence_new_modules(nets)
    return Report(
        source=source,
        copied=_sizes(spatial),
        new=_sizes({name: value for name, value in own.items() if name not in plan}),
        unused=_sizes({name: value for name, value in weights.items() if name not in set(plan.values())}),
        silent=tuple(silent),
    )


@torch.no_grad()
def copy_temporal(nets: nn.Module, weights: Mapping[str, Tensor], source: str = "AnimateDiff") -> Report:
    """As `from_animatediff`, from the motion module's content."""
    inner = weights.get("state_dict", weights)
    theirs = {rename(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    own = {name: value for name, value in _state(nets, "diffusion_net").items() if MEMORY in name}
    found = {name: theirs[name.split(".", 1)[1]] for name in own if name.split(".", 1)[1] in theirs}
    fitting = {name: value for name, value in found.items() if value.shape == own[name].shape}
    if not fitting:
        raise CheckpointError(
            f"{source} has no temporal module that fits: {len(theirs)} weights, of which {len(found)} have a name of "
            f"this Diffusion Net's {len(own)} memory weights; the first is {next(iter(inner), 'absent')!r}. Give "
            "AnimateDiff's motion module for Stable Diffusion 1.5 (mm_sd_v15_v2.ckpt, v3_sd15_mm.ckpt)"
        )
    for name, value in fitting.items():
        own[name].copy_(value)
    used = {name.split(".", 1)[1] for name in own}
    return Report(
        source=source,
        copied=_sizes(fitting),
        new=_sizes({name: value for name, value in own.items() if name not in found}),
        unfitting=_sizes({name: own[name] for name in found if name not in fitting}),
        unused=_sizes({name: value for name, value in theirs.items() if name not in used}),
    )


def rename(name: str) -> str:
    """A motion module's weight by its name in the Diffusion Net; see RENAMED."""
    for theirs, ours in RENAMED:
        name = re.sub(theirs, ours, name)
    return name


def _state(nets: nn.Module, *names: str) -> dict[str, Tensor]:
    """Parameters to write into, named `<network>.<name>`."""
    return {f"{net}.{name}": value for net in names for name, value in getattr(nets, net).state_dict().items()}


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value.numel() for name, value in weights.items()}


def _weights_file(folder: Path, what: str) -> Path:
    names = [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} does not hold {what}: there is none of {', '.join(names)}")


def _check_settings(path: Path, expected: NetConfig) -> None:
    try:
        found = NetConfig.from_json(read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a Stable Diffusion 1.5 UNet: {error!r}") from error
    for name in _SETTINGS:
        if getattr(found, name) != getattr(expected, name):
            raise CheckpointError(
                f"{path}: {name} is {getattr(found, name)!r}, these networks have {getattr(expected, name)!r}: the "
                "weights would compute something else"
            )
