"""Sizes of the two networks, read from the released config.json files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

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
    "temporal_position_encoding": False,
}


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
    memory: tuple[bool, ...] = (True, True, True, True)
    memory_heads: int = 8
    memory_blocks: int = 1  # transformer blocks in a memory module
    memory_layers_per_block: int = 2  # memory attention layers in one of them

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> NetConfig:
        """Reads a config.json in the released form; raises CheckpointError for a setting that is not implemented."""
        for name, allowed in _ONLY.items():
            if name in config and config[name] not in allowed:
                raise CheckpointError(
                    f"config.json: {name} = {config[name]!r} is not supported, only {allowed[0]!r} is"
                )
        channels = tuple(config["block_out_channels"])
        levels = len(channels)
        attention = tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"])
        if tuple(kind.startswith("CrossAttn") for kind in reversed(config["up_block_types"])) != attention:
            raise CheckpointError("config.json: up_block_types must mirror down_block_types")
        heads = config.get("attention_head_dim", 8)  # the released configs keep the number of heads under this name
        if not isinstance(heads, int):
            raise CheckpointError(f"config.json: attention_head_dim = {heads!r} must be one number")
        motion = config.get("motion_module_kwargs") or {}
        for name, allowed in _ONLY_MOTION.items():
            values = motion.get(name, allowed)
            if any(value != allowed for value in (values if isinstance(values, (list, tuple)) else [values])):
                raise CheckpointError(f"config.json: motion_module_kwargs.{name} = {values!r} must be {allowed!r}")
        resolutions = config.get("motion_module_resolutions", [2**i for i in range(levels)])
        return cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            block_out_channels=channels,
            layers_per_block=config.get("layers_per_block", 2),
            attention=attention,
            heads=heads,
            cross_attention_dim=config.get("cross_attention_dim", 768),
            norm_num_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
            audio_attention_dim=config.get("audio_attention_dim", 768),
            memory=tuple(2**i in resolutions for i in range(levels)),
            memory_heads=motion.get("num_attention_heads", 8),
            memory_blocks=motion.get("num_transformer_block", 1),
            memory_layers_per_block=len(motion.get("attention_block_types", ("Temporal_Self",) * 2)),
        )
