"""Adapters: small changes to a checkpoint's layers (LoRA, arXiv 2106.09685), one safetensors file each.

The file holds, for every layer that an adapter changes, two matrices under the names peft gives them,
`<net>.<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], `net` one of NETS; a 1x1 convolution's have
two more axes of one. Its metadata are texts: format and version, rank and alpha, JSON objects `rank_pattern` and
`alpha_pattern` {module: value} for layers that differ, `base` (digest of the checkpoint it was trained on), `targets`
(JSON list of the groups of layers), `config` (JSON object: what a checkpoint's config.json says of how it was shown
videos, `nets.config.trained_as`) and `settings` (of training, any text).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import number, shown, whole
from ..errors import CheckpointError
from ..nets.config import trained_as
from ..tensorfile import FLOATS, UNREADABLE, float32, is_finite, open_arrays, open_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .networks import Networks

logger = logging.getLogger(__name__)

NETS = ("reference_net", "diffusion_net", "image_proj", "audio_proj")
FORMAT, VERSION = "memo-lora", 1
MAX_FILE_BYTES = 2**32  # all layers of the released networks at rank 256 take half of it
_KEY = re.compile(rf"((?:{'|'.join(NETS)})(?:\.\w+)+)\.lora_([AB])\.weight")
_MAX_ALPHA = 1e9


class Factors(NamedTuple):
    """What an adapter adds to one layer's weight: alpha / r * up @ down."""

    down: Tensor  # [r, in] or [r, in, 1, 1]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    alpha: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """[out, in] in float32."""
        return self.alpha / len(self.down) * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """A read adapter.

    Attributes:
        modules: `<net>.<module path>` -> its factors.
        base: digest of the checkpoint it was trained on (`Networks.base_digest`), or "" where unknown.
        targets: names of the groups of layers it was asked to change.
        settings: of training, as text.
        config: how it was shown videos, which sampling follows: `fps`, `face_token_rows`, `crop_margin`; old files say
            nothing.
        name: of the file.
    """

    modules: Mapping[str, Factors]
    base: str = ""
    targets: tuple[str, ...] = ()
    settings: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"

    @cached_property
    def digest(self) -> str:
        """Identifies what it does to a checkpoint: the same for the same values in another number format."""
        return _digest(self.modules)

    def describe(self) -> str:
        """What it is, in words, one fact a line."""
        return _describe(self.modules, self.base, self.targets, self.settings, self.config, self.name)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes the file, atomically, in float32 or another floating-point dtype.

        Raises:
            CheckpointError: it cannot be written, or holds no module.
        """
        import torch

        path = _path(path)
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"an adapter is written in a floating-point dtype, received {shown(dtype)}")
        if not self.modules:
            raise CheckpointError(f"cannot write {path}: the adapter changes no layer")
        ranks = {module: len(factors.down) for module, factors in self.modules.items()}
        alphas = {module: factors.alpha for module, factors in self.modules.items()}
        (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "rank": str(rank),
            "alpha": str(alpha),
            "rank_pattern": json.dumps({module: value for module, value in ranks.items() if value != rank}),
            "alpha_pattern": json.dumps({module: value for module, value in alphas.items() if value != alpha}),
            "base": self.base,
            "targets": json.dumps(self.targets),
            "config": json.dumps(dict(self.config)),
            "settings": self.settings,
        }
        tensors = {}
        for module, factors in self.modules.items():
            for letter, factor in (("A", factors.down), ("B", factors.up)):
                tensors[f"{module}.lora_{letter}.weight"] = factor.detach().to("cpu", dtype, copy=True).contiguous()
        try:
            save_tensors(tensors, path, metadata)
        except UNREADABLE as error:
            raise CheckpointError(f"cannot write the adapter to {path}: {error}") from error


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a MEMO adapter; its tensors are not looked at."""
    try:
        with open_arrays(path) as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except UNREADABLE:
        return False


