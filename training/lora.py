"""LoRA fine-tuning (arXiv 2106.09685) with peft: small matrices beside frozen layers, saved as one small file.

`memo_core.lora` has the file's format and merges it for `memo generate --lora` and [Load MEMO].
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memo_core.checkpoint.lora import Adapter, Factors, read
from memo_core.errors import MemoError
from memo_core.nets.config import trained_as
from memo_core.release import FPS

# Groups of layers. Which layers are in them the networks' modules say (`LayerModule.adapted`).
TARGETS = (
    "attention",  # to portrait and face tokens
    "audio",
    "emotion",
    "memory",
    "reference",
    "face",
    "feed_forward",
    "projections",  # into and out of every transformer
)
_NAME = "default"  # peft's, of the only adapter


def layers(nets: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers and 1x1 convolutions in groups of TARGETS.

    Raises:
        MemoError: an unknown group, or one that these networks have no layer of.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise MemoError(f"LoRA targets are {list(targets)}; allowed are one or more of {', '.join(TARGETS)}")
    found = {target: _names(nets, target) for target in targets}
    if empty := [target for target in targets if not found[target]]:
        raise MemoError(f"these networks have no layers of LoRA target {', '.join(empty)}: leave it out")
    return sorted({name for names in found.values() for name in names})


def _names(nets: nn.Module, target: str) -> list[str]:
    names = []
    for prefix, module in nets.named_modules():
        pattern = getattr(module, "adapted", {}).get(target)
        if pattern is not None:
            inside = (name for name, _ in module.named_modules() if re.fullmatch(pattern, name))
            names += [f"{prefix}.{name}" for name in inside]
    return names


def add(
    nets: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ("attention",), dropout: float = 0.0
) -> list[nn.Parameter]:
    """Puts adapters beside the chosen layers, in place; they add nothing until trained. All else is frozen.

    At the released size, rank 16 on "attention" is 3.2 M parameters, a file of 13 MB; "audio" 6.0 M, "memory" 4.8 M,
    "reference" 3.1 M.

    Args:
        nets: a module with the attributes reference_net, diffusion_net, image_proj and audio_proj.
        rank: r of the two matrices [r, in] and [out, r], from 1.
        alpha: the adapters' output is multiplied by alpha / rank.
        targets: of TARGETS.
        dropout: of an adapter's input, in [0, 1).

    Returns:
        The adapters' parameters, float32 whatever the dtype of the networks, for the optimiser.

    Raises:
        MemoError: rank, alpha, dropout or targets out of range; adapters are there already; peft is absent.
    """
    peft = _peft()
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise MemoError(
            f"LoRA rank is {rank}, alpha {alpha}, dropout {dropout}; allowed are a rank from 1, an alpha above 0, "
            "a dropout in [0, 1)"
        )
    if any(True for _ in _adapted(nets)):
        raise MemoError("these networks have adapters already: add them once, with all targets")
    # One pattern, which peft matches against full names; a list of names it would shorten.
    pattern = "|".join(re.escape(name) for name in layers(nets, targets))
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=dropout)
    peft.inject_adapter_in_model(config, nets, adapter_name=_NAME)
    trained = []
    for _, layer in _adapted(nets):
        for matrix in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            trained.append(matrix.float().weight)
    return trained


def save(
    nets: nn.Module,
    path: str | os.PathLike[str],
    base_digest: str,
    settings: str,
    *,
    config: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Writes the adapters that `add` made into one file, atomically.

    Args:
        base_digest: `Networks.base_digest` of the checkpoint that the networks were loaded from.
        settings: how it was trained, any text.
        config: of the Diffusion Net, as a checkpoint of the run would say it: sampling with the adapter follows its
            frame rate, rows of face tokens and crop margin. None: says nothing of them.
        state: state dict of `nets` where its parameters are sharded (FSDP), gathered; None reads them.
        dtype: float16 halves the file; float32 continues training to the same bits.

    Raises:
        MemoError: there are no adapters, or the file cannot be written.
    """
    state = nets.state_dict() if state is None else state
    modules = {}
    for name, layer in _adapted(nets):
        down, up = (state[f"{name}.lora_{letter}.{_NAME}.weight"].detach().cpu().clone() for letter in "AB")
        modules[name] = Factors(down, up, float(layer.scaling[_NAME] * layer.r[_NAME]))
    targets = tuple(target for target in TARGETS if modules.keys() & set(_names(nets, target)))
    said = {} if config is None else trained_as({"fps": FPS} | dict(config), "config")
    adapter = Adapter(
        modules=modules, base=base_digest, targets=targets, settings=settings, config=said, name=os.path.basename(path)
    )
    adapter.save(path, dtype)
    return adapter


def load(nets: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Fills the adapters that `add` made with those of a file, to go on training.

    Returns:
        What was read; its `base` says which checkpoint belongs under it.

    Raises:
        MemoError: the file cannot be read, or has other layers, ranks or alphas than `add` was asked for.
    """
    adapter, problems = read(path), []
    own = dict(_adapted(nets))
    for name in sorted(own.keys() | adapter.modules.keys()):
        if name not in own or name not in adapter.modules:
            problems.append(f"{name} is only in the {'file' if name not in own else 'networks'}")
            continue
        layer, (down, up, alpha) = own[name], adapter.modules[name]
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        if a.shape != down.shape or b.shape != up.shape or abs(layer.scaling[_NAME] * len(down) - alpha) > 1e-6 * alpha:
            problems.append(
                f"{name} has shapes {list(down.shape)} and {list(up.shape)} and alpha {alpha:g} in the file"
            )
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "; ".join(problems[:10])
        raise MemoError(f"{path} does not continue: give its targets ({', '.join(adapter.targets)}): {listed}{more}")
    with torch.no_grad():
        for name, layer in own.items():
            layer.lora_A[_NAME].weight.copy_(adapter.modules[name].down)
            layer.lora_B[_NAME].weight.copy_(adapter.modules[name].up)
    return adapter


def _adapted(nets: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter, by full name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in nets.named_modules() if isinstance(module, LoraLayer))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MemoError('LoRA needs peft: pip install "comfyui-memo[training]"') from error
    return peft
