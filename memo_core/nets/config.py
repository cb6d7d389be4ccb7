"""Settings of networks as files give them, checked; sizes of the two MEMO networks from the released config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import number, shown, whole
from ..errors import CheckpointError
from ..release import CROP_MARGIN, FPS, LONGEST_WINDOW, WINDOW

LARGEST = 2**16  # width, number of heads, kernel, ...: far beyond any network, and nothing to build on the meta device
LONGEST = 64  # list, as of widths by level
_MOST_PAST = 256  # past frames that a layer may look at
DEEPEST = 1000  # layers of a kind
_WIDEST_MARGIN = 10.0  # in parts of the face, as for a portrait
FACE_TOKEN_ROWS = ("released", "grouped")
# How networks were shown videos, as released; adapters say it of their training, too.
_TRAINED_AS: dict[str, Any] = {"fps": FPS, "face_token_rows": "released", "crop_margin": CROP_MARGIN}


def settings_like(settings: Mapping[str, Any], defaults: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The defaults, with the settings of those names in their place; what else the settings say is left out.

    A setting must be of its default's kind: True or False, a whole number from 1 (from 0 where that is the default), a
    number from 0, a text, or a list of what the default's first item is.

    Args:
        source: where the settings come from, for the message.

    Raises:
        CheckpointError: names the setting, its value and what is allowed.
    """
    checked = dict(defaults)
    for name in defaults.keys() & settings.keys():
        if settings[name] is None:  # as libraries write what nobody set
            continue
        try:
            checked[name] = _like(settings[name], defaults[name])
        except ValueError as error:
            raise CheckpointError(f"{source}: {name} = {shown(settings[name])} must be {error}") from None
    return checked


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if isinstance(default, int):
        low = min(default, 1)
        if whole(value, low, LARGEST) is None:
            raise ValueError(f"a whole number from {low} to {LARGEST}")
        return int(value)
    if isinstance(default, float):
        if number(value, 0, 1e9) is None:
            raise ValueError("a number from 0")
        return float(value)
    if isinstance(default, str):
        if not isinstance(value, str) or len(value) > 1000:
            raise ValueError("a text")
        return value
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= LONGEST:
        raise ValueError(f"a list of 1 to {LONGEST} items")
    return tuple(_like(item, default[0]) for item in value)


def trained_as(settings: Mapping[str, Any], source: object) -> dict[str, Any]:
    """What settings say of how networks were shown videos, checked: `fps`, `face_token_rows` and `crop_margin`, those
    of them that are there.

    Args:
        source: where the settings come from, for the message.

    Raises:
        CheckpointError: names the setting, its value and what is allowed.
    """
    read = settings_like(settings, _TRAINED_AS, source)
    if read["face_token_rows"] not in FACE_TOKEN_ROWS:
        raise CheckpointError(
            f"{source}: face_token_rows = {shown(read['face_token_rows'])} must be one of {FACE_TOKEN_ROWS}"
        )
    if read["crop_margin"] > _WIDEST_MARGIN:
        raise CheckpointError(f"{source}: crop_margin = {read['crop_margin']} must be at most {_WIDEST_MARGIN:g} faces")
    return {name: read[name] for name in _TRAINED_AS if settings.get(name) is not None}


def require_layers(announced: int, tensors: int, source: object) -> None:
    """CheckpointError where a configuration announces more layers than there are tensors: before they are built."""
    if announced > min(tensors, 100 * DEEPEST):
        raise CheckpointError(f"{source} announces {announced} layers, the file beside it holds {tensors} tensors")