def read(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter; names, shapes and sizes are checked before any tensor is read.

    Raises:
        CheckpointError: no such file, too large, not a MEMO adapter (those of other networks are not), of a later
            version, or damaged: keys in no pair, shapes that do not fit each other, a rank of 0, a number that is not
            finite.
    """
    modules, about = _read(path, open_tensors)
    return Adapter(modules={module: Factors(*factors) for module, factors in modules.items()}, **about)


def describe(path: str | os.PathLike[str]) -> str:
    """What `Adapter.describe` says of the adapter in a file, without torch.

    Raises:
        CheckpointError: as `read`.
    """
    modules, about = _read(path, open_arrays)
    return _describe(modules, **about)


def _digest(modules: Mapping[str, tuple[Any, Any, float]]) -> str:
    digest = hashlib.sha256()
    for module, (down, up, alpha) in sorted(modules.items()):
        digest.update(f"{module}{tuple(down.shape)}{tuple(up.shape)}{float(alpha)!r}".encode())
        digest.update(float32(down).tobytes() + float32(up).tobytes())
    return digest.hexdigest()[:16]


def _describe(
    modules: Mapping[str, tuple[Any, Any, float]],
    base: str,
    targets: tuple[str, ...],
    settings: str,
    config: Mapping[str, Any],
    name: str,
) -> str:
    ranks, alphas = sorted({len(down) for down, _, _ in modules.values()}), sorted({a for _, _, a in modules.values()})
    numbers = sum(math.prod(down.shape) + math.prod(up.shape) for down, up, _ in modules.values())
    lines = [
        f"adapter      {name}",
        f"digest       {_digest(modules)}",
        f"trained on   {base or '-'}",
        f"rank         {', '.join(map(str, ranks))}",
        f"alpha        {', '.join(f'{alpha:g}' for alpha in alphas)}",
        f"targets      {', '.join(targets) or '-'}",
        f"parameters   {numbers:,}",
    ]
    lines += [f"shown with   {', '.join(f'{name} {value}' for name, value in config.items())}"] * bool(config)
    layers = Counter(module.partition(".")[0] for module in modules)
    lines += [f"  {net:<14} {layers[net]} layers" for net in NETS if layers[net]]
    return "\n".join(lines + [f"settings     {settings}"] * bool(settings))


def _read(
    path: str | os.PathLike[str], opened: Callable[[Path, int], AbstractContextManager[Any]]
) -> tuple[dict[str, tuple[Any, Any, float]], dict[str, Any]]:
    """The factors of every layer, as `open_tensors` or `open_arrays` gives them, and the other fields of an Adapter."""
    path = _path(path)
    try:
        with opened(path, MAX_FILE_BYTES) as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise CheckpointError(f"{path.name} is not a MEMO adapter: LoRAs of other networks do not fit MEMO's")
            version = about.get("version", "-")
            if version != str(VERSION):
                raise CheckpointError(
                    f"{path.name} has version {version[:40]}, this program reads version {VERSION}: update it"
                )
            modules = _modules(file, about, path.name)
            targets = _json(about, "targets", list, path.name)
            config = trained_as(_json(about, "config", dict, path.name), path.name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"no adapter at {path}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is not a readable adapter: {error}") from error
    for target in targets:
        if not isinstance(target, str):
            raise CheckpointError(f"{path.name} is damaged: its targets are no names but {shown(targets)}")
    base, settings = about.get("base", ""), about.get("settings", "")
    more = {"settings": settings, "config": config, "name": path.name}
    return modules, {"base": base, "targets": tuple(targets), **more}


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:  # no path; ~nobody
        raise CheckpointError(f"an adapter's file is a path, received {shown(path)}: {error}") from error


def _json(about: Mapping[str, str], name: str, kind: type, file: str) -> Any:
    """What a text of the metadata holds; nothing, where there is none."""
    try:
        value = json.loads(about[name]) if name in about else kind()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: its {name} is no JSON ({type(error).__name__})") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{file} is damaged: its {name} should be a {kind.__name__}, it is {shown(value)}")
    return value


def _text_number(about: Mapping[str, str], name: str, kind: type, file: str) -> Any:
    try:
        return kind(about[name][:100])
    except (KeyError, ValueError):
        raise CheckpointError(f"{file} is damaged: its {name} is {shown(about.get(name))}, not a number") from None


def _modules(file: Any, about: Mapping[str, str], name: str) -> dict[str, tuple[Any, Any, float]]:
    """The factors in an open safetensors file; CheckpointError with the first ten that do not fit."""
    problems: list[str] = []
    shapes: dict[str, dict[str, list[int]]] = {}
    keys = file.keys()
    for key in keys:
        entry, match = file.get_slice(key), _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected {key[:200]}")
        elif entry.get_dtype() not in FLOATS:
            problems.append(f"{key} holds {entry.get_dtype()}, not floating-point numbers of 16 bits or more")
        else:
            shapes.setdefault(match[1], {})[match[2]] = entry.get_shape()
    ranks, alphas = (_json(about, f"{what}_pattern", dict, name) for what in ("rank", "alpha"))
    rank, alpha = _text_number(about, "rank", int, name), _text_number(about, "alpha", float, name)
    alphas = {module: number(alphas.get(module, alpha), -_MAX_ALPHA, _MAX_ALPHA) for module in shapes}
    for module, pair in shapes.items():
        down, up = pair.get("A"), pair.get("B")
        wanted = whole(ranks.get(module, rank), 1)
        if down is None or up is None:
            problems.append(f"{module} lacks lora_{'A' if down is None else 'B'}")
        elif len(down) != len(up) or len(down) not in (2, 4) or 0 in (*down, *up) or {*down[2:], *up[2:]} - {1}:
            problems.append(f"{module} has shapes {down} and {up}, not [r, in] and [out, r] with a rank r from 1")
        elif not down[0] == up[1] == wanted:
            problems.append(f"{module} has shapes {down} and {up}, but its rank is said to be {wanted}")
        elif alphas[module] is None:
            problems.append(f"{module} has an alpha that is no finite number up to {_MAX_ALPHA:g}")
    _refuse(problems or ([] if shapes else ["it changes no layer"]), f"{name} is damaged")
    modules = {}
    for module in sorted(shapes):
        down, up = (file.get_tensor(f"{module}.lora_{letter}.weight") for letter in "AB")
        if not (is_finite(down) and is_finite(up)):
            problems.append(f"{module} has NaN or infinite values")
        modules[module] = (down, up, alphas[module])
    _refuse(problems, f"{name} is damaged")
    return modules


def apply(nets: Networks, adapter: Adapter, strength: float = 1.0) -> None:
    """Merges an adapter into the networks' weights, in place: W + strength * alpha / r * B A.

    The sum is made in float32 on the CPU, then rounded to the weight's dtype: the same bits wherever the networks live.
    Several adapters add up. A strength of 0 changes nothing. Any other also changes `nets.digest`, which keys stored
    windows and memory states, and lets the networks sample as the adapter was trained: at its frame rate, with its rows
    of face tokens, portraits cut at its margin. Of several that differ in one of these none is followed there: the
    checkpoint's own value counts (`NetConfig.following`). An adapter trained on another checkpoint is logged as a
    warning: fine-tuned relatives are common, and only the eye can tell.

    Args:
        strength: 1 as trained; any finite number, negative ones take away what the adapter learnt.

    Raises:
        CheckpointError: a layer of the adapter is not there or has another shape; or strength is not finite, or so
            large that the weights' number format cannot hold the result, which leaves the networks partly changed.
    """
    import torch
    from torch import nn

    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"an adapter is what lora.read gives, received {shown(adapter)}")
    if number(strength) is None:
        raise CheckpointError(f"the strength of {adapter.name} is {shown(strength)}; it must be a finite number")
    strength = float(strength)
    if nets.options is not None and (nets.options.fuse_qkv or nets.options.fp8_weights):
        raise CheckpointError(f"{adapter.name}: fused or 8-bit weights cannot take an adapter; give it while loading")
    layers = _fitting(nets, adapter)
    if strength == 0:
        return
    if adapter.base and adapter.base != nets.base_digest:
        logger.warning(
            "%s was trained on checkpoint %s, this one is %s: look whether it does what it should",
            *(adapter.name, adapter.base, nets.base_digest),
        )
    for name, layer in layers.items():
        weight = layer.weight
        with torch.no_grad():
            delta = adapter.modules[name].delta().view(weight.shape)
            merged = (weight.detach().to("cpu", torch.float32) + strength * delta).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise CheckpointError(f"{adapter.name}:{strength:g} exceeds {weight.dtype} in {name}: lower the strength")
        layer.weight = nn.Parameter(merged.to(weight.device), requires_grad=weight.requires_grad)
    nets.adapters += ((adapter.name, adapter.digest, float(strength)),)
    nets.own_config, nets.followed = nets.own_config or nets.diffusion_net.config, (*nets.followed, adapter.config)
    nets.diffusion_net.config = nets.own_config.following(nets.followed)


def _fitting(nets: Networks, adapter: Adapter) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that an adapter changes; CheckpointError where one is not there or has another shape."""
    from torch import nn

    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    problems = []
    for name, factors in adapter.modules.items():
        net, _, path = name.partition(".")
        try:
            layer = getattr(nets, net).get_submodule(path)
        except AttributeError:
            problems.append(f"there is no layer {name}")
            continue
        shape = tuple(layer.weight.shape) if isinstance(layer, (nn.Linear, nn.Conv2d)) else ()
        if shape[:2] != factors.shape or any(side != 1 for side in shape[2:]):
            problems.append(f"{name} has shape {shape}, the adapter is for {factors.shape}")
        layers[name] = layer
    _refuse(problems, f"{adapter.name} does not fit this checkpoint; it was trained on {adapter.base or 'another'}")
    return layers


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(what + ":\n  " + "\n  ".join(problems[:10]) + more)