# Settings this code does not implement: a checkpoint that asks for anything else is refused, not misread.
_ONLY = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1, 1.0),
    "only_cross_attention": (False,),
    "prediction": ("flow",),
    "resnet_time_scale_shift": ("default",),
    "transformer_layers_per_block": (1,),
    "unet_use_cross_frame_attention": (None, False),
    "unet_use_temporal_attention": (None, False),
    "upcast_attention": (False,),
    "use_inflated_groupnorm": (True,),
    "use_linear_projection": (False,),
}
_ONLY_MOTION = {
    "attention_block_types": "Temporal_Self",
    "temporal_attention_dim_div": 1,
}


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Which kind of layer module stands at a level.

    Attributes:
        name: in `nets.kinds`.
        frames: past frames that a temporal module looks at, where its kind has a choice; 0: as its kind has it.
    """

    name: str
    frames: int = 0


def _refuse_others(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    for name, allowed in only.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(
                f"config.json: {name} = {shown(config[name])} is not supported, only {allowed[0]!r} is"
            )


def _motion(config: Mapping[str, Any], window: int) -> tuple[dict[str, Any], int]:
    """Settings of the temporal modules, and how many places in a window they know."""
    given = config.get("motion_module_kwargs") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: motion_module_kwargs = {shown(given)} must hold settings by name")
    for name, allowed in _ONLY_MOTION.items():
        values = given.get(name, allowed)
        if any(value != allowed for value in (values if isinstance(values, (list, tuple)) else [values])):
            raise CheckpointError(f"config.json: motion_module_kwargs.{name} = {shown(values)} must be {allowed!r}")
    motion = settings_like(
        given,
        {
            "num_attention_heads": 8,
            "num_transformer_block": 1,
            "attention_block_types": ("Temporal_Self",) * 2,
            "temporal_position_encoding": False,
            "temporal_position_encoding_max_len": 24,
        },
        "config.json: motion_module_kwargs",
    )
    positions = motion["temporal_position_encoding_max_len"] if motion["temporal_position_encoding"] else 0
    if 0 < positions < window:
        raise CheckpointError(
            f"config.json: motion_module_kwargs.temporal_position_encoding_max_len = {positions} is less than the "
            f"{window} frames of a window"
        )
    return motion, positions


def _kinds(config: Mapping[str, Any], name: str, default: str, levels: int) -> tuple[LayerKind, ...]:
    """The kinds of layer modules in a setting: one for all levels, or a list of one each; a kind is its name, or an
    object with the name under `kind` and its `frames`.
    """
    given = config.get(name, default)
    each = list(given) if isinstance(given, (list, tuple)) else [given] * levels
    if len(each) != levels:
        raise CheckpointError(f"config.json: {name} has {len(each)} kinds for {levels} levels")
    kinds = []
    for kind in each:
        kind = {"kind": kind} if isinstance(kind, str) else kind
        if not isinstance(kind, dict) or kind.keys() - {"kind", "frames"} or not isinstance(kind.get("kind"), str):
            raise CheckpointError(
                f"config.json: {name} = {shown(given)} must be the name of a kind, or an object of kind and frames, or "
                "a list of one for each level"
            )
        read = settings_like(kind, {"kind": default, "frames": 0}, f"config.json: {name}")
        if read["frames"] > _MOST_PAST:
            raise CheckpointError(f"config.json: {name}: frames = {read['frames']} must be at most {_MOST_PAST}")
        kinds.append(LayerKind(read["kind"], read["frames"]))
    return tuple(kinds)


def _noise_levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    falling = all(a > b for a, b in zip(levels, levels[1:]))
    if len(levels) < 2 or levels[0] != 1 or levels[-1] != 0 or not falling:
        raise CheckpointError(f"config.json: noise_levels = {shown(list(levels))} must fall from 1 to 0")
    return levels


@dataclass(frozen=True, kw_only=True, slots=True)
class NetConfig:
    """Sizes of the Reference Net or the Diffusion Net; the defaults are the released ones."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # per level, top resolution first
    heads: int = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    # Diffusion Net only
    audio_attention_dim: int = 768
    memory: tuple[bool, ...] = (True, True, True, True)  # which levels have temporal modules; the middle always has one
    memory_heads: int = 8
    memory_blocks: int = 1  # transformer blocks in a temporal module
    memory_layers_per_block: int = 2  # temporal layers in one of them
    temporal: tuple[LayerKind, ...] = (LayerKind("memory"),) * 4  # kind of temporal module, per level
    audio: tuple[LayerKind, ...] = (LayerKind("multimodal"),) * 4  # kind of audio module, per level
    positions: int = 0  # frames of the longest window whose places temporal layers know; 0: they know none
    window: int = WINDOW  # frames denoised together
    fps: int = FPS  # frames a second that it was trained at
    noise_levels: tuple[float, ...] = ()  # from 1 down to 0 that it samples at; (): the released schedule
    guidance_embedded: bool = False  # it has learnt its guidance: the conditional row is all that is computed
    face_token_rows: str = "released"  # which rows read which face tokens; see `sampling.settings.Settings`
    crop_margin: float = CROP_MARGIN  # room around the faces that it was trained on, in parts of a face's size

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> NetConfig:
        """Reads a config.json in the released form; raises CheckpointError for a setting that is not implemented."""
        _refuse_others(config, _ONLY)
        # Every setting that is read, with the released value, which also tells its kind.
        read = settings_like(
            config,
            {
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (320,),
                "layers_per_block": 2,
                "down_block_types": ("",),
                "up_block_types": ("",),
                "attention_head_dim": 8,  # the released configs keep the number of heads under this name
                "cross_attention_dim": 768,
                "norm_num_groups": 32,
                "norm_eps": 1e-5,
                "audio_attention_dim": 768,
                "window_frames": WINDOW,
                "noise_levels": (1.0,),
                "guidance_embedded": False,
            },
            "config.json",
        )
        if read["window_frames"] > LONGEST_WINDOW:
            raise CheckpointError(
                f"config.json: window_frames = {read['window_frames']} must be at most {LONGEST_WINDOW}"
            )
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            if config.get(name) is None:
                raise CheckpointError(f"config.json lacks {name}")
        channels, levels = read["block_out_channels"], len(read["block_out_channels"])
        attention = tuple(kind.startswith("CrossAttn") for kind in read["down_block_types"])
        if tuple(kind.startswith("CrossAttn") for kind in reversed(read["up_block_types"])) != attention:
            raise CheckpointError("config.json: up_block_types must mirror down_block_types")
        if len(attention) != levels:
            raise CheckpointError(
                f"config.json: block_out_channels has {levels} levels, down_block_types {len(attention)}"
            )
        motion, positions = _motion(config, read["window_frames"])
        everywhere = {"motion_module_resolutions": tuple(2**i for i in range(levels))}
        resolutions = settings_like(config, everywhere, "config.json")["motion_module_resolutions"]
        if config.get("motion_module_resolutions") == []:  # a net without memory but in the middle
            resolutions = ()
        made = cls(
            in_channels=read["in_channels"],
            out_channels=read["out_channels"],
            block_out_channels=channels,
            layers_per_block=read["layers_per_block"],
            attention=attention,
            heads=read["attention_head_dim"],
            cross_attention_dim=read["cross_attention_dim"],
            norm_num_groups=read["norm_num_groups"],
            norm_eps=read["norm_eps"],
            audio_attention_dim=read["audio_attention_dim"],
            memory=tuple(2**i in resolutions for i in range(levels)),
            memory_heads=motion["num_attention_heads"],
            memory_blocks=motion["num_transformer_block"],
            memory_layers_per_block=len(motion["attention_block_types"]),
            temporal=_kinds(config, "temporal_modules", "memory", levels),
            audio=_kinds(config, "audio_modules", "multimodal", levels),
            positions=positions,
            window=read["window_frames"],
            noise_levels=_noise_levels(read["noise_levels"]) if config.get("noise_levels") is not None else (),
            guidance_embedded=read["guidance_embedded"],
            **trained_as(config, "config.json"),
        )
        made._check_widths()
        return made

    def following(self, adapters: Sequence[Mapping[str, Any]]) -> NetConfig:
        """As the checkpoint samples with adapters, which say of their training what `trained_as` reads: as those that
        say something about a setting agree upon; where they do not agree, or none says anything, as it does without.
        """
        said = {name: {about[name] for about in adapters if name in about} for name in _TRAINED_AS}
        return replace(self, **{name: values.pop() for name, values in said.items() if len(values) == 1})

    def _check_widths(self) -> None:
        last = len(self.block_out_channels) - 1
        for i, width in enumerate(self.block_out_channels):
            parts = [("norm_num_groups", self.norm_num_groups)]
            parts += [("attention_head_dim", self.heads)] * (self.attention[i] or i == last)
            parts += [("motion_module_kwargs.num_attention_heads", self.memory_heads)] * self.memory[i]
            for name, value in parts:
                if width % value:
                    raise CheckpointError(f"config.json: {name} = {value} does not divide block_out_channels = {width}")

    def layers(self, memory: bool) -> int:
        """Residual blocks, and with `memory` the memory layers beside them: no net of these sizes has fewer tensors."""
        each = 1 + memory * self.memory_blocks * self.memory_layers_per_block
        return (2 * self.layers_per_block + 1) * sum(each if remembers else 1 for remembers in self.memory)
